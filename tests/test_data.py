# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
import torch
from monai.data import DataLoader
from monai.transforms import RandSpatialCropSamplesd
from torch import nn

from monai_unlearn.data import (
    ORDERS,
    CheckMaskd,
    FieldOfViewd,
    ForgetRetainSampler,
    MarkForgetd,
    MemoryDataset,
    OneHotd,
    cache_outputs,
)
from monai_unlearn.datasets import DataError

FLAGS = [i % 5 == 0 for i in range(20)]  # 4 to forget, 16 to keep


def sides(batches):
    return [(sum(FLAGS[i] for i in batch), sum(not FLAGS[i] for i in batch)) for batch in batches]


def test_mixed_batches_hold_both_groups_in_fixed_numbers():
    assert sides(ForgetRetainSampler(FLAGS, 1, 4)) == [(1, 4)] * 4
    assert sides(ForgetRetainSampler(FLAGS, 2, 3)) == [(2, 3)] * 5 + [(2, 1)]


def test_alternate_batches_are_pure_and_take_turns():
    batches = sides(ForgetRetainSampler(FLAGS, 2, 4, order="alternate"))
    assert batches == [(0, 4), (2, 0)] * 4


def test_sequential_shows_all_to_keep_and_then_all_to_forget_once():
    sampler = ForgetRetainSampler(FLAGS, 3, 5, order="sequential")
    batches = list(sampler)
    assert sides(batches) == [(0, 5), (0, 5), (0, 5), (0, 1), (3, 0), (1, 0)]
    assert sorted(sum(batches, [])) == list(range(20))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_forget", "num_retain"), [(1, 4), (2, 3), (4, 16), (3, 7), (9, 2)])
def test_an_epoch_shows_every_sample_and_no_batch_shows_one_twice(order, num_forget, num_retain):
    sampler = ForgetRetainSampler(FLAGS, num_forget, num_retain, order)
    for _ in range(5):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert set(sum(batches, [])) == set(range(20))
        assert all(len(set(batch)) == len(batch) for batch in batches)


def test_epochs_differ_and_a_seed_repeats_them():
    one, other = ForgetRetainSampler(FLAGS, 1, 3, seed=7), ForgetRetainSampler(FLAGS, 1, 3, seed=7)
    first, second = list(one), list(one)
    assert first != second
    assert [first, second] == [list(other), list(other)]
    assert list(ForgetRetainSampler(FLAGS, 1, 3, seed=8)) != first
    one.set_epoch(0)
    assert list(one) == first


def test_the_smaller_group_is_used_evenly():
    counts = Counter(i for batch in ForgetRetainSampler(FLAGS, 2, 2) for i in batch if FLAGS[i])
    assert set(counts.values()) == {4}


def test_an_epochs_length_can_follow_the_forget_set_alone():
    few = ForgetRetainSampler(FLAGS, 2, 2, retain_per_forget=1)
    many = ForgetRetainSampler([*FLAGS, *[False] * 1000], 2, 2, retain_per_forget=1)
    assert len(few) == len(many) == 2
    assert len(ForgetRetainSampler([*FLAGS, *[False] * 1000], 2, 2)) == 508


@pytest.mark.parametrize("order", ["mixed", "sequential"])
@pytest.mark.parametrize("ratio", [0.5, 1, 2, 3, 5])
def test_an_epoch_shows_so_many_to_keep_for_each_to_forget_and_no_more(order, ratio):
    flags = [i < 8 for i in range(200)]
    shown = [i for batch in ForgetRetainSampler(flags, 4, 16, order, retain_per_forget=ratio) for i in batch]
    assert sum(not flags[i] for i in shown) == 8 * ratio and set(range(8)) <= set(shown)


@pytest.mark.parametrize("order", ORDERS)
def test_all_kept_are_shown_before_one_is_shown_again(order):
    flags = [i < 4 for i in range(27)]  # 23 to keep, 8 in an epoch: three epochs show one of them twice
    sampler = ForgetRetainSampler(flags, 2, 4, order, retain_per_forget=2)
    epochs = [{i for batch in sampler for i in batch if not flags[i]} for _ in range(6)]
    assert all(len(shown) == 8 for shown in epochs)
    for start in range(4):
        assert set.union(*epochs[start : start + 3]) == set(range(4, 27))
    assert len(set(map(frozenset, epochs))) == 6
    sampler.set_epoch(4)  # as a run that goes on
    assert {i for batch in sampler for i in batch if not flags[i]} == epochs[4]
    other = ForgetRetainSampler(flags, 2, 4, order, retain_per_forget=2, seed=1)
    assert {i for batch in other for i in batch if not flags[i]} != epochs[0]


def test_one_group_alone_is_possible():
    assert sides(ForgetRetainSampler(FLAGS, 0, 8)) == [(0, 8), (0, 8)]
    assert sides(ForgetRetainSampler(FLAGS, 2, 0)) == [(2, 0), (2, 0)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_ranks_share_the_batches_of_one(order, ranks, number):
    flags = [i < number for i in range(20)]
    whole = list(ForgetRetainSampler(flags, 2, 5, order, rank=0, num_ranks=1))
    shares = [list(ForgetRetainSampler(flags, 2, 5, order, rank=r, num_ranks=ranks)) for r in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(i for part in parts for i in part if i >= 0) == sorted(batch)
        assert {i for part in parts for i in part if i < 0} <= {~i for i in batch}
        for flag in (True, False):  # as many forward passes of either kind on every rank
            assert len({sum(flags[max(i, ~i)] == flag for i in part) for part in parts}) == 1


def test_what_an_epoch_shows_is_known_beforehand():
    sampler = ForgetRetainSampler(FLAGS, 1, 2, retain_per_forget=1)
    expected = set()
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        expected |= {i for batch in sampler for i in batch}
    sampler.set_epoch(0)
    assert sampler.shown(2) == sorted(expected) and len(expected) < len(FLAGS)
    assert sampler.epoch == 0
    shares = [ForgetRetainSampler(FLAGS, 1, 2, retain_per_forget=1, rank=r, num_ranks=2) for r in (0, 1)]
    assert shares[0].shown(2) == shares[1].shown(2) == sorted(expected)


def test_what_an_epoch_shows_on_one_rank_is_known_beforehand():
    """A stand-in is the sample whose place it takes."""
    flags = [True] * 3 + [False] * 8
    samplers = [ForgetRetainSampler(flags, 3, 4, rank=rank, num_ranks=2) for rank in (0, 1)]
    expected: list[set[int]] = []
    for sampler in samplers:
        sampler.set_epoch(1)
        expected.append({max(i, ~i) for batch in sampler for i in batch})
    for sampler in samplers:
        assert [set(sampler.shown(1, rank)) for rank in (0, 1)] == expected
    assert expected[0] | expected[1] == set(range(len(flags))) and expected[0] != expected[1]


def test_a_stand_in_has_no_label():
    def ones(item):
        return {"image": torch.ones(1, 2), "label": torch.ones(1, 2)}

    labels = {"forget_label": {("a", "b"): torch.zeros(1, 2)}}
    data = MemoryDataset([{"image": "a", "label": "b"}], ones, targets=labels)
    assert data[~0]["image"].tolist() == data[0]["image"].tolist()
    assert (data[~0]["label"] == -1).all() and (data[~0]["forget_label"] == -1).all()
    assert (data[0]["label"] == 1).all()


def crops(samples=2):
    return RandSpatialCropSamplesd(["image", "label"], roi_size=(4, 4), num_samples=samples, random_size=False)


def test_views_are_drawn_once_and_chosen_by_the_epochs_seed():
    def ramp(item):
        return {"image": torch.arange(256.0).reshape(1, 16, 16), "label": torch.zeros(1, 16, 16)}

    items = [{"image": name, "label": "m"} for name in "ab"]
    data = MemoryDataset(items, ramp, random_transform=crops(), views=3)
    drawn = [[patch["image"] for patch in data.view(0, view)] for view in range(3)]
    again = MemoryDataset(items[::-1], ramp, random_transform=crops(), views=3)
    for view in range(3):
        torch.testing.assert_close([patch["image"] for patch in again.view(1, view)], drawn[view])
    assert len({float(view[0].sum()) for view in drawn}) > 1
    for _ in range(5):
        found = [patch["image"] for patch in data[0]]
        assert any(all(torch.equal(a, b) for a, b in zip(found, view)) for view in drawn)
    first = [float(data.set_random_state(s)[0][0]["image"].sum()) for s in range(8)]
    assert first == [float(data.set_random_state(s)[0][0]["image"].sum()) for s in range(8)] and len(set(first)) > 1
    with pytest.raises(ValueError, match="need a random transform"):
        MemoryDataset(items, ramp, views=3)
    with pytest.raises(ValueError, match="a number above 0"):
        MemoryDataset(items, ramp, random_transform=crops(), views=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "shuffled"}, "order must be one of"),
        ({"num_forget": -1}, "must not be negative"),
        ({"num_forget": 0, "num_retain": 0}, "nor both 0"),
        ({"forget": [False] * 3}, "num_forget is 1, but the dataset has 0"),
        ({"forget": [True] * 3}, "num_retain is 1, but the dataset has 0"),
        ({"rank": 2, "num_ranks": 2}, "rank must lie in"),
    ],
)
def test_a_sampler_that_could_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ForgetRetainSampler(**{"forget": FLAGS, "num_forget": 1, "num_retain": 1, **arguments})


def test_zeros_and_ones_mean_flags_and_not_indices():
    assert list(ForgetRetainSampler([0, 1, 0], 1, 2)) == list(ForgetRetainSampler([False, True, False], 1, 2))


def test_a_flag_comes_from_the_item_or_from_the_file_name():
    mark = MarkForgetd(ids=["ISIC_1", 7])
    assert mark({"image": "/x/ISIC_1.jpg"})["forget"]
    assert mark({"image": "/x/7.nii.gz"})["forget"]
    assert not mark({"image": "/x/ISIC_11.jpg"})["forget"]
    assert not mark({"image": "/x/ISIC_1.jpg", "forget": False})["forget"]


def test_check_mask_names_the_file():
    image, mask = torch.zeros(3, 4, 4), torch.ones(1, 4, 4)
    with pytest.raises(DataError, match="label: the mask looks full"):
        CheckMaskd()({"image": image, "label": mask})
    mask[0, :, 0] = mask[0, 0] = 0
    assert CheckMaskd()({"image": image, "label": mask})["label"] is mask


class Counting:
    calls = 0

    def __call__(self, item):
        self.calls += 1
        return {"image": torch.full((3, 4, 4), float(item["image"])), "label": torch.zeros(1, 4, 4), "note": "text"}


ITEMS = [{"image": str(i), "label": "m", "forget": i == 1} for i in range(4)]


def test_each_item_is_transformed_once_for_all_datasets():
    transform, store = Counting(), {}
    one = MemoryDataset(ITEMS, transform, store, extra=["forget"])
    other = MemoryDataset(ITEMS[:2], transform, store)
    for _ in range(2):
        assert [row["forget"] for row in (one[i] for i in range(4))] == [False, True, False, False]
        assert "forget" not in other[1] and "note" not in other[1]
    assert transform.calls == 4
    assert one.forget == [False, True, False, False]


def test_a_target_that_an_item_lacks_is_not_a_number():
    key = ("1", "m")
    dataset = MemoryDataset(ITEMS, Counting(), targets={"teacher": {key: torch.ones(1, 4, 4)}})
    assert (dataset[1]["teacher"] == 1).all() and dataset[0]["teacher"].isnan().all()
    batch = next(iter(DataLoader(dataset, batch_size=4, num_workers=0)))
    assert batch["teacher"].shape == (4, 1, 4, 4)


def test_the_digest_sees_items_flags_targets_and_order():
    def digest(items=ITEMS, **kwargs):
        return MemoryDataset(items, Counting(), **{"extra": ["forget"], **kwargs}).digest()

    assert digest() == digest()
    others = [
        digest(ITEMS[::-1]),
        digest(ITEMS[:3]),
        digest([{**item, "sha256": "x"} for item in ITEMS]),
        digest([{**item, "forget": True} for item in ITEMS]),
        digest(targets={"teacher": {("1", "m"): torch.ones(1)}}),
    ]
    assert len({digest(), *others}) == 6


def test_cached_outputs_equal_the_networks_own_and_leave_it_alone():
    network = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.Dropout(0.5)).train()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    dataset = MemoryDataset(ITEMS, Counting())
    outputs = cache_outputs(network, dataset, batch_size=3, post=torch.sigmoid)
    assert [module.training for module in network] == [True, False, True]
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    network.eval()
    for i, item in enumerate(ITEMS):
        expected = network(dataset[i]["image"][None])[0].sigmoid()
        torch.testing.assert_close(outputs[(item["image"], "m")], expected, rtol=0, atol=1e-6)


def test_patches_show_the_same_place_of_image_label_and_targets():
    def grid(item):
        place = torch.arange(100.0).view(1, 10, 10)
        return {"image": place, "label": place + 1}

    items = [{"image": str(n), "label": "m", "forget": n == 0} for n in range(3)]
    crop = RandSpatialCropSamplesd(
        keys=["image", "label", "teacher", "other"], roi_size=(4, 4), num_samples=5, random_size=False,
        allow_missing_keys=True,
    )  # fmt: skip
    teacher = {(str(n), "m"): torch.arange(100.0).view(1, 10, 10) + 2 for n in range(3)}
    data = MemoryDataset(items, grid, extra=["forget"], targets={"teacher": teacher}, random_transform=crop)
    batch = next(iter(DataLoader(data, batch_size=3, num_workers=0)))
    assert batch["image"].shape == (15, 1, 4, 4) and type(batch["image"]) is torch.Tensor
    assert torch.equal(batch["label"], batch["image"] + 1) and torch.equal(batch["teacher"], batch["image"] + 2)
    assert batch["forget"].tolist() == [True] * 5 + [False] * 10
    assert len({tuple(patch.flatten().tolist()) for patch in batch["image"]}) > 1
    one, other = (torch.stack([p["image"] for p in data.set_random_state(7)[1]]) for _ in range(2))
    assert torch.equal(one, other)
    assert MemoryDataset(items, grid).set_random_state(1)[0]["image"].shape == (1, 10, 10)


def test_a_class_becomes_probabilities():
    assert OneHotd(number=3)({"label": 1})["label"].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"does not lie in \[0, 3\)"):
        OneHotd(number=3)({"label": 3})


def test_the_field_of_view_becomes_an_item():
    image = torch.zeros(3, 20, 24)
    image[:, 4:16, 5:19] = 0.5
    region = FieldOfViewd()({"image": image})["region"]
    assert region.shape == (1, 20, 24) and region.dtype == torch.bool
    assert region[0, 5:15, 6:18].all() and not region[0, 0].any()
