# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_unet
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn
from toy import draw, plain_trainer, unlearning_trainer

from monai_unlearn.checkpoint import weights_digest
from monai_unlearn.data import ForgetRetainSampler
from monai_unlearn.engines import run_phase, training_flops
from monai_unlearn.handlers import (
    ClipGradients,
    DriftCap,
    NotFiniteError,
    PhaseProgress,
    ReseedEachEpoch,
    ResumeEachEpoch,
    StopAtReference,
    TeacherGuard,
)
from monai_unlearn.lora import drift, make_student
from monai_unlearn.losses import UnlearningLoss


class Scripted:
    """An evaluator that says one prepared score after the other."""

    def __init__(self, forget, retain=None):
        self.scores = list(zip(forget, retain or [0.9] * len(forget)))
        self.state = SimpleNamespace(metrics={})
        self.cases = 5

    def run(self):
        forget, retain = self.scores.pop(0)
        self.state.metrics = {"forget": forget, "retain": retain}

    def case_flops(self):
        return 7


def run_scripted(forget, retain=None, loss=None, **kwargs):
    """Weights count the epochs, so that the kept ones can be told."""
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0)
    options = {"reference": 0.7, **kwargs}
    handler = StopAtReference(Scripted(forget, retain), network=network, loss=loss, **options)
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: network.weight.data.add_(1))
    handler.attach(engine)
    engine.run([0], max_epochs=len(forget) - 1)
    return network.weight.item(), handler.report()


def test_the_epoch_closest_to_the_reference_is_kept():
    kept, report = run_scripted([0.95, 0.8, 0.71, 0.5])
    assert kept == 2 and report["best_epoch"] == 2
    assert report["reached"] and not report["overshoot"]
    assert [entry["forget"] for entry in report["history"]] == [0.95, 0.8, 0.71, 0.5]


def test_too_low_is_as_far_as_too_high():
    assert run_scripted([0.95, 0.8, 0.55])[0] == 1
    assert run_scripted([0.95, 0.9, 0.62])[0] == 2


def test_the_start_is_kept_when_nothing_comes_closer():
    kept, report = run_scripted([0.72, 0.4, 0.3])
    assert kept == 0 and report["best_epoch"] == 0


def test_of_epochs_equally_close_the_one_that_keeps_more_is_kept():
    assert run_scripted([0.95, 0.701, 0.706, 0.703], [0.9, 0.87, 0.89, 0.88])[0] == 2
    assert run_scripted([0.95, 0.701, 0.73], [0.9, 0.87, 0.9])[0] == 1


def test_overshoot_and_not_reached_are_flagged():
    assert run_scripted([0.95, 0.6])[1]["overshoot"]
    assert not run_scripted([0.95, 0.69])[1]["overshoot"]
    assert not run_scripted([0.95, 0.9])[1]["reached"]


def test_an_epoch_outside_the_retain_budget_is_kept_only_when_all_are():
    assert run_scripted([0.95, 0.7, 0.8], [0.9, 0.5, 0.86])[0] == 2
    kept, report = run_scripted([0.99, 0.7, 0.8], [0.9, 0.9, 0.85], retain_budget=0.01)
    assert kept == 1 and report["retain_within_budget"]
    assert run_scripted([0.95, 0.71], [0.9, 0.1], retain_metric=None)[0] == 1


def test_the_budget_goes_by_the_best_retain_score_of_the_run():
    fresh_weights = [0.1, 0.3, 0.7, 0.96]  # a start that knows little says nothing of what can be kept
    kept, report = run_scripted([0.2, 0.7, 0.69, 0.6], fresh_weights)
    assert kept == 3 and report["retain_within_budget"] and report["overshoot"]


def test_a_monitor_lets_no_gain_on_the_retain_set_outweigh_a_rebound():
    assert run_scripted([0.7, 0.7, 0.9], [0.8, 0.82, 0.99], reference=None)[0] == 1


def test_the_pull_fades_towards_the_reference_and_comes_back():
    loss = UnlearningLoss(forget=nn.MSELoss(), forget_weight=2.0)
    weights = []
    network = nn.Linear(1, 1)
    handler = StopAtReference(Scripted([0.95, 0.72, 0.6, 0.9]), 0.7, network, loss, softness=0.1)
    engine = Engine(lambda engine, batch: weights.append(loss.forget_weight))
    handler.attach(engine)
    engine.run([0], max_epochs=3)
    assert weights == pytest.approx([2.0, 0.4, 0.0])
    assert loss.forget_weight == 2.0


def test_scores_that_are_not_finite_stop_the_run():
    with pytest.raises(NotFiniteError, match="not finite after epoch 1"):
        run_scripted([0.9, float("nan")])


@pytest.mark.parametrize(
    ("arguments", "message"), [({"reference": float("nan")}, "finite number"), ({"softness": 0}, "must be positive")]
)
def test_a_stop_that_could_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StopAtReference(**{"evaluator": None, "reference": 0.5, "network": nn.Linear(1, 1), **arguments})


def test_a_teacher_that_changes_is_found_out():
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    engine = Engine(lambda engine, batch: None)
    TeacherGuard(teacher).attach(engine)
    engine.run([0], max_epochs=1)
    engine = Engine(lambda engine, batch: teacher.train()(torch.rand(3, 2)))  # moves a buffer only
    TeacherGuard(teacher).attach(engine)
    with pytest.raises(RuntimeError, match="teacher changed"):
        engine.run([0], max_epochs=1)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt():
    network = small_unet()
    trainer = plain_trainer(2, network)
    trainer.data_loader.dataset.store[("3", "m")] = {
        "image": torch.full((3, 16, 16), torch.nan), "label": torch.zeros(1, 16, 16)}  # fmt: skip
    with pytest.raises(NotFiniteError, match="the loss is nan in epoch 1"):
        trainer.run()
    assert all(p.isfinite().all() for p in network.parameters())


def test_epochs_are_seeded_by_seed_and_epoch():
    def draw(seed, epochs):
        seen = []
        engine = Engine(lambda engine, batch: seen.append((torch.rand(1).item(), np.random.rand(), random.random())))
        ReseedEachEpoch(seed).attach(engine)
        engine.run([0], max_epochs=epochs)
        return seen

    assert draw(0, 3) == draw(0, 3) and draw(0, 3)[:2] == draw(0, 2)
    assert len(set(draw(0, 3) + draw(1, 3))) == 6


def test_the_sampler_is_told_the_epoch():
    sampler = ForgetRetainSampler([True, False], 1, 1)
    engine = Engine(lambda engine, batch: None)
    ReseedEachEpoch(0).attach(engine)
    engine.run(torch.utils.data.DataLoader([0, 1], batch_sampler=sampler), max_epochs=3)
    assert sampler.epoch == 4  # told 3, and counted on by the iteration


class Killed(BaseException):
    pass


def killer(epoch):
    def kill(engine):
        if engine.state.epoch == epoch:
            raise Killed

    return SimpleNamespace(attach=lambda engine: engine.add_event_handler(Events.ITERATION_COMPLETED, kill))


@pytest.fixture
def save_every_epoch(monkeypatch):
    monkeypatch.setattr(ResumeEachEpoch.__init__, "__defaults__", (0.0, None))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_phase_resumes_to_the_same_weights(dropout, tmp_path, save_every_epoch):
    undisturbed = run_phase(plain_trainer(5, dropout=dropout), tmp_path / "a" / "models" / "m.pt", "c")
    path = tmp_path / "b" / "models" / "m.pt"
    for epoch in (2, 4, 4):
        with pytest.raises(Killed):
            run_phase(plain_trainer(5, handlers=[killer(epoch)], dropout=dropout), path, "c")
        assert not path.exists()
    record = run_phase(plain_trainer(5, dropout=dropout), path, "c")
    assert record["sha256"] == undisturbed["sha256"]
    assert record["images"] >= undisturbed["images"]


def test_a_killed_unlearning_resumes_with_its_stop_rule(tmp_path, save_every_epoch):
    scores = [0.95, 0.9, 0.85, 0.74, 0.6]

    def trainer(start, *handlers):
        student = make_student(small_unet(), rank=2)
        loss = UnlearningLoss(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss())
        stop = StopAtReference(Scripted(scores[start:]), 0.7, student, loss, softness=0.3)
        return unlearning_trainer(student, epochs=4, loss=loss, handlers=[stop, *handlers])

    undisturbed = run_phase(trainer(0), tmp_path / "a" / "models" / "m.pt", "c")
    path = tmp_path / "b" / "models" / "m.pt"
    with pytest.raises(Killed):
        run_phase(trainer(0, killer(3)), path, "c")
    record = run_phase(trainer(3), path, "c")
    assert record["sha256"] == undisturbed["sha256"]
    assert record["reports"] == undisturbed["reports"]
    assert record["reports"]["stop_at_reference"]["best_epoch"] == 3
    assert record["flops"] == undisturbed["flops"]
    scored = 5 * 5  # five times five cases
    trained = undisturbed["images"] - scored / 3
    student = make_student(small_unet(), rank=2)
    assert undisturbed["flops"] == trained * training_flops(student, draw({"image": "0"})["image"]) + scored * 7


@pytest.mark.parametrize("damage", ["flip", "cut", "other phase"])
def test_a_state_that_cannot_be_trusted_is_not_used(damage, tmp_path, save_every_epoch, caplog):
    path = tmp_path / "models" / "m.pt"
    with pytest.raises(Killed):
        run_phase(plain_trainer(3, handlers=[killer(3)]), path, "c")
    (state,) = (tmp_path / "private" / "resume").iterdir()
    assert state.stat().st_mode & 0o777 == 0o600
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    if damage != "other phase":
        state.write_bytes(content if damage == "flip" else content[:1000])
    record = run_phase(plain_trainer(3), path, "other" if damage == "other phase" else "c")
    assert record["images"] == 36  # from the beginning
    assert ("is damaged" in caplog.text) == (damage != "other phase")
    assert not state.exists()


def test_the_progress_bar_shows_the_whole_phase(capsys):
    trainer = plain_trainer(2, handlers=[PhaseProgress("original")])
    trainer.run()
    shown = capsys.readouterr().err
    assert "original" in shown and "6/6" in shown


def test_handlers_leave_the_result_as_it_is(tmp_path):
    digests = []
    for handlers in ([], [PhaseProgress("x")]):
        network = small_unet()
        plain_trainer(2, network, handlers).run()
        digests.append(weights_digest(network.state_dict()))
    assert digests[0] == digests[1]


def test_without_a_reference_the_start_is_one_and_rebound_is_watched():
    forget, retain = [0.50, 0.505, 0.51, 0.60], [0.90, 0.91, 0.92, 0.99]
    kept, report = run_scripted(forget, retain, reference=None, resolution=0.02)
    assert kept == 2 and report["reference"] == 0.50  # the third epoch retains most but its forget score came back


def test_the_cap_on_the_drift_holds_after_every_step():
    student = make_student(small_unet(), rank=2)
    free = make_student(small_unet(), rank=2)
    seen = []
    watch = type("Watch", (), {"attach": lambda self, engine: engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append(max(drift(student).values())))})()  # fmt: skip
    unlearning_trainer(student, epochs=2, handlers=[DriftCap(student, 0.01), watch], lr=0.01).run()
    unlearning_trainer(free, epochs=2, lr=0.01).run()
    assert max(seen) <= 0.01 * (1 + 1e-5) and max(drift(free).values()) > 0.02
    with pytest.raises(ValueError, match="must be positive"):
        DriftCap(student, 0)


def test_random_transforms_are_seeded_by_the_epoch():
    data = SimpleNamespace(seeds=[], set_random_state=lambda seed: data.seeds.append(seed))
    engine = Engine(lambda engine, batch: None)
    ReseedEachEpoch(3).attach(engine)
    loader = type("Loader", (list,), {"dataset": data})([0])
    engine.run(loader, max_epochs=2)
    assert len(set(data.seeds)) == 2


@pytest.mark.parametrize("amp", [False, True])
def test_gradients_are_clipped_before_the_step_and_at_their_true_size(amp):
    """Three gradients of norm 5, 1 and .5 (closed form: g / max(1, norm)), with and without a scaled loss."""
    network, stepped = nn.Linear(2, 1, bias=False), []
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    wanted = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.3, -0.4]])]

    def step(engine, batch):
        optimizer.zero_grad()
        engine.scaler.scale((network.weight * batch).sum()).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        stepped.append(network.weight.grad.clone())

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    engine.amp, engine.optimizer = amp, optimizer
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=amp)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.scaler.update() if amp else None)
    ClipGradients(network).attach(engine)
    engine.run(wanted, max_epochs=1)
    expected = [wanted[0] / 5, wanted[1], wanted[2]]
    torch.testing.assert_close(torch.stack(stepped), torch.stack(expected), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="positive"):
        ClipGradients(network, 0)
