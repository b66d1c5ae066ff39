# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from monai.transforms import Affine, Compose, Flip, RandFlip, ScaleIntensity
from torch import nn

from monai_unlearn.checkpoint import CheckpointError
from monai_unlearn.relabel import (
    LabelStore,
    fit_calibration,
    keep_label,
    probabilities,
    random_labels,
    to_background,
    to_blend,
    to_out_of_fold,
    to_random_class,
    to_random_label,
    to_reference,
    to_uniform,
    without_class,
)
from monai_unlearn.request import item_id

SHAPES = [(2, 1, 4, 4), (2, 3, 4, 4), (2, 4, 3, 3, 3), (2, 5)]


@pytest.mark.parametrize("relabel", [keep_label, to_background, to_uniform])
@pytest.mark.parametrize("shape", SHAPES)
def test_labels_keep_their_shape_and_hold_probabilities(relabel, shape):
    label = torch.rand(shape).softmax(1) if shape[1] > 1 else torch.rand(shape)
    before = label.clone()
    new = relabel(torch.rand(2, 3, *shape[2:]), label)
    assert new.shape == label.shape and new is not label
    assert ((new >= 0) & (new <= 1)).all()
    if shape[1] > 1:
        torch.testing.assert_close(new.sum(1), torch.ones_like(new.sum(1)))
    torch.testing.assert_close(label, before, rtol=0, atol=0)


def test_background_is_channel_zero_or_nothing():
    assert to_background(None, torch.ones(1, 1, 2)).sum() == 0
    assert to_background(None, torch.full((1, 3, 2), 1 / 3))[0, :, 0].tolist() == [1, 0, 0]


def test_uniform_is_one_over_the_classes():
    assert to_uniform(None, torch.ones(1, 4))[0].tolist() == [0.25] * 4
    assert to_uniform(None, torch.ones(1, 1)).item() == 0.5


ITEMS = [{"image": f"{i}.jpg", "cls": i % 3} for i in range(300)]


def test_random_classes_are_wrong_fixed_per_sample_and_even():
    drawn = random_labels(ITEMS, 3, "cls", seed=1)
    assert all(new != item["cls"] and 0 <= new < 3 for new, item in zip(drawn, ITEMS))
    assert random_labels(ITEMS[::-1], 3, "cls", seed=1) == drawn[::-1]
    assert random_labels(ITEMS[7:8], 3, "cls", seed=1) == drawn[7:8]
    assert random_labels(ITEMS, 3, "cls", seed=2) != drawn
    shifts = [(new - item["cls"]) % 3 for new, item in zip(drawn, ITEMS)]
    assert 110 < shifts.count(1) < 190
    with pytest.raises(ValueError, match="at least two classes"):
        random_labels(ITEMS, 1, "cls")
    with pytest.raises(ValueError, match=r"\[0, 2\), got 2"):
        random_labels(ITEMS, 2, "cls")


def test_random_masks_come_from_retained_items_and_stay():
    donors = ITEMS[100:]
    drawn = to_random_label(ITEMS[:100], donors, seed=0)
    assert set(drawn) == {str(i) for i in range(100)}
    assert all(donor in donors for donor in drawn.values())
    assert to_random_label(ITEMS[5:6], donors[::-1], seed=0)["5"] == drawn["5"]
    with pytest.raises(ValueError, match="there are none"):
        to_random_label(ITEMS[:1], [])


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, image):
        return self.value.expand(len(image), 1, *image.shape[2:])


def test_a_reference_says_the_mean_of_its_models_probabilities():
    image, label = torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    new = to_reference([Constant(2.0), Constant(-1.0)])(image, label)
    expected = (torch.tensor(2.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2
    torch.testing.assert_close(new, torch.full_like(label, expected))
    soft = to_reference(Constant(2.0), temperature=4.0)(image, label)
    torch.testing.assert_close(soft, torch.full_like(label, torch.tensor(0.5).sigmoid()))
    assert not new.requires_grad


def test_a_reference_is_frozen():
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    to_reference(network)(torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4))
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="at least one"):
        to_reference([])
    with pytest.raises(ValueError, match="temperature must be positive"):
        to_reference(network, temperature=0)


def test_probabilities_are_sigmoid_or_softmax():
    logits = torch.randn(2, 3, 4)
    torch.testing.assert_close(probabilities(logits), logits.softmax(1))
    torch.testing.assert_close(probabilities(logits[:, :1]), logits[:, :1].sigmoid())


def test_without_a_class_the_others_share_its_probability():
    logits = torch.randn(3, 5)
    label = torch.zeros(3, 5)
    found = without_class(nn.Identity(), [1, 4])(logits, label)
    left = logits[:, [0, 2, 3]].softmax(1)
    torch.testing.assert_close(found[:, [0, 2, 3]], left)
    assert (found[:, [1, 4]] == 0).all()
    for wrong in ([0, 1, 2, 3, 4], [7]):
        with pytest.raises(ValueError, match="must be some, not all"):
            without_class(nn.Identity(), wrong)(logits, label)


def test_random_classes_come_as_relabelled_items():
    items = [{"image": f"{n}.jpg", "label": n % 3} for n in range(30)]
    found = to_random_class(items, 3, seed=1)
    assert all(found[item_id(item)]["label"] != item["label"] for item in items)
    assert found == to_random_class(items[::-1], 3, seed=1)


def test_a_reference_may_look_through_a_window():
    network = nn.Conv2d(3, 1, 3, padding=1)
    image = torch.rand(1, 3, 10, 14)
    seen = []
    inferer = lambda inputs, net: (seen.append(net), net(inputs))[1]  # noqa: E731
    torch.testing.assert_close(
        to_reference(network, inferer=inferer)(image, image[:, :1]), to_reference(network)(image, image[:, :1])
    )
    assert seen == [network]


def test_a_reference_may_be_asked_about_mirrored_views_whose_answers_are_mirrored_back():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 3, padding=1)
    image, label = torch.rand(2, 3, 6, 9), torch.zeros(2, 2, 6, 9)
    views = to_reference(network, temperature=2.0, views=[Flip(0), Flip(1), Flip([0, 1])])
    found, expected = views(image, label), torch.zeros_like(label)
    for up, left in ((True, False), (False, True), (True, True)):
        weight = network.weight.flip([2] * up + [3] * left)  # a mirrored kernel on the image as it is
        said = nn.functional.conv2d(image, weight, network.bias, padding=1)
        expected += said.softmax(1).detach() / 3
    expected = expected.sqrt() / expected.sqrt().sum(1, keepdim=True)  # at temperature 2
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, to_reference(network, temperature=2.0)(image, label), atol=1e-3)
    assert views.report()["passes"] == 6 and type(found) is torch.Tensor


def test_the_mean_over_views_is_calibrated_on_the_mean_over_the_same_views_of_unseen_cases():
    """Answers that differ from view to view come out hedged, which the calibration takes back."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(-4, 4, 8)
    original, sided = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    original.forward = lambda image: 3 * image
    sided.forward = lambda image: 3 * image + slope  # says more to the right
    unseen = [{"image": torch.randn(1, 8, 8, generator=generator)} for _ in range(20)]
    relabel = to_reference(sided, original=original, unseen=unseen, views=[Flip(0), Flip(1)])
    mean = lambda image: ((3 * image + slope).sigmoid() + (3 * image - slope).sigmoid()).div(2).logit()  # noqa: E731
    images = torch.stack([case["image"] for case in unseen])
    expected = fit_calibration(mean(images), 3 * images)
    assert relabel.calibrations[0].scale == pytest.approx(expected.scale, rel=1e-3) and expected.scale > 1.2
    assert relabel.report()["passes"] == 20 * 3
    image = torch.randn(2, 1, 8, 8, generator=generator)
    torch.testing.assert_close(relabel(image, image), expected(mean(image)).sigmoid(), atol=1e-3, rtol=0)


def test_shifted_volumes_are_shifted_back():
    """A network that adds up a voxel and its neighbour answers alike wherever the volume lies."""
    network = nn.Conv3d(1, 1, (1, 1, 2), padding=0, bias=False)
    image = torch.zeros(1, 1, 8, 8, 9)
    image[..., 3:5, 3:5, 3:5] = torch.rand(2, 2, 2)
    label = torch.zeros_like(image)
    network.forward = lambda image: nn.functional.pad(image[..., 1:] + image[..., :-1], (0, 1))
    shifted = to_reference(network, views=[Affine(translate_params=(1, -1, 2), padding_mode="zeros", image_only=True)])
    torch.testing.assert_close(shifted(image, label), to_reference(network)(image, label), atol=1e-4, rtol=0)


@pytest.mark.parametrize("move", [{"rotate_params": 0.8}, {"scale_params": [1.2, 1.2]}, {"scale_params": [0.83, 0.83]}])
def test_turned_and_scaled_pictures_are_turned_and_scaled_back(move):
    """A network of single pixels answers alike wherever they lie; the picture is smooth and ends before its frame."""
    rows, columns = torch.meshgrid(torch.linspace(-3, 3, 48), torch.linspace(-4, 4, 64), indexing="ij")
    image = torch.exp(-2 * ((rows - 0.5) ** 2 + (columns + 0.8) ** 2))[None, None]
    network = nn.Identity()
    network.forward = lambda image: 4 * image - 2
    seen = Affine(**move, padding_mode="border", image_only=True)
    found = to_reference(network, views=[seen])(image, image)
    torch.testing.assert_close(found, network.forward(image).sigmoid(), atol=0.02, rtol=0)
    assert not torch.allclose(seen(image[0]).as_tensor(), image[0], atol=0.1)


def test_views_of_a_batch_are_the_views_of_its_samples():
    network = nn.Conv2d(3, 2, 3, padding=1)
    image, label = torch.rand(3, 3, 12, 16), torch.zeros(3, 2, 12, 16)
    views = to_reference(network, views=[Affine(rotate_params=0.4, image_only=True), Flip(1)], beyond=0.5)
    alone = torch.cat([views(image[[index]], label[[index]]) for index in range(3)])
    torch.testing.assert_close(views(image, label), alone)


def test_the_views_of_a_classifier_are_not_mapped_back():
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    image = torch.rand(2, 1, 5, 6, 7)
    expected = (network(image.flip(2)).softmax(1) + network(image.flip(3, 4)).softmax(1)) / 2
    found = to_reference(network, views=[Flip(0), Flip([1, 2])])(image, torch.zeros(2, 4))
    torch.testing.assert_close(found, expected.detach())


def test_a_view_that_cannot_be_mapped_back_or_is_drawn_at_random_is_refused():
    with pytest.raises(ValueError, match="can be inverted"):
        to_reference(nn.Identity(), views=[ScaleIntensity()])
    for view in (RandFlip(prob=1), Compose([Flip(0), RandFlip(prob=1)])):
        with pytest.raises(ValueError, match="drawn at random"):
            to_reference(nn.Identity(), views=[view])
    assert to_reference(nn.Identity(), views=[Compose([Flip(0), Flip(1)])]).views


def test_views_pooled_by_logits_give_the_geometric_mean():
    torch.manual_seed(0)
    for channels in (1, 3):
        network = nn.Conv2d(2, channels, 3, padding=1)
        image, label = 3 * torch.rand(2, 2, 6, 9), torch.zeros(2, channels, 6, 9)
        found = to_reference(network, views=[Flip(0), Flip(1)], pool="logits")(image, label)
        said = [probabilities(network(image.flip(2)).flip(2)), probabilities(network(image.flip(3)).flip(3))]
        both = [torch.cat([one, 1 - one], 1) if channels == 1 else one for one in said]
        geometric = (both[0] * both[1]).sqrt()
        expected = (geometric / geometric.sum(1, keepdim=True))[:, :channels]
        torch.testing.assert_close(found, expected.detach())
        assert not torch.allclose(found, (said[0] + said[1]) / 2, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_beyond_the_views_the_rest_of_the_memory_is_taken_off(channels):
    """Views that keep a third of what is remembered give the network that remembers nothing at beyond = ½."""
    torch.manual_seed(0)
    known, remembered, knowledge = torch.rand(1, 2, 6, 9), torch.randn(channels, 6, 9), nn.Conv2d(2, channels, 1)
    network = nn.Identity()
    network.forward = lambda image: (
        knowledge(image) + (remembered if torch.equal(image, known) else remembered.flip(1) / 3)
    )
    label = torch.zeros(1, channels, 6, 9)
    beyond = to_reference(network, views=[Flip(0)], beyond=0.5)
    torch.testing.assert_close(beyond(known, label), probabilities(knowledge(known)).detach())
    assert beyond.report()["passes"] == 2
    views = to_reference(network, views=[Flip(0)])(known, label)
    assert not torch.allclose(views, probabilities(knowledge(known)), atol=0.02)


def test_a_pool_that_is_not_known_and_a_step_beyond_nothing_are_refused():
    with pytest.raises(ValueError, match="pooled by probabilities or logits"):
        to_reference(nn.Identity(), views=[Flip(0)], pool="median")
    for wrong in ({"beyond": 0.3}, {"beyond": -1, "views": [Flip(0)]}, {"beyond": math.nan, "views": [Flip(0)]}):
        with pytest.raises(ValueError, match="0 without views"):
            to_reference(nn.Identity(), **wrong)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_blend_is_the_weighted_geometric_mean(channels):
    torch.manual_seed(0)
    networks = [nn.Conv2d(2, channels, 1) for _ in range(3)]
    weights, image, label = [0.5, 0.2, 0.3], 3 * torch.rand(2, 2, 5, 6), torch.zeros(2, channels, 5, 6)
    found = to_blend([to_reference(one) for one in networks], weights)(image, label)
    said = [probabilities(one(image)).detach() for one in networks]
    both = [torch.cat([one, 1 - one], 1) if channels == 1 else one for one in said]
    geometric = torch.stack([one**weight for one, weight in zip(both, weights)]).prod(0)
    torch.testing.assert_close(found, (geometric / geometric.sum(1, keepdim=True))[:, :channels])
    assert not torch.allclose(found, sum(weight * one for one, weight in zip(said, weights)), atol=1e-3)


def test_a_blend_of_a_step_beyond_the_views_is_a_step_beyond_the_blend():
    """z + b (z − z_sample) with z = (1 − w) z_views + w z_reference is a blend of weight (1 + b) w."""
    torch.manual_seed(0)
    network, reference = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
    image, w, b = torch.rand(1, 1, 6, 6), 0.3, 0.2
    weight = (1 + b) * w
    views = to_reference(network, views=[Flip(0)], pool="logits", beyond=b / (1 - weight))
    found = to_blend([views, to_reference(reference)], [1 - weight, weight])(image, image)
    z = (1 - w) * network(image.flip(2)).flip(2) + w * reference(image)
    torch.testing.assert_close(found, (z + b * (z - network(image))).sigmoid().detach())


def test_a_blend_asks_each_items_own_model_and_counts_every_pass():
    networks = {fold: nn.Conv2d(1, 1, 1) for fold in "01"}
    own, folds = nn.Conv2d(1, 1, 1), to_out_of_fold(networks)
    blend, image = to_blend([to_reference(own, views=[Flip(0), Flip(1)]), folds], [0.5, 0.5]), torch.rand(3, 1, 4, 4)
    for fold, network in networks.items():
        found = blend.of({"fold": fold})(image, image)
        torch.testing.assert_close(found, ((own(image) + network(image)) / 2).sigmoid().detach())
        assert blend.of({"fold": fold}) is blend.of({"fold": fold})
    assert blend.of({"fold": "0"}) is not blend.of({"fold": "1"})
    assert blend.report() == {"passes": 2 * 3 * (2 + 1)}
    calibrated = to_reference(own, original=networks["0"], unseen=[{"image": image[0]}])
    assert len(to_blend([calibrated, to_reference(own)], [0.5, 0.5]).report()["calibration"]) == 1


def test_weights_that_do_not_fit_and_relabels_that_leave_samples_out_are_refused():
    for weights in ([1.0], [0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="positive weights with sum 1"):
            to_blend([keep_label, to_uniform], weights)
    with pytest.raises(ValueError, match="leaves samples out"):
        to_blend([keep_label, to_uniform], [0.5, 0.5])(torch.rand(1, 1, 2, 2), -torch.ones(1, 1, 2, 2))


# kept labels ----------------------------------------------------------------------------------------------------------


def test_kept_labels_come_back_for_the_same_network_search_and_data_only(tmp_path):
    store, network = LabelStore(tmp_path, b"k" * 32), nn.Linear(2, 3)
    items = [{"image": f"/data/patient_{i}.png", "image_id": f"patient_{i}"} for i in range(3)]
    samples = list(zip(items, "abc"))
    labels = list(torch.rand(3, 4))
    description = store.describe(network, {"epsilon": 0.1}, samples)
    assert store.load(description, items) is None
    store.save(description, items, labels, {"passes": 7})
    kept, report = store.load(description, items[::-1])
    assert report == {"passes": 7} and all(torch.equal(a, b) for a, b in zip(kept, labels[::-1]))
    assert b"patient" not in store.path(description).read_bytes()
    assert tmp_path.stat().st_mode & 0o077 == 0 and store.path(description).stat().st_mode & 0o077 == 0
    for other in (
        store.describe(nn.Linear(2, 3), {"epsilon": 0.1}, samples),
        store.describe(network, {"epsilon": 0.2}, samples),
        store.describe(network, {"epsilon": 0.1}, list(zip(items, "abd"))),
        store.describe(network, {"epsilon": 0.1}, samples[:2]),
        LabelStore(tmp_path, b"q" * 32).describe(network, {"epsilon": 0.1}, samples),
    ):
        assert store.load(other, items) is None  # another file
        store.path(description).rename(tmp_path / "aside")
        (tmp_path / "aside").rename(store.path(other))
        with pytest.raises(CheckpointError, match="another network, search or data"):
            store.load(other, items)
        store.path(other).rename(store.path(description))


def test_kept_labels_that_changed_are_refused(tmp_path):
    store, items = LabelStore(tmp_path, b"k" * 32), [{"image": "a.png"}]
    description = store.describe(nn.Linear(1, 1), {}, [(items[0], "a")])
    store.save(description, items, [torch.tensor([0.25])], {})
    path = store.path(description)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed since it was written"):
        store.load(description, items)


@pytest.mark.parametrize("shape", [(60, 1), (40, 4), (6, 1, 8, 8), (4, 3, 5, 5, 5)])
def test_calibration_finds_the_map_between_two_models(shape):
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, shape[1]) - (0.5 if shape[1] == 1 else 0)
    shift = bias.reshape(1, -1, *[1] * (len(shape) - 2))
    found = fit_calibration(logits, 1.7 * logits + shift)
    assert found.scale == pytest.approx(1.7, abs=1e-3)
    torch.testing.assert_close(probabilities(found(logits)), probabilities(1.7 * logits + shift), atol=1e-3, rtol=0)
    same = fit_calibration(logits, logits)
    assert same.scale == pytest.approx(1, abs=1e-3) and same.bias.abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(60, 1), (60, 9), (4, 1, 8, 8), (4, 3, 8, 8)])
@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7, 30.0])
def test_a_calibration_by_certainty_finds_the_scale_even_between_models_that_disagree(shape, factor):
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = -logits if shape[1] == 1 else logits.roll(1, 1)  # as certain, and of another class
    found = fit_calibration(logits, factor * turned, match="certainty")
    assert found.scale == pytest.approx(factor, rel=1e-4) and not found.bias.any()
    wanted, mapped = (-(p * p.clamp_min(1e-300).log()).sum() for p in
                      (probabilities((factor * turned).double()), probabilities(found(logits.double()))))  # fmt: skip
    if shape[1] > 1:
        assert float(mapped) == pytest.approx(float(wanted), rel=1e-4)


def test_a_calibration_by_certainty_makes_no_certain_answers_of_nothing(caplog):
    certain = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    for nothing in (torch.zeros(2, 2), 1e-3 * certain):
        caplog.clear()
        assert fit_calibration(nothing, certain, match="certainty").scale == 0 and "train it longer" in caplog.text
    caplog.clear()
    assert fit_calibration(certain / 40, certain, match="certainty").scale == pytest.approx(40, rel=1e-4)
    assert not caplog.text
    with pytest.raises(ValueError, match="probabilities or certainty"):
        fit_calibration(certain, certain, match="labels")


def test_a_reference_that_says_nothing_gives_the_originals_mean_and_that_is_said(caplog):
    logits = torch.linspace(-2, 2, 30).reshape(30, 1)
    found = fit_calibration(logits, 1 - logits)
    assert found.scale == 0 and "train it longer" in caplog.text
    assert found.bias.sigmoid().item() == pytest.approx((1 - logits).sigmoid().mean().item(), abs=1e-3)
    with pytest.raises(ValueError, match="differ in shape"):
        fit_calibration(logits, logits[:3])


class Scaled(nn.Module):
    """Says a multiple of the image's first channel, plus something."""

    def __init__(self, scale, bias=0.0):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(scale)), bias

    def forward(self, image):
        return self.scale * image[:, :1] + self.bias


def test_a_reference_is_calibrated_towards_the_original_on_unseen_cases_without_their_labels():
    generator = torch.Generator().manual_seed(0)
    unseen = [{"image": torch.randn(3, 4, 4, generator=generator)} for _ in range(10)]
    image, label = torch.randn(2, 3, 4, 4, generator=generator), torch.zeros(2, 1, 4, 4)
    original, short = Scaled(3.0), Scaled(1.0, bias=0.5)
    relabel = to_reference(short, original=original, unseen=unseen, limit=5)
    torch.testing.assert_close(relabel(image, label), original(image).sigmoid().detach(), atol=1e-3, rtol=0)
    assert relabel.report()["passes"] == 2 * 5 + 2  # two models on every second unseen case, and the two samples
    assert relabel.report()["calibration"][0]["scale"] == pytest.approx(3, abs=1e-2)
    torch.testing.assert_close(to_reference(short)(image, label), short(image).sigmoid().detach())
    assert "calibration" not in to_reference(short).report()
    with pytest.raises(ValueError, match="needs both"):
        to_reference(short, original=original)
    with pytest.raises(ValueError, match="there are no cases"):
        to_reference(short, original=original, unseen=[])
