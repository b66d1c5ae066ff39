# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What a run must not compute: counted in calls and operations, never in seconds."""

import copy
from collections import Counter

import pytest
import torch
from conftest import small_unet
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import nn
from toy import draw, plain_trainer

from monai_unlearn import (
    AutocastInferer,
    DistillationLoss,
    FrozenTrunk,
    KeepTrunk,
    MemoryDataset,
    PrepareUnlearning,
    ReseedEachEpoch,
    SampleStore,
    StopAtReference,
    UnlearningLoss,
    make_student,
    to_background,
    unlearning_targets,
)
from monai_unlearn.audit import SplitEvaluator
from monai_unlearn.data import ForgetRetainSampler
from monai_unlearn.engines import forward_flops, saved_bytes, training_flops
from monai_unlearn.preflight import plan_costs
from monai_unlearn.request import DeletionRequest, Resolution


def unlearned(retained, trunk=True):
    """Forget 3 samples beside so many retained ones, 2 for each and epoch; what was decoded, fetched and computed."""
    count = Counter()

    def decoded(item):
        count["decoded", item["image"]] += 1
        return draw(item)

    class Counted(MemoryDataset):
        def __getitem__(self, index):
            count["fetched"] += 1
            return super().__getitem__(index)

    items = [{"image": str(i), "label": "m", "group": str(i), "forget": i < 3} for i in range(3 + retained)]
    resolution = Resolution(DeletionRequest({"ids": ["a"]}), items, [], [], {})
    original, store = small_unet(), {}
    student = make_student(original, "decoder")
    sampler = ForgetRetainSampler([item["forget"] for item in items], 1, 2, retain_per_forget=2)
    shown = [items[i] for i in sampler.shown(4)]
    targets = unlearning_targets(original, to_background, resolution, decoded, store, shown=shown)
    data = Counted(items, decoded, store, ["forget"], targets["values"])
    halves = {name: MemoryDataset(resolution.splits[name], decoded, store) for name in ("forget", "retain")}
    evaluator = SplitEvaluator(student, halves, limit=3)
    loss = UnlearningLoss(DiceCELoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss(), DistillationLoss(), 0.5)
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=4, train_data_loader=DataLoader(data, batch_sampler=sampler, num_workers=0),
        network=student, optimizer=torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-2),
        loss_function=loss, prepare_batch=PrepareUnlearning(), decollate=False,
        train_handlers=[ReseedEachEpoch(0), StopAtReference(evaluator, 0.0, student, retain_budget=1.0)]
        + ([KeepTrunk(student)] if trunk else []),
    )  # fmt: skip
    trainer.run()
    most = max(value for key, value in count.items() if key != "fetched")
    decodings = sum(value for key, value in count.items() if key != "fetched")
    return {"steps": trainer.state.iteration, "fetched": count["fetched"], "most": most, "decoded": decodings,
            "targets": targets["images"], "scored": evaluator.cases, "forgotten": len(resolution.splits["forget"]),
            "finite": all(torch.isfinite(p).all() for p in student.parameters())}  # fmt: skip


def test_the_retained_set_may_grow_and_the_work_does_not():
    few, many = unlearned(retained=30), unlearned(retained=300)
    for name in ("steps", "fetched", "scored", "forgotten"):
        assert many[name] == few[name] > 0
    assert few["steps"] == 4 * 3 and few["fetched"] == few["steps"] * 3  # 1 to forget and 2 to keep in each
    assert many["targets"] <= (3 + 4 * 6) / 3 and many["decoded"] <= 3 + 4 * 6 + 3
    assert few["most"] == many["most"] == 1  # no image is decoded twice
    assert few["finite"] and many["finite"]  # every sample shown had its teacher's output


def test_a_step_through_the_trunk_keeps_less_than_a_full_step():
    network = UNet(2, 3, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
    images = torch.rand(8, 3, 96, 128)
    student = make_student(network, "decoder")
    trunk = FrozenTrunk(student, torch.rand(2, 3, 96, 128))
    assert 0 < saved_bytes(student, images, trunk) < 0.8 * saved_bytes(network, images)


def test_saved_bytes_are_those_of_the_inputs_that_gradients_need():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh())  # the image, and the output of tanh
    assert saved_bytes(network, torch.rand(1, 1, 8, 8)) == 4 * 64 + 4 * 2 * 64
    assert saved_bytes(network.requires_grad_(False), torch.rand(1, 1, 8, 8)) == 0


def test_samples_beyond_the_budget_are_decoded_again(caplog):
    calls = Counter()

    def decoded(item):
        calls[item["image"]] += 1
        return {"image": torch.ones(2, 2**10), "label": torch.ones(1)}

    items = [{"image": name, "label": "m"} for name in "abc"]
    data = MemoryDataset(items, decoded, SampleStore(2.5 * (2**13 + 4) / 2**30))
    for _ in range(2):
        assert [float(data[i]["image"].sum()) for i in range(3)] == [2**11] * 3
    assert calls == {"a": 1, "b": 1, "c": 2}
    assert caplog.text.count("fill cache_gib") == 1 and "2 decoded samples" in caplog.text


def test_the_plan_counts_what_will_be_computed():
    network = small_unet()
    items = [{"image": str(i), "label": "m"} for i in range(4)]
    data = MemoryDataset(items, draw)
    student = make_student(network, "decoder")
    images = {"retrain": 100, "unlearn": 30, "original": 0}
    plan = plan_costs(network, student, data, images, {"unlearn": 12, "audit": 9}, items=7, batch_size=16, budget=1.0)
    image = data[0]["image"]
    whole, look = training_flops(network, image), forward_flops(network, image)
    short = training_flops(student, image, FrozenTrunk(student, torch.rand(2, 3, 16, 16)))
    assert list(plan.phases) == ["original", "unlearn", "audit", "retrain"]
    assert plan.phases["retrain"].flops == 100 * whole and plan.phases["audit"].flops == 9 * look
    assert plan.phases["unlearn"].flops == 30 * short + 12 * look and short < whole
    assert plan.gib["decoded samples"] == pytest.approx(7 * 4 * 16 * 16 * 4 / 2**30)
    assert f"{plan.phases['unlearn'].flops / plan.phases['retrain'].flops:.0%} of a retrain" in str(plan)
    without = plan_costs(network, student, data, images, {}, items=7, batch_size=16, budget=0.0)
    assert without.phases["unlearn"].flops == 30 * training_flops(student, image)


# precision ------------------------------------------------------------------------------------------------------------


def test_the_network_runs_in_bfloat16_and_everything_else_in_float32():
    network, seen = small_unet(), set()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    image = torch.rand(2, 3, 16, 16)
    output = AutocastInferer()(image, network)
    assert seen == {torch.bfloat16} and output.dtype == torch.float32
    torch.testing.assert_close(output, network(image), rtol=0.1, atol=0.1)
    assert torch.equal(AutocastInferer(dtype="float32")(image, network), network(image))
    window = AutocastInferer(SlidingWindowInferer((8, 8), 4), "bfloat16")
    assert window(image, network).dtype == torch.float32
    with pytest.raises(ValueError, match="float16 is amp's"):
        AutocastInferer(dtype=torch.float16)


def test_training_in_bfloat16_learns_what_training_in_float32_learns():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = plain_trainer(epochs=6)
        trainer.inferer = AutocastInferer(dtype=dtype)
        trainer.run()
        losses[dtype] = float(trainer.state.output["loss"])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.network.parameters())
    start = plain_trainer(epochs=1, lr=0.0)
    start.run()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["float32"] < float(start.state.output["loss"]) - 0.1


def test_counting_leaves_the_network_as_it_is():
    network = small_unet()
    before = copy.deepcopy(network.state_dict())
    saved_bytes(network, torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
