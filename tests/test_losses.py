# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import nn

from monai_unlearn.losses import (
    ContradictLoss,
    DistillationLoss,
    DivergenceLoss,
    MaximumEntropyLoss,
    Target,
    TeacherWeightedBackgroundLoss,
    UnlearningLoss,
)
from monai_unlearn.relabel import to_uniform

SHAPES = [(3, 1, 4, 5), (3, 4, 4, 5), (3, 2, 3, 3, 3), (3, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_equals_torchs_own_divergence(shape, temperature):
    student, teacher = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    ours = DistillationLoss(temperature, guard_weight=0)(student, teacher)
    s, t = student / temperature, teacher / temperature
    if shape[1] == 1:
        s, t = torch.cat([s, -s], 1) / 2, torch.cat([t, -t], 1) / 2  # softmax over (z/2, -z/2) is the sigmoid
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    torch.testing.assert_close(ours, temperature**2 * divergence)


def test_distillation_has_the_papers_gradient():
    student, teacher = (
        torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 1, 4, 4).double(),
    )
    published = (
        4 * F.binary_cross_entropy_with_logits(student / 2, (teacher / 2).sigmoid())
        + 0.05 * (student - teacher).square().mean()
    )
    ours = DistillationLoss(2.0, 1.0, 0.05)(student, teacher)
    for loss in (published, ours):
        loss.backward(retain_graph=True)
    (one,) = torch.autograd.grad(published, student)
    (two,) = torch.autograd.grad(ours, student)
    torch.testing.assert_close(one, two)
    assert published > ours  # the published value is not 0 where both agree


@pytest.mark.parametrize("shape", SHAPES)
def test_distillation_is_zero_where_both_agree_and_positive_elsewhere(shape):
    logits = torch.randn(shape)
    assert DistillationLoss()(logits, logits).abs() < 1e-7
    assert DistillationLoss(guard_weight=0)(logits, logits + torch.randn(shape)) > 0


def test_the_guard_is_the_mean_square_of_raw_logits():
    one, two = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(
        DistillationLoss(weight=0, guard_weight=0.5)(one, two), 0.5 * (one - two).square().mean()
    )


def test_doubling_the_grid_changes_nothing():
    one, two = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    big = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (one, two)]
    torch.testing.assert_close(DistillationLoss()(*big), DistillationLoss()(one, two))


def test_extreme_logits_stay_finite():
    one = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss = DistillationLoss()(one, -one.detach())
    loss.backward()
    assert loss.isfinite() and one.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"temperature": 0}, "temperature must be positive"), ({"weight": -1}, "must not be negative")],
)
def test_distillation_refuses_senseless_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**arguments)


def test_distillation_refuses_different_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        DistillationLoss()(torch.zeros(1, 1), torch.zeros(1, 2))


BCE = nn.BCEWithLogitsLoss()


def batch(forget, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(forget), 1, 4, 4)
    logits, label, teacher = (torch.randn(shape, generator=generator) for _ in range(3))
    return logits, Target(label.sigmoid(), torch.tensor(forget), teacher)


def test_each_term_is_a_mean_over_its_own_group():
    logits, target = batch([True, False, False, True, False])
    kept = ~target.forget
    loss = UnlearningLoss(BCE, BCE, DistillationLoss(), forget_weight=3.0)(logits, target)
    expected = (
        BCE(logits[kept], target.label[kept])
        + DistillationLoss()(logits[kept], target.teacher[kept])
        + 3 * BCE(logits[target.forget], target.label[target.forget])
    )
    torch.testing.assert_close(loss, expected)


def test_the_order_of_the_samples_does_not_matter():
    logits, target = batch([True, False, False, True, False])
    order = torch.tensor([3, 1, 4, 0, 2])
    loss = UnlearningLoss(BCE, BCE, DistillationLoss())
    torch.testing.assert_close(loss(logits[order], Target(*(part[order] for part in target[:3]))), loss(logits, target))


@pytest.mark.parametrize("forget", [True, False])
def test_a_group_that_the_batch_lacks_adds_nothing(forget):
    logits, target = batch([forget] * 3)
    loss = UnlearningLoss(BCE, BCE, forget_weight=2.0)(logits, target)
    torch.testing.assert_close(loss, (2.0 if forget else 1.0) * BCE(logits, target.label))


def test_a_term_left_out_leaves_its_samples_without_gradient():
    logits, target = batch([True, False])
    logits.requires_grad_()
    UnlearningLoss(None, BCE)(logits, target).backward()
    assert logits.grad[1].abs().sum() == 0 and logits.grad[0].abs().sum() > 0


def test_a_batch_with_nothing_to_learn_gives_zero_and_runs_backward():
    logits, target = batch([True, True])
    logits.requires_grad_()
    loss = UnlearningLoss(BCE, None)(logits, target)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_rows_of_the_teacher_that_are_not_a_number_are_never_read():
    logits, target = batch([True, False])
    target.teacher[0] = math.nan
    logits.requires_grad_()
    loss = UnlearningLoss(BCE, BCE, DistillationLoss())(logits, target)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_background_is_softplus_of_the_logits():
    logits = torch.randn(2, 1, 4, 4)
    loss = UnlearningLoss(None, BCE, forget_weight=3.0)(
        logits, Target(torch.zeros(2, 1, 4, 4), torch.tensor([True, True]))
    )
    torch.testing.assert_close(loss, 3 * F.softplus(logits).mean())


def test_the_recipes_dice_and_cross_entropy_equal_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 1, 8, 8, generator=generator), (torch.rand(4, 1, 8, 8, generator=generator) > 0.6).float()
    p = z.sigmoid()
    published = 1 - 2 * (p * y).sum() / (p.sum() + y.sum()) + F.binary_cross_entropy_with_logits(z, y)
    ours = DiceCELoss(sigmoid=True, batch=True, smooth_nr=0, smooth_dr=1e-7)(z, y)
    torch.testing.assert_close(ours, published, rtol=1e-6, atol=1e-6)


def test_a_loss_without_terms_or_without_its_teacher_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        UnlearningLoss()
    logits, target = batch([False])
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        UnlearningLoss(distill=DistillationLoss())(logits, target._replace(teacher=None))


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (3, 4, 4, 5), (3, 6)])
def test_divergence_to_a_label_equals_torchs_own(shape):
    logits = torch.randn(shape, dtype=torch.float64)
    label = torch.rand(shape, dtype=torch.float64)
    if shape[1] == 1:
        two = torch.cat([logits, -logits], 1) / 2, torch.cat([label, 1 - label], 1)
    else:
        label = label / label.sum(1, keepdim=True)
        two = logits, label
    expected = F.kl_div(two[0].log_softmax(1), two[1], reduction="none").sum(1).mean()
    torch.testing.assert_close(DivergenceLoss()(logits, label), expected)


@pytest.mark.parametrize("shape", [(5, 4), (2, 1, 3, 3)])
def test_divergence_at_a_temperature_is_the_distillation_of_a_label_softened_with_it(shape):
    logits, teacher = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    softened = (teacher / 3).sigmoid() if shape[1] == 1 else (teacher / 3).softmax(1)
    expected = DistillationLoss(3.0, guard_weight=0.0)(logits, teacher)
    torch.testing.assert_close(DivergenceLoss(3.0)(logits, softened), expected)
    with pytest.raises(ValueError, match="temperature"):
        DivergenceLoss(0)


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 3, 3, 3)])
def test_a_weighted_divergence_is_the_mean_over_the_weights(shape):
    logits, label = torch.randn(shape), torch.rand(shape)
    label = label if shape[1] == 1 else label.softmax(1)
    loss, weight = DivergenceLoss(weighted=True), torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(loss(logits, label, torch.full_like(weight, 0.3)), DivergenceLoss()(logits, label))
    one = torch.zeros_like(weight)
    one[1, 0, 2, 1] = 5
    voxel = (slice(1, 2), slice(None), slice(2, 3), slice(1, 2))
    torch.testing.assert_close(loss(logits, label, one), DivergenceLoss()(logits[voxel], label[voxel]))
    flags = torch.tensor([True, False])
    whole = UnlearningLoss(None, loss, forget_weight=2.0)(logits, Target(label, flags, None, weight))
    torch.testing.assert_close(whole, 2 * loss(logits[:1], label[:1], weight[:1]))
    with pytest.raises(ValueError, match="forget_weight_map"):
        UnlearningLoss(None, loss)(logits, Target(label, flags))


def test_a_sample_to_forget_that_has_no_label_adds_to_no_term():
    logits = torch.randn(4, 3, requires_grad=True)
    label = torch.eye(3)[[0, 1, 2, 0]]
    loss = UnlearningLoss(nn.CrossEntropyLoss(), DivergenceLoss(), forget_weight=2.0)
    label[0] = -1
    flags = torch.tensor([True, True, False, False])
    whole = loss(logits, Target(label, flags))
    torch.testing.assert_close(whole, loss(logits[1:], Target(label[1:], flags[1:])))
    assert torch.autograd.grad(whole, logits)[0][0].abs().sum() == 0
    nothing = loss(logits[:1], Target(label[:1], flags[:1]))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


def test_divergence_to_uniform_has_its_closed_form_and_is_unbounded():
    logits = torch.randn(4, 9, dtype=torch.float64)
    uniform = to_uniform(None, torch.zeros_like(logits))
    expected = -math.log(9) - logits.log_softmax(1).mean(1)
    torch.testing.assert_close(DivergenceLoss()(logits, uniform), expected.mean())
    assert DivergenceLoss()(1000 * F.one_hot(torch.tensor([0]), 9).double(), uniform[:1]) > 100


def test_maximum_entropy_is_log_classes_minus_entropy_and_bounded():
    logits = torch.randn(4, 9, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(MaximumEntropyLoss()(logits), (math.log(9) - entropy).mean())
    one = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    entropy = torch.distributions.Bernoulli(logits=one).entropy()
    torch.testing.assert_close(MaximumEntropyLoss()(one), (math.log(2) - entropy).mean())
    assert MaximumEntropyLoss()(1000 * torch.eye(9).double()) <= math.log(9) + 1e-9


def test_weighted_background_has_its_closed_form():
    logits, teacher = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    weights = torch.where(teacher.sigmoid() > 0.3, 5.0, 1.0)
    ours = TeacherWeightedBackgroundLoss(boost=4, threshold=0.3)(logits, None, teacher)
    torch.testing.assert_close(ours, (weights * F.softplus(logits)).mean())
    plain = TeacherWeightedBackgroundLoss(boost=0)(logits, None, teacher)
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)))
    pair, two = torch.cat([torch.zeros_like(logits), logits], 1), torch.cat([torch.zeros_like(teacher), teacher], 1)
    torch.testing.assert_close(TeacherWeightedBackgroundLoss()(pair, None, two), ours)  # softmax of (0, z)


def test_contradiction_counts_only_where_the_teacher_is_confident():
    teacher = torch.tensor([[[5.0, -5.0, 0.1]]])
    logits = torch.tensor([[[1.0, 2.0, 3.0]]], requires_grad=True)
    loss = ContradictLoss(0.9)(logits, None, teacher)
    expected = (F.softplus(torch.tensor(1.0)) + F.softplus(torch.tensor(-2.0))) / 2  # towards 0 and towards 1
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad[0, 0, 2] == 0 and logits.grad[0, 0, 0] > 0 > logits.grad[0, 0, 1]
    assert ContradictLoss(0.9)(logits, None, torch.zeros_like(teacher)) == 0


@pytest.mark.parametrize("forget", [TeacherWeightedBackgroundLoss(), ContradictLoss()])
def test_a_forget_loss_may_read_the_teacher_of_the_samples_to_forget(forget):
    logits, teacher = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4) * 4
    target = Target(torch.zeros_like(logits), torch.tensor([True, False, True]), teacher)
    expected = 2 * forget(logits[[0, 2]], None, teacher[[0, 2]])
    torch.testing.assert_close(UnlearningLoss(forget=forget, forget_weight=2.0)(logits, target), expected)
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        UnlearningLoss(forget=forget)(logits, target._replace(teacher=None))


@pytest.mark.parametrize(
    "make",
    [lambda: TeacherWeightedBackgroundLoss(boost=-1), lambda: TeacherWeightedBackgroundLoss(threshold=1.0),
     lambda: ContradictLoss(0.4)],
)  # fmt: skip
def test_losses_refuse_constants_that_mean_nothing(make):
    with pytest.raises(ValueError, match="must"):
        make()
