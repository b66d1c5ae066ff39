# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai_unlearn import (
    BoundaryMargin,
    BoundaryRelabel,
    DenseBoundaryRelabel,
    InputDomain,
    LegacyBoundary,
    PerturbedSignGradient,
)
from monai_unlearn.boundary import LEFT_OUT, ROUTES, _Walk, draw_noise

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
QUIET = {"noise": 0.0, "domain": InputDomain.unbounded()}


class Affine(nn.Module):
    """Logits W·x + b of the flattened image."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32))
        self.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float32))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class Voxelwise(nn.Module):
    """The same affine map at every voxel."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def forward(self, x):
        return torch.einsum("kc,bc...->bk...", self.weight, x) + self.bias.view(1, -1, *[1] * (x.ndim - 2))


def classes(own, number):
    return F.one_hot(torch.as_tensor(own), number).float()


def convolutional(channels=3, dims=2, number=4, seed=0):
    torch.manual_seed(seed)
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    pool = nn.AdaptiveAvgPool2d(2) if dims == 2 else nn.AdaptiveAvgPool3d(2)
    return nn.Sequential(
        conv(channels, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Dropout(0.3), pool, nn.Flatten(), nn.LazyLinear(number)
    )


def ready(network, image):
    """Lazy layers made, and the classes balanced, so that samples lie at various distances from the boundary."""
    with torch.no_grad():
        network.eval()(image)
        network[-1].weight.mul_(8)
        network[-1].bias -= network(image).mean(0)
    return network


def samples(number=12, channels=3, dims=2, seed=1):
    return torch.rand(number, channels, *[8] * dims, generator=torch.Generator().manual_seed(seed))


# laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.53, 1.9, 3.45])
def test_an_affine_network_is_crossed_after_the_steps_the_margin_takes(margin):
    weight = torch.tensor([0.3, -0.2, 0.5, -0.1])
    network = Affine(torch.stack([weight, torch.zeros(4)]), [margin, 0.0])
    search = PerturbedSignGradient(network, epsilon=10, epsilon_max=10, step=0.1, max_steps=99, **QUIET)
    found = search(torch.zeros(1, 1, 2, 2), classes([0], 2))
    steps = math.ceil(margin / (0.1 * weight.abs().sum().item()))
    assert (found.steps.item(), found.label.item(), ROUTES[found.route.item()]) == (steps, 1, "crossed")
    torch.testing.assert_close(found.point.flatten(), -0.1 * steps * weight.sign())
    torch.testing.assert_close(found.distance, torch.tensor([0.1 * steps]))
    assert search.forwards == steps + 1 and search.backwards == steps


def test_against_a_fixed_rival_the_law_holds_with_three_classes():
    weight = torch.tensor([[0.3, -0.2, 0.5], [-0.4, 0.1, 0.2], [0.9, 0.9, -0.6]])
    network = Affine(weight, [2.07, 0.0, 1.5])
    search = PerturbedSignGradient(network, epsilon=9, epsilon_max=9, step=0.05, max_steps=99, targets=[1], **QUIET)
    found = search(torch.zeros(1, 3, 1, 1), classes([0], 3))
    assert found.steps.item() == math.ceil(2.07 / (0.05 * (weight[0] - weight[1]).abs().sum().item()))
    assert found.label.item() == 1
    free = PerturbedSignGradient(network, epsilon=9, epsilon_max=9, step=0.05, max_steps=99, **QUIET)
    assert free(torch.zeros(1, 3, 1, 1), classes([0], 3)).label.item() == 2  # nearer, and not among the targets


@pytest.mark.parametrize("gamma", [0.05, 0.5, 2.0])
def test_the_mean_sign_of_a_perturbed_gradient_is_the_error_function(gamma):
    number = 20_000
    search = PerturbedSignGradient(nn.Identity(), InputDomain.unbounded(), epsilon=1, step=1, noise=gamma)
    walk = _Walk(search, torch.zeros(number, 4, 1), [str(i) for i in range(number)])
    gradient = torch.tensor([1.0, 0.3, -0.05, 0.0]).view(1, 4, 1) * 7  # its size must not matter
    walk.advance(torch.arange(number), gradient.expand(number, 4, 1))
    expected = torch.erf(torch.tensor([1.0, 0.3, -0.05, 0.0]) / (math.sqrt(2) * gamma))
    torch.testing.assert_close(walk.at.mean(0).flatten(), expected, rtol=0, atol=4 / math.sqrt(number))


def test_closeness_pulls_back_and_has_no_say_in_the_first_step():
    network = Affine([[0.3, -0.02, 0.5], [0.0, 0.0, 0.0]], [9.0, 0.0])
    moved = []
    for closeness in (0.0, 0.5, 5.0):
        search = PerturbedSignGradient(network, epsilon=1, step=0.25, closeness=closeness, **QUIET)
        walk, rows = _Walk(search, torch.zeros(1, 3, 1), None), torch.tensor([0])
        gradient = torch.tensor([-0.3, 0.02, -0.5]).view(1, 3, 1)
        sizes = []
        for _ in range(4):
            walk.advance(rows, gradient)
            sizes.append(walk.at.abs().flatten())
        moved.append(torch.stack(sizes))
    assert torch.equal(moved[0][0], moved[1][0]) and torch.equal(moved[0][0], moved[2][0])
    assert (moved[1] <= moved[0]).all() and (moved[2] <= moved[1]).all()
    assert (moved[1][3] < moved[0][3]).any()


@pytest.mark.parametrize("domain", [InputDomain.unit(), InputDomain.normalised(*IMAGENET)])
def test_boundary_shrink_is_one_step_of_fgsm_bit_for_bit(domain):
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in IMAGENET)
    image, low, high, epsilon = samples(), torch.zeros(1), torch.ones(1), 0.02
    if domain != InputDomain.unit():
        image, low, high, epsilon = (image - mean) / std, -mean / std, (1 - mean) / std, epsilon / std
    network = ready(convolutional(), image)
    own = network(image).argmax(1)
    leaf = image.clone().requires_grad_()
    F.cross_entropy(network(leaf), own, reduction="sum").backward()
    expected = torch.clamp(image + epsilon * leaf.grad.sign(), low, high)
    network.zero_grad()
    found = PerturbedSignGradient.boundary_shrink(network, domain, 0.02)(image, classes(own, 4))
    crossed = network(expected).argmax(1) != own
    assert 0 < crossed.sum() < len(image)
    assert torch.equal(found.route == 0, crossed)
    torch.testing.assert_close(found.point[crossed], expected[crossed], rtol=0, atol=0)
    assert torch.equal(found.label[crossed], network(expected).argmax(1)[crossed])


def test_epsilon_grows_at_once_when_it_is_used_up():
    network = Affine([[1.0, -1.0], [0.0, 0.0]], [3.1, 0.0])  # crossed at a distance of 1.55
    search = PerturbedSignGradient(network, epsilon=1, step=0.25, max_steps=16, **QUIET)
    found = search(torch.zeros(1, 2, 1), classes([0], 2))
    assert found.steps.item() == 7 and ROUTES[found.route.item()] == "grown"  # none of them wasted
    assert found.distance.item() == pytest.approx(1.75)
    short = PerturbedSignGradient(network, epsilon=1, epsilon_max=1, step=0.25, max_steps=16, **QUIET)
    stays = short(torch.zeros(1, 2, 1), classes([0], 2))
    assert ROUTES[stays.route.item()] == "runner_up" and stays.steps.item() == 16 and stays.distance.item() == 0
    few = PerturbedSignGradient(network, epsilon=1, step=0.25, max_steps=2, **QUIET)
    assert few(torch.zeros(1, 2, 1), classes([0], 2)).steps.item() == 2 + 2 + 2  # at 1, 2 and 4
    # noise that turns steps round leaves room within the last ε, which is used
    wide = PerturbedSignGradient(network, epsilon=1, epsilon_max=2, step=1, max_steps=9, **QUIET)
    assert wide(torch.zeros(1, 2, 1), classes([0], 2)).steps.item() == 2


def imagenet(image, which):
    """ImageNet's means or deviations for as many channels as the image has."""
    numbers = (IMAGENET[which] * 2)[: image.shape[1]]
    return torch.tensor(numbers).view(1, -1, *[1] * (image.ndim - 2))


DOMAINS = [
    (InputDomain.unit(), lambda x: x),
    (InputDomain.normalised((0.5,), (0.25,)), lambda x: (x - 0.5) / 0.25),
    ("imagenet", lambda x: (x - imagenet(x, 0)) / imagenet(x, 1)),
    (InputDomain.window(-100, 300), lambda x: x),
    (InputDomain.sample(), lambda x: (x - x.mean()) / x.std() * (x > 0.2)),
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("domain,make", DOMAINS)
def test_epsilon_and_domain_are_never_exceeded(domain, make, channels, dims):
    image = make(samples(6, channels, dims))
    if domain == "imagenet":
        domain = InputDomain.normalised(*((one * 2)[:channels] for one in IMAGENET))
        assert domain.bounds(image).low.flatten(2)[0, :, 0].tolist() == pytest.approx(
            (-imagenet(image, 0) / imagenet(image, 1)).flatten().tolist()
        )
    network = ready(convolutional(channels, dims), image)
    own = network(image).argmax(1)
    search = PerturbedSignGradient(network, domain, noise=0.3, bisection=2)
    found = search(image, classes(own, 4))
    bounds = domain.bounds(image)
    reach = search.epsilon_max * bounds.unit
    assert ((found.point - image).abs() <= reach * (1 + 1e-5) + 1e-6).all()
    assert (found.point >= bounds.low).all() and (found.point <= bounds.high).all()
    assert (found.distance <= search.epsilon_max * (1 + 1e-5)).all()
    crossed = found.route <= 1
    assert crossed.any()
    assert torch.equal(network(found.point).argmax(1)[crossed], found.label[crossed])
    if domain.nonzero:
        assert torch.equal(found.point[image == 0], image[image == 0])


def test_limits_of_a_sample_are_its_own_quantiles():
    image = torch.randn(2, 2, 6, 6, 6) * torch.tensor([1.0, 50.0]).view(1, 2, 1, 1, 1)
    image[:, :, :3] = 0
    bounds = InputDomain.sample((0.1, 0.9)).bounds(image)
    for row in range(2):
        for channel in range(2):
            values = image[row, channel][image[row, channel] != 0].numpy()
            inside = (image[row, channel] > np.quantile(values, 0.1)) & (image[row, channel] < np.quantile(values, 0.9))
            assert bounds.low[row, channel][inside].unique().item() == pytest.approx(np.quantile(values, 0.1), rel=1e-4)
            assert bounds.high[row, channel][inside].unique().item() == pytest.approx(
                np.quantile(values, 0.9), rel=1e-4
            )
            unit = bounds.unit[row, channel]
            assert unit[image[row, channel] != 0].unique().item() == pytest.approx(values.std(), rel=1e-4)
            assert (unit[image[row, channel] == 0] == 0).all()
    assert torch.isfinite(InputDomain.sample().bounds(torch.zeros(1, 1, 4, 4)).unit).all()


def test_a_window_counts_in_hounsfield_units():
    domain = InputDomain.window(-160, 240)
    assert domain.default_epsilon == pytest.approx(40)
    bounds = domain.bounds(torch.rand(1, 1, 2, 2))
    torch.testing.assert_close(bounds.unit.flatten(), torch.tensor([1 / 400]))
    torch.testing.assert_close((bounds.low.min(), bounds.high.max()), (torch.tensor(0.0), torch.tensor(1.0)))


@pytest.mark.parametrize("kwargs,message", [
    ({"std": 0.0}, "positive"), ({"low": 1.0}, "below high"), ({"quantiles": (0.9, 0.1)}, "in order"),
])  # fmt: skip
def test_impossible_domains_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        InputDomain(**kwargs)


def test_a_domain_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="3 channels and the image 1"):
        InputDomain.normalised(*IMAGENET).bounds(torch.rand(1, 1, 4, 4))


# what a search may not do ---------------------------------------------------------------------------------------------


def test_labels_and_steps_depend_on_neither_batch_size_nor_order():
    image = samples(23)
    network = ready(convolutional(), image)
    label = classes(network(image).argmax(1), 4)
    search = PerturbedSignGradient(network, noise=0.5, epsilon=0.2, step=0.004, max_steps=50)
    whole = search(image, label)
    assert len(whole.steps.unique()) > 4
    for size in (1, 4, 64):
        search.batch_size = size
        other = search(image, label)
        assert torch.equal(other.label, whole.label) and torch.equal(other.steps, whole.steps)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    shuffled = search(image[order], label[order])
    assert torch.equal(shuffled.label, whole.label[order]) and torch.equal(shuffled.steps, whole.steps[order])
    named = search(image, label, ids=[str(i) for i in range(23)])
    assert not torch.equal(named.steps, whole.steps)  # the noise hangs on the ids
    search.seed = 1
    assert not torch.equal(search(image, label).steps, whole.steps)


@pytest.mark.parametrize("training", [True, False])
def test_the_searched_network_and_the_random_state_stay_as_they_were(training):
    image = samples()
    network = ready(convolutional(), image).train(training)
    network[0].weight.requires_grad_(False)
    network[3].eval()
    network[-1].weight.grad = torch.ones_like(network[-1].weight)
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    flags, state = [p.requires_grad for p in network.parameters()], torch.get_rng_state()
    source = image.clone()
    with torch.no_grad():  # as within a trainer's relabelling
        PerturbedSignGradient(network)(image, classes([0] * 12, 4))
    torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(image, source)
    assert network[0].weight.grad is None and torch.equal(network[-1].weight.grad, torch.ones(4, 32))


@pytest.mark.parametrize("options", [
    {}, {"max_steps": 0}, {"epsilon": 1e-4}, {"residue": "drop", "epsilon": 1e-3, "step": 1e-3},
    {"misclassified": "drop"}, {"misclassified": "search"}, {"ascent": "cross_entropy"}, {"noise": 3.0},
    {"noise_kind": "cauchy"}, {"targets": [0, 2, 3]}, {"bisection": 5},
])  # fmt: skip
def test_no_sample_gets_its_own_class_back(options):
    image = samples(40)
    network = ready(convolutional(), image)
    own = torch.arange(40) % 4  # most of them misclassified
    if "targets" in options:
        own = own.clamp(max=1)
    found = PerturbedSignGradient(network, **options)(image, classes(own, 4))
    assert (found.label != own).all()
    assert torch.equal(found.label == -1, found.route == ROUTES.index("dropped"))
    wrong = network(image).argmax(1) != own
    if options.get("misclassified") == "drop":
        assert (found.label[wrong] == -1).all() and (found.label[~wrong] >= 0).all()
    elif options.get("misclassified") == "search":
        assert (found.label[wrong] != network(image).argmax(1)[wrong]).all() and (found.label >= 0).all()
    elif "targets" in options:
        assert set(found.label.tolist()) <= {0, 2, 3}
    else:
        assert torch.equal(found.label[wrong], network(image).argmax(1)[wrong])
        assert (found.steps[wrong] == 0).all() and (found.distance[wrong] == 0).all()
    if options.get("max_steps") == 0:
        said = network(image).masked_fill(classes(own, 4).bool(), -torch.inf)
        assert torch.equal(found.label, said.argmax(1))


def test_a_sample_may_be_left_out_for_either_reason():
    image = samples(40)
    network = ready(convolutional(), image)
    own = torch.arange(40) % 4
    search = PerturbedSignGradient(network, misclassified="drop", residue="drop", epsilon=1e-3, epsilon_max=1e-3)
    found = search(image, classes(own, 4))
    wrong = network(image).argmax(1) != own
    assert wrong.any() and (found.label[wrong] == -1).all()
    assert (found.label[~wrong] == -1).any()


def test_where_there_is_no_third_class_the_sample_is_left_out():
    network = Affine([[1.0, 0.0], [0.0, 1.0]], [0.0, 1.0])
    found = PerturbedSignGradient(network, misclassified="search", **QUIET)(torch.zeros(1, 2, 1), classes([0], 2))
    assert found.label.item() == -1 and torch.isfinite(found.point).all()


def test_where_nothing_crosses_there_is_nothing_to_halve():
    network = Affine([[1.0, -1.0], [0.0, 0.0]], [99.0, 0.0])
    found = PerturbedSignGradient(network, epsilon=1, bisection=3, **QUIET)(torch.zeros(1, 2, 1), classes([0], 2))
    assert ROUTES[found.route.item()] == "runner_up"


def test_bisection_lies_closer_and_stays_across():
    image = samples()
    network = ready(convolutional(), image)
    label = classes(network(image).argmax(1), 4)
    coarse, fine = (PerturbedSignGradient(network, noise=0, bisection=b)(image, label) for b in (0, 5))
    crossed = coarse.route <= 1
    assert (fine.distance <= coarse.distance + 1e-6).all() and (fine.distance < coarse.distance)[crossed].any()
    assert torch.equal(network(fine.point).argmax(1)[crossed], fine.label[crossed])
    torch.testing.assert_close(network(fine.point)[crossed], fine.logits[crossed])


@pytest.mark.parametrize("kind,quantile", [("normal", 0.6745), ("uniform", 0.5), ("laplace", 0.6931), ("cauchy", 1.0)])
def test_noise_has_the_spread_of_its_kind(kind, quantile):
    draws = draw_noise(kind, (200_000,), torch.Generator().manual_seed(0))
    assert draws.abs().median().item() == pytest.approx(quantile, rel=0.02)
    assert draws.median().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("kwargs,message", [
    ({"ascent": "hill"}, "ascent must be one of"), ({"noise_kind": "pink"}, "noise_kind"),
    ({"residue": "own"}, "residue"), ({"misclassified": "?"}, "misclassified"), ({"epsilon": 0}, "epsilon"),
    ({"epsilon": 2, "epsilon_max": 1}, "epsilon"), ({"fraction": 0}, "fraction"), ({"noise": -1}, "negative"),
    ({"batch_size": 0}, "batch_size"),
])  # fmt: skip
def test_impossible_searches_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PerturbedSignGradient(nn.Identity(), **kwargs)


def test_classes_that_do_not_fit_are_refused():
    network, image = Affine(torch.eye(3), [0.0, 0, 0]), torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match="targets"):
        PerturbedSignGradient(network, targets=[3])(image, classes([0], 3))
    with pytest.raises(ValueError, match="no class to go to"):
        PerturbedSignGradient(network, targets=[0])(image, classes([0], 3))
    with pytest.raises(ValueError, match="2 classes do not go together"):
        PerturbedSignGradient(network)(image, classes([0], 2))


# labels ---------------------------------------------------------------------------------------------------------------


def test_hard_and_soft_labels_hold_nothing_of_the_own_class():
    image = samples(20)
    network = ready(convolutional(), image)
    label = classes(network(image).argmax(1), 4)
    search = PerturbedSignGradient(network)
    hard, soft = (
        BoundaryRelabel(search)(image, label),
        BoundaryRelabel(search, soft=True, temperature=3.0)(image, label),
    )
    assert ((hard == 0) | (hard == 1)).all() and torch.equal(hard.sum(1), torch.ones(20))
    assert (hard * label).sum() == 0 and (soft * label).sum() == 0
    torch.testing.assert_close(soft.sum(1), torch.ones(20))
    found = search(image, label)
    rest = (found.logits / 3).masked_fill(label.bool(), -torch.inf).softmax(1)
    torch.testing.assert_close(soft, rest)
    assert torch.equal(soft.argmax(1), hard.argmax(1))


def test_left_out_samples_are_marked_and_counted(caplog):
    image = samples(20)
    network = ready(convolutional(), image)
    label = classes(network(image).argmax(1), 4)
    relabel = BoundaryRelabel(PerturbedSignGradient(network, epsilon=1e-3, residue="drop"))
    new = relabel(image, label)
    report = relabel.report()
    out = (new == LEFT_OUT).all(1)
    assert out.any() and out.sum() == report["routes"]["dropped"] and sum(report["routes"].values()) == 20
    assert sum(report["destinations"].values()) == 20 - out.sum()
    assert "crossed the boundary; raise epsilon" in caplog.text


def test_the_released_search_teaches_a_sample_its_own_class_again_and_depends_on_its_batch():
    image = samples(16)
    network = ready(convolutional(), image)
    label = classes(network(image).argmax(1), 4)
    mean, std = (0.4914, 0.4822, 0.2265), (0.2023, 0.1994, 0.2010)
    m, s = (torch.tensor(one).view(1, 3, 1, 1) for one in (mean, std))
    network.train()
    new = LegacyBoundary(network, mean, std, epsilon=0.005, noise=0.0)(image, label)
    assert network.training
    network.eval()
    leaf = image.clone().requires_grad_()
    F.cross_entropy(network(leaf), label.argmax(1)).backward()
    picture = ((image * s + m + 0.005 * leaf.grad.sign()).clamp(0, 1) * 255).round() / 255
    assert torch.equal(new.argmax(1), network((picture - m) / s).argmax(1))
    assert (new.argmax(1) == label.argmax(1)).any()
    # 100 equal weights: a step along the gradient crosses, one along noise does not
    network = Affine(torch.stack([torch.full((100,), 0.1), torch.zeros(100)]), [-4.2, 0.0])
    legacy = LegacyBoundary(network, (0.0,), (1.0,), noise=1e-3)
    image, label = torch.full((1000, 1, 10, 10), 0.5), classes([0] * 1000, 2)
    torch.manual_seed(0)
    assert legacy(image[:1], label[:1]).argmax(1).tolist() == [1]
    assert (legacy(image, label).argmax(1) == 0).all()  # its own class again


# every voxel ----------------------------------------------------------------------------------------------------------

DENSE = Voxelwise([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("dims", [2, 3])
def test_each_voxel_keeps_the_class_it_first_crosses_into(dims):
    shape = (1, 1, *[4] * dims)
    lean = torch.linspace(-0.3, 0.3, 4**dims).view(shape)
    image = torch.cat([torch.linspace(0.05, 0.4, 4**dims).view(shape), lean], 1)
    own, region = torch.zeros(1, *[4] * dims), torch.zeros(1, *[4] * dims, dtype=torch.bool)
    region[:, 1:3] = True
    search = PerturbedSignGradient(DENSE, epsilon=1, step=0.05, fraction=1.0, max_steps=64, **QUIET)
    found = search.dense(image, own, region)
    assert found.crossed.item() == 1
    assert (found.label[~region] == -1).all() and (found.steps[~region] == -1).all()
    assert torch.equal(found.label[region], torch.where(lean[:, 0] > 0, 1, 2)[region])
    # margin 2·x₀ − |x₁| of class 0; a step takes .05 of x₀ and puts it on |x₁|
    steps = torch.ceil((2 * image[:, 0] - image[:, 1].abs()).clamp_min(0) / (3 * 0.05) - 1e-4)
    assert torch.equal(found.steps[region], steps[region].long())


def test_a_dense_search_stops_at_its_share_and_the_rest_takes_the_runner_up():
    image = torch.stack([torch.linspace(0.05, 3.0, 16).view(4, 4), torch.full((4, 4), -0.01)])[None]
    region = torch.ones(1, 4, 4, dtype=torch.bool)
    search = PerturbedSignGradient(DENSE, epsilon=1, step=0.1, fraction=0.5, max_steps=64, **QUIET)
    found = search.dense(image, torch.zeros(1, 4, 4), region)
    assert 0.5 <= found.crossed.item() < 0.7
    made = found.steps[found.steps < found.steps.max()].max()
    assert (found.steps == made + 1).sum() == 16 - round(16 * found.crossed.item())
    assert (found.label == 2).all()
    half = region.clone()
    half[:, 2:] = False
    ignored = search.dense(image, torch.where(half, 0, 255), half)  # outside the region a label may be anything
    assert torch.equal(ignored.label, search.dense(image, torch.zeros(1, 4, 4), half).label)
    empty = search.dense(image, torch.zeros(1, 4, 4), ~region)
    assert empty.crossed.item() == 1 and (empty.label == -1).all()


def test_a_dense_search_depends_on_neither_batch_size_nor_order():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    image = samples(5, 2)
    own = network(image).argmax(1)
    region = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.4
    search = PerturbedSignGradient(network, noise=0.3, epsilon=0.05)
    whole = search.dense(image, own, region)
    search.batch_size = 2
    parts = search.dense(image.flip(0), own.flip(0), region.flip(0))
    assert torch.equal(parts.label.flip(0), whole.label) and torch.equal(parts.steps.flip(0), whole.steps)
    assert (whole.label[region] != own[region]).all()


def test_dense_labels_change_the_region_alone_and_elsewhere_the_original_speaks_without_the_class():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    image = samples(3, 2)
    own = torch.randint(0, 3, (3, 8, 8), generator=torch.Generator().manual_seed(1))
    label = F.one_hot(own, 3).movedim(-1, 1).float()
    relabel = DenseBoundaryRelabel(PerturbedSignGradient(network), [1])
    new = relabel(image, label)
    assert (new[:, 1] == 0).all()
    torch.testing.assert_close(new.sum(1), torch.ones(3, 8, 8))
    inside = own == 1
    assert set(new.movedim(1, -1)[inside].unique().tolist()) == {0.0, 1.0}
    said = network(image)
    said[:, 1] = -torch.inf
    torch.testing.assert_close(new.movedim(1, -1)[~inside], said.softmax(1).movedim(1, -1)[~inside])
    assert relabel.report()["mean_crossed"] > 0.5 and sum(relabel.report()["destinations"].values()) == inside.sum()
    smooth = DenseBoundaryRelabel(PerturbedSignGradient(network), [1], majority=3)(image, label)
    assert (smooth[:, 1] == 0).all() and set(smooth.movedim(1, -1)[inside].unique().tolist()) == {0.0, 1.0}
    for fill, there in (("background", {0}), ("random", {0, 2})):
        filled = DenseBoundaryRelabel(PerturbedSignGradient(network), [1], fill=fill)(image, label)
        assert set(filled.argmax(1)[inside].tolist()) == there
        torch.testing.assert_close(filled.movedim(1, -1)[~inside], new.movedim(1, -1)[~inside])
        alone = DenseBoundaryRelabel(PerturbedSignGradient(network), [1], fill=fill)(image[1:2], label[1:2])
        torch.testing.assert_close(alone, filled[1:2])
    with pytest.raises(ValueError, match="fill"):
        DenseBoundaryRelabel(PerturbedSignGradient(network), [1], fill="own")
    with pytest.raises(ValueError, match="odd"):
        DenseBoundaryRelabel(PerturbedSignGradient(network), [1], majority=2)


def test_a_binary_mask_becomes_background_and_its_margin_counts_the_steps():
    network = Voxelwise([[1.0]], [0.0])
    image = torch.tensor([[[[-0.4, 0.07], [0.13, 0.33]]]])
    mask = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    search = PerturbedSignGradient(network, epsilon=0.8, epsilon_max=0.8, step=0.1, fraction=1.0, **QUIET)
    margin = BoundaryMargin(search, outside=0.1)(image, mask)
    torch.testing.assert_close(margin, torch.tensor([[[[0.1, 0.25], [0.5, 1.0]]]]))
    with pytest.raises(ValueError, match="outside"):
        BoundaryMargin(search, -1)
    new = DenseBoundaryRelabel(search, [1])(image, mask)
    assert new.shape == mask.shape and (new == 0).all()  # elsewhere the original says background, too
