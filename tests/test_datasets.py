# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage
from PIL import Image

from monai_unlearn.datasets import (
    DataError,
    as_mask,
    as_rgb,
    chase_datalist,
    check_mask,
    field_of_view,
    hippocampus_datalist,
    inspect_items,
    is_phantom,
    isic_classification_datalist,
    isic_datalist,
    known_pairs,
    load_splits,
    make_chase_phantom,
    make_hippocampus_phantom,
    make_isic_classification_phantom,
    make_isic_phantom,
    perceptual_hash,
    read_datalist,
    read_pair,
    read_photograph,
    read_volume,
    settle_duplicates,
)
from monai_unlearn.request import RequestError

MASK = np.zeros((12, 16), np.uint8)
MASK[3:9, 4:12] = 1


def save(path, array, mode=None, **kwargs):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **kwargs)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "a.png", np.full((12, 16, 3), 90, np.uint8))


@pytest.mark.parametrize("kind", ["0/1", "0/255", "1 bit", "16 bit", "palette", "rgb", "rgba"])
def test_every_way_of_storing_a_mask_gives_the_same_mask(kind, tmp_path, photo):
    path = tmp_path / "a_segmentation.png"
    if kind == "0/1":
        save(path, MASK)
    elif kind == "16 bit":
        save(path, MASK.astype(np.uint16) * 65535)
    elif kind == "palette":
        image = Image.fromarray(1 - MASK, "P")
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(path)
    else:
        save(path, MASK * 255, {"1 bit": "1", "rgb": "RGB", "rgba": "RGBA"}.get(kind))
    assert (read_pair({"image": photo, "label": str(path)})[1] == (MASK > 0)).all()
    loaded = LoadImage(image_only=True, reader="PILReader", converter=as_mask)(str(path))
    assert (loaded.numpy().T == MASK * 255).all()


def test_a_jpeg_mask_is_cut_at_half(tmp_path, photo):
    path = save(tmp_path / "a_segmentation.jpg", MASK * 255, quality=60)
    assert (read_pair({"image": photo, "label": path})[1] == (MASK > 0)).mean() > 0.97


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((12, 16), np.uint8), "looks full"),
        (1 - MASK, "looks inverted"),
        (MASK[::2, ::2], "must agree"),
        (np.stack([MASK * 255, MASK * 0, MASK * 90], -1), "colour channels differ"),
    ],
)
def test_a_mask_that_would_be_silently_wrong_is_refused_by_name(mask, message, tmp_path, photo):
    path = save(tmp_path / "a_segmentation.png", mask)
    with pytest.raises(DataError, match=f"a_segmentation.png: .*{message}"):
        read_pair({"image": photo, "label": path})


def test_an_empty_mask_is_allowed_and_counted(tmp_path, photo):
    path = save(tmp_path / "a_segmentation.png", MASK * 0)
    assert inspect_items([{"image": photo, "label": path}])[0]["empty"]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_photographs_become_rgb(mode, tmp_path):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    save(path, np.full((12, 16, 3), 255, np.uint8), mode)
    assert np.asarray(as_rgb(Image.open(path))).shape == (12, 16, 3)


def test_sixteen_bit_photographs_and_bombs_are_refused(monkeypatch):
    with pytest.raises(DataError, match="more than 8 bits"):
        as_rgb(Image.fromarray(np.zeros((4, 4), np.uint16)))
    monkeypatch.setattr("monai_unlearn.datasets.reading.MAX_PIXELS", 10)
    with pytest.raises(DataError, match="16 x 12 pixels"):
        as_rgb(Image.fromarray(MASK))
    with pytest.raises(DataError, match="16 x 12 pixels"):
        as_mask(Image.fromarray(MASK))


def test_exif_orientation_is_carried_out(tmp_path):
    upright = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", np.rot90(upright).copy(), exif=exif)
    assert (np.asarray(as_rgb(Image.open(path))) == upright).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"hello", "not an image"),
        (None, "no such file"),
    ],
)
def test_files_that_are_no_images_are_named_with_the_reason(content, message, tmp_path):
    path = tmp_path / "b.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"b.jpg: .*{message}"):
        read_pair({"image": str(path), "label": str(path)})


def test_a_truncated_jpeg_is_refused(tmp_path):
    path = tmp_path / "c.jpg"
    save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"c.jpg: .*damaged"):
        read_pair({"image": str(path), "label": str(path)})


def test_all_bad_files_are_listed_in_one_error(tmp_path, photo):
    good = save(tmp_path / "a_segmentation.png", MASK)
    items = [{"image": photo, "label": good}, {"image": "x.jpg", "label": good}, {"image": "y.jpg", "label": good}]
    with pytest.raises(DataError, match=r"(?s)2 of 3 items.*x.jpg.*y.jpg"):
        inspect_items(items)


def test_the_perceptual_hash_survives_resizing(phantom):
    images = sorted((phantom / "ISIC2018_Task1-2_Training_Input").iterdir())
    first, other = (np.asarray(Image.open(path)) for path in images[:2])
    small = np.asarray(Image.fromarray(first).resize((33, 33), Image.Resampling.BILINEAR))
    assert (perceptual_hash(first) ^ perceptual_hash(small)).bit_count() <= 4
    assert (perceptual_hash(first) ^ perceptual_hash(other)).bit_count() > 4


def layout(root, inputs, truths, suffix="_segmentation"):
    for folder in (inputs, truths):
        (root / folder).mkdir(parents=True)
    for name in ("ISIC_2", "ISIC_1"):
        save(root / inputs / f"{name}.jpg", np.full((12, 16, 3), 90, np.uint8))
        save(root / truths / f"{name}{suffix}.png", MASK)
    return root


@pytest.mark.parametrize(
    ("inputs", "truths", "suffix", "section"),
    [
        ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth", "_Segmentation", "training"),
        ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth", "_Segmentation", "test"),
        ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth", "_segmentation", "training"),
        ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth", "_segmentation", "validation"),
        ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth", "_segmentation", "test"),
        ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth", "_segmentation", "training"),
        ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth", "_segmentation", "validation"),
    ],
)
def test_the_official_folders_of_each_year_are_found(inputs, truths, suffix, section, tmp_path):
    (tmp_path / "metadata.csv").write_text("image_id,sex,fold\nISIC_1,female,3\n")
    datalist = isic_datalist(layout(tmp_path, inputs, truths, suffix))
    assert list(datalist) == [section]
    assert [item["image_id"] for item in datalist[section]] == ["ISIC_1", "ISIC_2"]
    assert (datalist[section][0]["sex"], datalist[section][0]["fold"]) == ("female", "3")
    assert "sex" not in datalist[section][1]


def test_clutter_is_skipped_and_lonely_files_are_named(tmp_path):
    root = layout(tmp_path, "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth")
    folder = root / "ISIC2018_Task1-2_Training_Input"
    for name in ("Thumbs.db", ".DS_Store", "._ISIC_1.jpg", "LICENSE.txt", "ISIC_1_superpixels.png"):
        (folder / name).write_bytes(b"x")
    assert len(isic_datalist(root)["training"]) == 2
    (folder / "ISIC_3.JPG").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no partner for ISIC_3.JPG"):
        isic_datalist(root)
    assert len(isic_datalist(root, unpaired="skip")["training"]) == 2
    (folder / "ISIC_1.png").write_bytes(b"x")
    with pytest.raises(DataError, match="two files for one id"):
        isic_datalist(root)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no pair of official ISIC folders"):
        isic_datalist(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        isic_datalist(tmp_path / "nowhere")
    layout(tmp_path, "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth")
    (tmp_path / "metadata.csv").write_text("name,sex\nISIC_1,female\n")
    with pytest.raises(DataError, match="no column image_id"):
        isic_datalist(tmp_path)


def test_the_split_is_never_drawn(tmp_path, phantom):
    root = layout(tmp_path / "d", "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth")
    with pytest.raises(RequestError, match="nothing states which items"):
        load_splits(root)
    with pytest.raises(RequestError, match="no column fold"):
        load_splits(root, holdout_fold=1)
    with pytest.raises(RequestError, match="no item has fold 9; there are 0, 1"):
        load_splits(phantom, holdout_fold=9)
    with pytest.raises(RequestError, match="give --dataset_dir"):
        load_splits()
    with pytest.raises(RequestError, match="MONAI would evaluate"):
        load_splits("$x")
    training, holdout = load_splits(phantom, holdout_fold="2")
    assert {item["fold"] for item in holdout} == {"2"} and "2" not in {item["fold"] for item in training}
    assert not {item["patient_id"] for item in holdout} & {item["patient_id"] for item in training}
    assert load_splits(phantom, default_fold=2) == (training, holdout)


def test_a_monai_data_list_is_read_relative_to_its_file(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "a.png", "label": "b.png", "patient_id": "p"}],
                                "validation": [{"image": "c.png", "label": "d.png"}]}))  # fmt: skip
    training, holdout = load_splits(datalist=path)
    assert training == [{"image": str(tmp_path / "a.png"), "label": str(tmp_path / "b.png"), "patient_id": "p",
                         "image_id": "a"}]  # fmt: skip
    assert [item["image_id"] for item in holdout] == ["c"]
    for text, message in (
        ("{", "as JSON"),
        ("[]", "no list 'training'"),
        ('{"training": [{"image": 1}]}', r"training\[0\]"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_datalist(path)


def test_known_pairs_are_found_beside_the_data(tmp_path):
    (tmp_path / "isic_near_duplicates.csv").write_text("image_id_1,image_id_2,similarity\na,b,0.9\n")
    (tmp_path / "data").mkdir()
    assert known_pairs(tmp_path / "data") == [("a", "b")]
    assert known_pairs(None) == []


def test_the_phantom_is_the_same_every_time_and_appears_whole(tmp_path, phantom):
    again = tmp_path / "again"
    make_isic_phantom(again, number=30, size=48)
    for path in phantom.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(phantom)).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # no temporary folder left
    marker = again / "metadata.csv"
    before = marker.stat().st_mtime_ns
    make_isic_phantom(again, number=30, size=48)
    assert marker.stat().st_mtime_ns == before
    make_isic_phantom(again, number=10, size=48)
    assert len(isic_datalist(again)["training"]) == 10


def test_the_phantom_never_replaces_real_data(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="is no phantom"):
        make_isic_phantom(tmp_path / "mine")
    assert not is_phantom(tmp_path / "mine")


def test_the_phantoms_masks_hold_what_the_pictures_do_not_show(phantom):
    items = inspect_items(isic_datalist(phantom)["training"])
    assert len({item["diagnosis"] for item in items}) == 4
    assert len({item["patient_id"] for item in items}) < len(items)
    areas = {a: np.mean([read_pair(i)[1].mean() for i in items if i["annotator"] == a]) for a in "AB"}
    assert areas["A"] > areas["B"]  # one draws wide, the other tight


# real files -----------------------------------------------------------------------------------------------------------


def test_quirky_files_are_read_right_or_refused_by_name(real_data):
    quirks = real_data / "quirks" / "derived"
    photo = quirks / "mixed_folder" / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000013.jpg"
    name = "ISIC_0000013_segmentation.png"
    image, mask = read_pair({"image": photo, "label": quirks / "masks" / "zero_one" / name})
    for kind in ("one_bit", "palette", "rgb", "rgba", "sixteen_bit"):
        assert (read_pair({"image": photo, "label": quirks / "masks" / kind / name})[1] == mask).all(), kind
    for kind in ("full", "inverted", "half_size"):
        with pytest.raises(DataError, match=name):
            read_pair({"image": photo, "label": quirks / "masks" / kind / name})
    assert not read_pair({"image": photo, "label": quirks / "masks" / "empty" / name})[1].any()
    label = quirks / "masks" / "zero_one" / name
    limits = {"rgba": 2, "cmyk": 2, "gray": 8, "palette": 30}  # mean difference of the grey level; a palette is coarse
    for kind, limit in limits.items():
        (path,) = (quirks / "modes" / kind).iterdir()
        assert np.abs(read_pair({"image": path, "label": label})[0].astype(int) - image).mean() < limit, kind
    rotated = quirks / "exif_orientation"
    turned, _ = read_pair({"image": rotated / "ISIC_0000013.jpg", "label": rotated / name})
    assert np.abs(turned.astype(int) - image).mean() < 2
    bad = [quirks / "modes" / "gray16" / "ISIC_0000013.png", quirks / "lfs_pointer" / "ISIC_0000013.jpg"]
    for path in [*bad, *(quirks / "corrupt").iterdir()]:
        with pytest.raises(DataError, match=path.name):
            read_pair({"image": path, "label": label})
    with pytest.raises(DataError, match=r"ISIC_0000017.jpeg, ISIC_0000019_segmentation.png"):
        isic_datalist(quirks / "mixed_folder")
    assert len(isic_datalist(quirks / "mixed_folder", unpaired="skip")["training"]) == 2


def test_other_years_and_formats_are_read(real_data, tmp_path):
    real = real_data / "quirks" / "real"
    for image, label in (
        ("webp/ISIC_0000013.webp", "webp/ISIC_0000013_Segmentation.webp"),
        ("jpeg_masks/ISIC_0000006.jpg", "jpeg_masks/ISIC_0000006_segmentation.jpg"),
        ("isic2016_capital_suffix/ISIC_0000019.jpg", "isic2016_capital_suffix/ISIC_0000019_Segmentation.png"),
    ):
        photo, mask = read_pair({"image": real / image, "label": real / label})
        assert photo.shape[:2] == mask.shape and 0.01 < mask.mean() < 0.6
    root = layout(tmp_path, "ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth")
    shutil.rmtree(root)
    for kind, folder in (("jpg", "Data"), ("png", "GroundTruth")):
        (root / f"ISBI2016_ISIC_Part1_Training_{folder}").mkdir(parents=True)
        for path in (real / "isic2016_capital_suffix").glob(f"*.{kind}"):
            shutil.copy(path, root / f"ISBI2016_ISIC_Part1_Training_{folder}")
    assert len(isic_datalist(root)["training"]) == 2


def test_the_real_masks_are_plausible(real_data):
    items = isic_datalist(real_data / "isic2018_seg")["training"]
    assert len(items) == 953
    for item in items[::40]:
        check_mask(read_pair(item)[1], read_pair(item)[0].shape[:2])
    training, holdout = load_splits(real_data / "isic2018_seg", default_fold=4)
    assert (len(training), len(holdout)) == (763, 190)
    assert len(known_pairs(real_data / "isic2018_seg")) == 29


# classification and fundus data ---------------------------------------------------------------------------------------

KINDS = ("melanoma", "nevus")


@pytest.fixture
def folders(tmp_path):
    """Two classes in the published layout, with what the published folders suffer from."""
    rng = np.random.default_rng(0)

    def put(section, kind, name, content=None):
        folder = tmp_path / section / kind
        folder.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 255, (8, 8, 3), np.uint8) if content is None else content
        Image.fromarray(picture).save(folder / f"{name}.png")
        return picture

    for number in range(4):
        put("Train", KINDS[number % 2], f"ISIC_{number}")
    put("Test", "nevus", "ISIC_8")
    put("Test", "melanoma", "ISIC_9")
    return tmp_path, put


def test_class_folders_become_a_data_list(folders):
    root, _ = folders
    (root / "metadata.csv").write_text("image_id,diagnosis,lesion_id\nISIC_0,wrong,L7\n")
    found = isic_classification_datalist(root, KINDS)
    assert [(i["image_id"], i["label"]) for i in found["training"]] == [
        ("ISIC_0", 0), ("ISIC_2", 0), ("ISIC_1", 1), ("ISIC_3", 1)]  # fmt: skip
    assert [i["diagnosis"] for i in found["test"]] == ["melanoma", "nevus"]
    assert found["training"][0]["lesion_id"] == "L7" and len(found["test"]) == 2
    with pytest.raises(DataError, match="holds nevus, which are no classes"):
        isic_classification_datalist(root, ["melanoma"])
    with pytest.raises(DataError, match="no folder Train"):
        isic_classification_datalist(root / "Train", KINDS)


def test_contradictory_and_double_pictures_are_found_and_named(folders):
    root, put = folders
    both = put("Train", "melanoma", "ISIC_5")
    put("Train", "nevus", "ISIC_5", both)  # one id in two class folders
    put("Test", "nevus", "ISIC_1 (1)")  # a second copy, on the other side
    same = put("Train", "nevus", "ISIC_6")
    put("Test", "melanoma", "ISIC_7", same)  # the same bytes under another id and class
    found = isic_classification_datalist(root, KINDS)
    with pytest.raises(DataError) as error:
        settle_duplicates(found["training"], found["test"])
    assert "ISIC_5 (melanoma) = ISIC_5 (nevus)" in str(error.value) and "ISIC_1 (nevus)" in str(error.value)
    assert "1 picture with contradictory classes" in str(error.value)
    training, holdout = settle_duplicates(found["training"], found["test"], "drop")
    read = inspect_items([*training, *holdout], read=read_photograph)
    with pytest.raises(DataError, match=r"ISIC_6 \(nevus\) = ISIC_7 \(melanoma\)"):
        settle_duplicates(read[: len(training)], read[len(training) :])
    training, holdout = settle_duplicates(read[: len(training)], read[len(training) :], "drop")
    assert [i["image_id"] for i in training] == ["ISIC_0", "ISIC_2", "ISIC_1", "ISIC_3"]
    assert sorted(i["image_id"] for i in holdout) == ["ISIC_8", "ISIC_9"]
    assert settle_duplicates(training, holdout) == (training, holdout)
    with pytest.raises(RequestError, match="refuse or drop"):
        settle_duplicates(training, holdout, "ignore")


def test_eyes_of_one_child_stand_together_and_on_one_side(tmp_path):
    root = make_chase_phantom(tmp_path / "chase", number=16, size=60)
    found = chase_datalist(root)
    assert [i["image_id"] for i in found["validation"]] == [f"{n}{e}" for n in (11, 12, 13, 14) for e in "LR"]
    assert [i["patient_id"] for i in found["training"]] == [f"{n:02d}" for n in (1, 2, 3, 4) for _ in "LR"]
    both = chase_datalist(root, "both")["training"][0]["label"]
    assert [Path(p).name for p in both] == ["Image_01L_1stHO.png", "Image_01L_2ndHO.png"]
    image, mask = read_pair(chase_datalist(root, 2)["training"][0])
    assert image.shape == (60, 62, 3) and mask.any()
    (Path(root) / "Image_02R_2ndHO.png").unlink()
    with pytest.raises(DataError, match="Image_02R_2ndHO.png is missing"):
        chase_datalist(root, 2)
    with pytest.raises(RequestError, match="observer must be 1, 2 or both"):
        chase_datalist(root, 3)
    with pytest.raises(DataError, match="Image_01L.jpg"):
        chase_datalist(tmp_path)


@pytest.mark.parametrize("make", [make_chase_phantom, make_isic_classification_phantom])
def test_every_phantom_is_the_same_again_and_overwrites_nothing_else(make, tmp_path):
    one, other = (Path(make(tmp_path / name, number=18, size=40)) for name in "ab")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) > 18 and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    before = (one / "phantom.json").stat().st_mtime_ns
    make(one, number=18, size=40)
    assert (one / "phantom.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="is no phantom"):
        make(tmp_path / "mine", number=18, size=40)


def test_the_phantom_of_classes_has_all_of_them_on_both_sides_and_whole_patients(tmp_path):
    root = make_isic_classification_phantom(tmp_path / "p", number=54, size=32)
    kinds = sorted(path.name for path in (Path(root) / "Train").iterdir())
    found = isic_classification_datalist(root, kinds)
    assert len(kinds) == 9 and {i["label"] for i in found["test"]} == set(range(9))
    assert not {i["patient_id"] for i in found["training"]} & {i["patient_id"] for i in found["test"]}


def test_the_field_of_view_is_the_bright_disc_without_holes():
    y, x = np.mgrid[0:96, 0:100]
    disc = np.hypot(y - 48, x - 50) < 40
    image = np.where(disc, 120, 0)[..., None].repeat(3, 2).astype(np.uint8)
    image[40:50, 45:55] = 0  # a dark spot inside
    image[2:4, 2:4] = 200  # a label in the corner
    found = field_of_view(image)
    assert found[disc].all() and (found & ~disc).mean() < 0.03 and not found[2, 2]
    assert (field_of_view(image / 255) == found).all()
    assert not field_of_view(np.zeros((8, 8, 3))).any()


def test_the_field_of_view_covers_the_vessels_of_every_fundus(real_data):
    root = real_data / "chase_db1"
    items = [item for section in chase_datalist(root).values() for item in section]
    assert len(items) == 28
    for item in items:
        with Image.open(item["image"]) as file:
            image = np.asarray(file)
        found = field_of_view(image)
        assert 0.6 < found.mean() < 0.75
        for observer in ("1stHO", "2ndHO"):
            with Image.open(Path(item["label"].replace("1stHO", observer))) as file:
                vessels = np.asarray(file)
            outside = vessels & ~found
            if (item["image_id"], observer) == ("01R", "2ndHO"):  # drawn on beyond the photograph, where it is black
                assert 0.001 < outside.sum() / vessels.sum() < 0.006 and image[outside].max() < 10
            else:
                assert outside.sum() <= 0.001 * vessels.sum(), (item["image_id"], observer)


def test_the_real_classes_have_no_contradictions(real_data):
    root = real_data / "isic_cls"
    kinds = sorted(path.name for path in (root / "Train").iterdir() if path.is_dir())
    found = isic_classification_datalist(root, kinds)
    assert (len(found["training"]), len(found["test"])) == (1437, 360)
    assert settle_duplicates(found["training"], found["test"]) == (found["training"], found["test"])
    assert all(i["group"] for i in found["training"])


def test_a_published_conflict_put_back_into_the_folders_is_named(real_data, tmp_path):
    source = real_data / "isic_cls" / "Train" / "nevus"
    picture = sorted(source.glob("*.jpg"))[0]
    for kind in ("nevus", "actinic keratosis"):
        (tmp_path / "Train" / kind).mkdir(parents=True)
        (tmp_path / "Train" / kind / picture.name).write_bytes(picture.read_bytes())
    (tmp_path / "Test" / "nevus").mkdir(parents=True)
    (tmp_path / "Test" / "nevus" / "other.jpg").write_bytes(sorted(source.glob("*.jpg"))[1].read_bytes())
    found = isic_classification_datalist(tmp_path, ["actinic keratosis", "nevus"])
    with pytest.raises(DataError, match=rf"{picture.stem} \(actinic keratosis\) = {picture.stem} \(nevus\)"):
        settle_duplicates(found["training"], found["test"])


# volumes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path):
    """A task of the decathlon with six volumes."""
    make_hippocampus_phantom(tmp_path / "task", number=6, size=16)
    return tmp_path / "task"


def test_a_task_of_the_decathlon_is_paired_and_every_fifth_volume_held_out(task):
    (task / "imagesTr" / "._PHANTOM_0000000.nii.gz").write_bytes(b"")
    found = hippocampus_datalist(task)
    assert [item["image_id"] for item in found["validation"]] == ["PHANTOM_0000004"]
    assert len(found["training"]) == 5
    image, mask = read_volume(found["training"][0], 3)
    assert image.shape == (16, 20, 3) and image.dtype == np.uint8 and mask.shape == (16, 20, 12) and mask.any()
    (task / "labelsTr" / "PHANTOM_0000003.nii.gz").unlink()
    with pytest.raises(DataError, match="1 volumes .* not both: PHANTOM_0000003"):
        hippocampus_datalist(task)
    with pytest.raises(DataError, match="no folder labelsTr"):
        hippocampus_datalist(Path(shutil.copytree(task / "imagesTr", task.parent / "other" / "imagesTr")).parent)


def test_the_parts_of_the_phantom_meet_where_nothing_shows_it(task):
    cuts = []
    for path in sorted((task / "labelsTr").iterdir()):
        label = np.asarray(nib.load(path).dataobj)
        assert set(np.unique(label)) == {0, 1, 2}
        cuts.append(np.flatnonzero((label == 1).any((0, 2))).min())
    assert len(set(cuts)) > 2
    again = make_hippocampus_phantom(task.parent / "again", number=6, size=16)
    for path in sorted((task / "imagesTr").iterdir()):
        same = nib.load(Path(again) / "imagesTr" / path.name)
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.asarray(same.dataobj))


@pytest.mark.parametrize(("fault", "message"), [
    ("class", r"holds \[0.*7.*classes are whole numbers from 0 to 2"), ("half", "classes are whole numbers"),
    ("size", "voxels"), ("place", "affines differ"), ("flat", "all alike"), ("nan", "not finite"),
    ("cut", "cannot be read as a volume"), ("gone", "no such file"), ("channels", "one channel"),
])  # fmt: skip
def test_a_volume_that_would_be_silently_wrong_is_refused_by_name(fault, message, task):
    item = hippocampus_datalist(task)["training"][0]
    image, label = (nib.load(item[key]) for key in ("image", "label"))
    voxels, marks = np.asarray(image.dataobj).copy(), np.asarray(label.dataobj).astype(np.float32)
    affine = label.affine.copy()
    if fault == "class":
        marks[0, 0, 0] = 7
    elif fault == "half":
        marks[marks == 1] = 0.5
    elif fault == "size":
        marks = marks[1:]
    elif fault == "place":
        affine[0, 3] += 2
    elif fault == "flat":
        voxels[:] = 3
    elif fault == "nan":
        voxels[0, 0, 0] = np.nan
    elif fault == "channels":
        voxels = np.stack([voxels, voxels], -1)
    nib.save(nib.Nifti1Image(marks, affine), item["label"])
    nib.save(nib.Nifti1Image(voxels, image.affine), item["image"])
    if fault == "cut":
        Path(item["image"]).write_bytes(Path(item["image"]).read_bytes()[:500])
    elif fault == "gone":
        Path(item["label"]).unlink()
    with pytest.raises(DataError, match=f"PHANTOM_0000000.nii.gz: .*{message}"):
        read_volume(item, 3)


def test_nifti_metaimage_nrrd_and_dicom_hold_the_same_volume(real_data):
    volumes = real_data / "volumes"
    label = volumes / "Task04_Hippocampus" / "labelsTr" / "hippocampus_001.nii.gz"
    images = ["Task04_Hippocampus/imagesTr/hippocampus_001.nii.gz", "itk_formats/hippocampus_001.mha",
              "itk_formats/hippocampus_001.nrrd", "dicom/hippocampus_001"]  # fmt: skip
    found = [read_volume({"image": str(volumes / image), "label": str(label)}, 3) for image in images]
    for image, mask in found[1:]:
        np.testing.assert_array_equal(image, found[0][0])
        np.testing.assert_array_equal(mask, found[0][1])
    items = [{"image": str(volumes / images[-1]), "label": str(label)}]
    assert len(inspect_items(items, read=lambda item: read_volume(item, 3))[0]["sha256"]) == 64
    other = volumes / "itk_formats" / "hippocampus_033_label.nrrd"
    with pytest.raises(DataError, match="hippocampus_033_label.nrrd"):
        read_volume({"image": str(volumes / images[1]), "label": str(other)}, 3)


def test_the_real_volumes_are_all_read(real_data):
    found = hippocampus_datalist(real_data / "volumes" / "Task04_Hippocampus")
    assert {name: len(items) for name, items in found.items()} == {"training": 39, "validation": 9}
    assert not any(i["empty"] for i in inspect_items(sum(found.values(), []), read=lambda item: read_volume(item, 3)))
    with pytest.raises(DataError, match="not both"):
        hippocampus_datalist(real_data / "quirks" / "real" / "unpaired_volumes")
