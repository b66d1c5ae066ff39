# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Each method that acts on single weights does what its equation says."""

import copy

import pytest
import torch
from conftest import small_unet
from ignite.engine import Engine
from torch import nn
from toy import dataset, plain_trainer, unlearning_trainer

from monai_unlearn.handlers import ForgetUntil, MaskedUpdate, SparsityPenalty
from monai_unlearn.losses import UnlearningLoss
from monai_unlearn.saliency import dampen, mean_gradient, reset_least_different, saliency_mask

SAMPLES = [{"image": torch.tensor([float(a), float(b)]), "label": torch.tensor([float(a - b)])}
           for a, b in ((1, 2), (0, -1), (3, 1), (2, 2), (-1, 1))]  # fmt: skip


def linear():
    network = nn.Linear(2, 1, bias=False)
    network.weight.data = torch.tensor([[0.5, -0.25]])
    return network


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_gradients_and_their_squares_are_those_of_least_squares(batch_size):
    x = torch.stack([one["image"] for one in SAMPLES])
    y = torch.stack([one["label"] for one in SAMPLES])
    each = 2 * (x @ linear().weight.detach().T - y) * x  # d/dw (wx − y)²
    network, loss = linear(), nn.MSELoss()
    found = mean_gradient(network, SAMPLES, loss, batch_size=batch_size)["weight"]
    torch.testing.assert_close(found, each.mean(0, keepdim=True))
    squared = mean_gradient(network, SAMPLES, loss, squared=True, batch_size=batch_size)["weight"]
    torch.testing.assert_close(squared, each.square().mean(0, keepdim=True))
    assert network.weight.grad is None and torch.equal(network.weight, linear().weight)
    with pytest.raises(ValueError, match="at least one sample"):
        mean_gradient(network, [], loss)


def test_gradients_leave_the_network_and_its_statistics_as_they_are():
    network = small_unet().train()
    before = copy.deepcopy(network.state_dict())
    found = mean_gradient(network, dataset(), nn.BCEWithLogitsLoss())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert set(found) == {name for name, _ in network.named_parameters()} and network.training


def test_a_mask_holds_the_share_of_weights_with_the_largest_gradient():
    gradient = {"a": torch.tensor([0.1, -0.9, 0.3]), "b": torch.tensor([[0.2], [-0.8]])}
    mask = saliency_mask(gradient, 0.4)
    assert mask["a"].tolist() == [False, True, False] and mask["b"].tolist() == [[False], [True]]
    assert all(one.all() for one in saliency_mask(gradient, 1.0).values())
    assert sum(int(one.sum()) for one in saliency_mask(gradient, 0.01).values()) == 1
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            saliency_mask(gradient, share)


def test_weights_outside_the_mask_stay_bit_for_bit_under_momentum_and_decay():
    network = small_unet()
    before = copy.deepcopy(network.state_dict())
    mask = saliency_mask(mean_gradient(network, dataset(), nn.BCEWithLogitsLoss()), 0.5)
    student = copy.deepcopy(network)
    trainer = unlearning_trainer(student, epochs=2, handlers=[MaskedUpdate(student, mask)])
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.5
    trainer.run()
    moved = 0
    for name, value in student.named_parameters():
        assert torch.equal(value[~mask[name]], before[name][~mask[name]])
        moved += int((value[mask[name]] != before[name][mask[name]]).sum())
    assert moved > 0.9 * sum(int(one.sum()) for one in mask.values())
    free = copy.deepcopy(network)  # the control: without the handler those weights move
    unlearning_trainer(free, epochs=2).run()
    assert any((value[~mask[name]] != before[name][~mask[name]]).any() for name, value in free.named_parameters())


def test_a_share_of_each_step_is_made_outside_the_mask():
    network = linear()
    handler = MaskedUpdate(network, {"weight": torch.tensor([[True, False]])}, outside=0.1)
    engine = Engine(lambda engine, batch: network.weight.data.add_(1.0))
    handler.attach(engine)
    engine.run([0], max_epochs=3)
    torch.testing.assert_close(network.weight.detach(), torch.tensor([[3.5, 0.05]]))
    with pytest.raises(ValueError, match="lacks: nothing"):
        MaskedUpdate(network, {"nothing": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        MaskedUpdate(network, {}, outside=2)


def test_the_weights_on_which_both_sets_pull_alike_start_anew():
    network, fresh = (nn.Sequential(nn.Conv1d(1, 4, 1), nn.Linear(1, 1)) for _ in range(2))
    zero = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    apart = {**zero, "0.weight": torch.tensor([0.3, 0.0, -0.1, 2.0]).reshape(4, 1, 1)}
    student, mask = reset_least_different(network, fresh, zero, apart, share=0.5)
    assert mask["0.weight"].flatten().tolist() == [False, True, True, False]
    assert not any(one.any() for name, one in mask.items() if name != "0.weight")
    for name, value in student.named_parameters():
        expected = torch.where(mask[name], dict(fresh.named_parameters())[name], dict(network.named_parameters())[name])
        assert torch.equal(value, expected) and value.requires_grad
    with pytest.raises(ValueError, match="no convolution"):
        reset_least_different(linear(), linear(), {}, {})


def test_dampening_is_its_equation():
    network = linear()
    network.weight.data = torch.tensor([[2.0, 2.0]])
    forget, data = {"weight": torch.tensor([[8.0, 0.5]])}, {"weight": torch.tensor([[2.0, 1.0]])}
    assert dampen(network, forget, data, alpha=3, strength=0.5).weight.tolist() == [[0.25, 2.0]]  # 2 · .5 · 2 / 8
    assert dampen(network, forget, data, alpha=5).weight.tolist() == [[2.0, 2.0]]  # 8 is not above 5 · 2
    assert dampen(network, forget, data, alpha=3, strength=10).weight.tolist() == [[2.0, 2.0]]  # never amplified
    assert dampen(network, {"weight": torch.zeros(1, 2)}, {"weight": torch.zeros(1, 2)}).weight.tolist() == [[2.0, 2.0]]
    assert network.weight.tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match="must be positive"):
        dampen(network, forget, data, alpha=0)


def test_the_sparsity_penalty_is_its_gradient_and_falls_to_nothing():
    plain, sparse, steps = linear(), linear(), []
    optimizers = [torch.optim.SGD(one.parameters(), 1.0) for one in (plain, sparse)]

    def step(engine, batch):
        for network, optimizer in zip((plain, sparse), optimizers):
            optimizer.zero_grad()
            (network.weight.sum() * 0.0).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        steps.append(sparse.weight.grad.clone())

    from monai.engines import IterationEvents

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    engine.amp = False
    SparsityPenalty(sparse, 0.4).attach(engine)
    engine.run([0, 0], max_epochs=2)
    sign = torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(torch.cat(steps), torch.cat([0.4 * share * sign for share in (1, 0.75, 0.5, 0.25)]))
    assert torch.equal(plain.weight.grad, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not be negative"):
        SparsityPenalty(sparse, -1)


def test_the_sparsity_penalty_makes_a_trained_network_sparser():
    norms = []
    for weight in (0.0, 0.01):
        network = small_unet()
        plain_trainer(network=network, handlers=[SparsityPenalty(network, weight)]).run()
        norms.append(sum(float(value.detach().abs().sum()) for value in network.parameters()))
    assert norms[1] < 0.98 * norms[0]


def test_the_forget_term_ends_after_its_epochs():
    loss, seen = UnlearningLoss(nn.MSELoss(), nn.MSELoss(), forget_weight=-2.0), []
    engine = Engine(lambda engine, batch: seen.append(loss.forget_weight))
    ForgetUntil(loss, 2).attach(engine)
    engine.run([0], max_epochs=4)
    assert seen == [-2.0, -2.0, 0.0, 0.0]
