# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import small_unet
from ignite.engine import Events
from monai.data import DataLoader, list_data_collate
from monai.networks.nets import DenseNet121, FlexibleUNet, SwinUNETR, UNet
from monai.transforms import RandSpatialCropSamplesd
from torch import nn
from toy import dataset, unlearning_trainer

from monai_unlearn import compiled, make_restorable, make_student, weights_digest
from monai_unlearn.engines import run_phase, training_flops
from monai_unlearn.trunk import FrozenTrunk, KeepTrunk, TrunkInferer


def bundle_unet():
    return UNet(2, 3, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")


@pytest.mark.parametrize(
    ("build", "scope", "size", "most"),
    [
        (bundle_unet, "decoder", (3, 96, 128), 0.35),
        (lambda: FlexibleUNet(3, 1, "resnet34", pretrained=False), "decoder", (3, 128, 192), 0.35),
        (lambda: DenseNet121(2, 3, 9), "decoder", (3, 128, 128), 0.10),
        (lambda: SwinUNETR(1, 2, feature_size=24, spatial_dims=2), "decoder", (1, 128, 128), 0.5),
    ],
    ids=["UNet", "FlexibleUNet", "DenseNet121", "SwinUNETR"],
)
def test_a_step_costs_what_the_trained_part_costs(build, scope, size, most):
    torch.manual_seed(0)
    network, image = build(), torch.rand(size)
    student = make_student(network, scope)
    trunk = FrozenTrunk(student, torch.rand(2, *size))
    whole = training_flops(network, image)
    share = training_flops(student, image, trunk) / whole
    print(f"{share:.3f} of a full training step, {training_flops(student, image) / whole:.3f} without the trunk")
    assert share <= most


def test_what_nothing_outside_reads_is_not_kept():
    student = make_student(DenseNet121(2, 3, 9), "decoder")
    trunk = FrozenTrunk(student, torch.rand(2, 3, 64, 64))
    assert trunk.kept == 2 and "features.conv0" in trunk.skipped  # of the many layers before the fourth block
    features = trunk.record(student, torch.rand(5, 3, 64, 64))
    assert [len(one) for one in features] == [5, 5]


def test_the_played_back_pass_and_its_gradients_are_those_of_the_whole_network():
    torch.manual_seed(0)
    student, images = make_student(bundle_unet(), "decoder"), torch.rand(4, 3, 32, 48)
    before = weights_digest(student.state_dict())
    trunk = FrozenTrunk(student, images[:2])
    features = trunk.record(student, images)
    assert weights_digest(student.state_dict()) == before and not any("forward" in vars(m) for m in student.modules())
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    whole = student.train()(images)
    whole.square().mean().backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.requires_grad]
    student.zero_grad()
    with trunk.played_back(student, features):
        short = student(torch.full_like(images, torch.nan))  # the images are not looked at
    short.square().mean().backward()
    torch.testing.assert_close(short, whole)
    torch.testing.assert_close([p.grad for p in student.parameters() if p.requires_grad], gradients)
    assert torch.equal(student(images), whole)  # afterwards everything runs again


class Strange(nn.Module):
    """A frozen layer whose output goes by what trains, past autograd."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 1, 1).requires_grad_(False), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        with torch.no_grad():
            moved = x + self.last.bias
        return self.last(self.first(moved))


class Noisy(nn.Module):
    """Noise that no module's settings tell of."""

    def __init__(self, channels=1):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 1, 1).requires_grad_(False), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.last(self.first(x + torch.rand_like(x)))


@pytest.mark.parametrize("network", [Strange(), Noisy()])
def test_a_network_that_only_seems_frozen_is_refused(network):
    with pytest.raises(ValueError, match="changes from pass to pass or with what trains"):
        FrozenTrunk(network, torch.rand(2, 1, 4, 4))


def frozen_then_trained(*between):
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *between).requires_grad_(False)
    return nn.Sequential(frozen, nn.Conv2d(4, 1, 1))


@pytest.mark.parametrize("by_chance", [nn.Dropout(0.5), nn.BatchNorm2d(4)])
def test_dropout_and_statistics_of_the_batch_are_computed_in_every_step(by_chance):
    network = frozen_then_trained(by_chance, nn.ReLU(inplace=True))
    trunk = FrozenTrunk(network, torch.rand(2, 3, 8, 8))
    assert trunk.skipped == ["0.0"] and trunk.kept == 1
    assert FrozenTrunk(frozen_then_trained(nn.Dropout(0.0), nn.ReLU(inplace=True)), torch.rand(2, 3, 8, 8)).skipped == [
        "0"
    ]


class Residual(nn.Module):
    """The frozen layer's output is read twice, once through another module."""

    def __init__(self, between):
        super().__init__()
        self.frozen, self.between = nn.Conv2d(1, 2, 1).requires_grad_(False), between
        self.trained = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.frozen(x)
        return self.between(x) + self.trained(x)


def test_a_layer_that_changes_what_others_read_is_refused():
    with pytest.raises(ValueError, match="cannot be told from the rest"):
        FrozenTrunk(Residual(nn.ReLU(inplace=True)), torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.0)])
def test_a_module_that_hands_on_its_input_is_no_place_to_cut(between):
    network, images = Residual(between), torch.rand(3, 1, 4, 4)
    trunk = FrozenTrunk(network, images)
    assert trunk.skipped == ["frozen"]
    for _ in range(2):  # what is kept is not changed by being used
        with trunk.played_back(network, trunk.record(network, images)):
            short = network(images)
        torch.testing.assert_close(short, network(images))


def test_the_head_alone_of_a_residual_unet_is_trained_through_the_trunk():
    network, images = bundle_unet().eval(), torch.rand(3, 3, 32, 48)
    restored = make_restorable(network)
    trunk = FrozenTrunk(restored, images[:2])
    with trunk.played_back(restored, trunk.record(network, images)):
        short = restored(images)
    torch.testing.assert_close(short, restored(images))
    assert trunk.kept == 1


def test_a_module_called_twice_is_skipped_only_where_its_input_is_frozen():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.act = nn.Conv2d(1, 2, 1).requires_grad_(False), nn.Tanh()
            self.trained = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.act(self.trained(self.act(self.frozen(x))))

    network, images = Twice(), torch.rand(3, 1, 4, 4)
    trunk = FrozenTrunk(network, images)
    assert trunk.kept == 1 and trunk.skipped == ["act", "frozen"]
    with trunk.played_back(network, trunk.record(network, images)):
        short = network(images)
    torch.testing.assert_close(short, network(images))


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="two samples or more"):
        FrozenTrunk(frozen_then_trained(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="nothing in this network trains"):
        FrozenTrunk(frozen_then_trained().requires_grad_(False), torch.rand(2, 3, 8, 8))
    trunk = FrozenTrunk(frozen_then_trained(), torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="keeps 1 tensors of a sample, got 0"), trunk.played_back(nn.Identity(), []):
        pass
    with pytest.raises(ValueError, match="budget must not be negative"):
        KeepTrunk(nn.Identity(), -1)


def unlearned(tmp_path, name, *handlers, scope="decoder", memory_format=torch.contiguous_format, **options):
    student = make_student(small_unet(), scope).to(memory_format=memory_format)
    trainer = unlearning_trainer(student, epochs=3, handlers=[one(student) for one in handlers], **options)
    return run_phase(trainer, tmp_path / name / "models" / "unlearned.pt", "f"), student, trainer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_run_with_and_without_the_trunk_gives_the_same_weights(tmp_path, memory_format, monkeypatch):
    formats, played_back = set(), FrozenTrunk.played_back

    def spy(trunk, network, features):
        formats.update(one.is_contiguous(memory_format=memory_format) for one in features)
        return played_back(trunk, network, features)

    plain, first, _ = unlearned(tmp_path, "plain", memory_format=memory_format)
    monkeypatch.setattr(FrozenTrunk, "played_back", spy)
    short, second, trainer = unlearned(tmp_path, "short", KeepTrunk, memory_format=memory_format)
    assert formats == {True}  # as the network computes them, so that no layer has to reorder them
    assert isinstance(trainer.inferer, TrunkInferer) and short["reports"]["trunk"]["samples"] == 12
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=1e-5, atol=1e-5)
    assert short["flops"] < 0.75 * plain["flops"] and short["key"] == plain["key"]


def test_what_was_kept_goes_when_training_ends_and_every_sample_can_be_asked_for(tmp_path):
    student = make_student(small_unet(), "decoder")
    trainer = unlearning_trainer(student, epochs=1, handlers=[KeepTrunk(student)])
    kept = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: kept.append(len(trainer.data_loader.dataset.features))
    )
    trainer.run()
    dataset = trainer.data_loader.dataset
    assert min(kept) > 0 == len(dataset.features)
    batch = list_data_collate([dataset[index] for index in range(len(dataset))])
    image, _, args, more = trainer.prepare_batch(batch, "cpu", False)
    torch.testing.assert_close(trainer.inferer(image, student, *args, **more), student(image))


@pytest.mark.parametrize(
    ("handler", "scope", "outcome"),
    [
        (KeepTrunk, "full", "everything trains"),
        (lambda student: KeepTrunk(student, 1e-6), "decoder", "GiB would be needed"),
    ],
)
def test_where_nothing_can_be_kept_training_goes_on_as_before(tmp_path, handler, scope, outcome):
    plain, first, _ = unlearned(tmp_path, "plain", scope=scope)
    record, second, _ = unlearned(tmp_path, "same", handler, scope=scope)
    assert outcome in record["reports"]["trunk"]["outcome"] and record["flops"] == plain["flops"]
    assert weights_digest(second.state_dict()) == weights_digest(first.state_dict())


def test_random_views_are_kept_patch_by_patch(tmp_path):
    crop = RandSpatialCropSamplesd(["image", "label"], (8, 8), num_samples=2, random_size=False)

    def trained(name, views, *handlers):
        student = make_student(small_unet(), "decoder")
        trainer = unlearning_trainer(student, handlers=[one(student) for one in handlers])
        data = dataset(random_transform=crop, views=views)
        trainer.data_loader = trainer.state.dataloader = DataLoader(
            data, batch_sampler=trainer.data_loader.batch_sampler, num_workers=0
        )
        return run_phase(trainer, tmp_path / name / "models" / "u.pt", "f"), student

    _, first = trained("plain", 2)
    record, second = trained("short", 2, KeepTrunk)
    assert record["reports"]["trunk"]["samples"] == 12 * 2 * 2
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=1e-5, atol=1e-5)
    assert "anew each time" in trained("anew", None, KeepTrunk)[0]["reports"]["trunk"]["outcome"]


def test_patches_of_volumes_are_kept_too():
    network = UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1, norm="batch").eval()
    student, images = make_student(network, "decoder"), torch.rand(3, 1, 16, 16, 16)
    trunk = FrozenTrunk(student, images[:2])
    with trunk.played_back(student, trunk.record(network, images)):
        short = student(images)
    torch.testing.assert_close(short, student(images))
    assert trunk.kept == 2  # the first level's skip connection, and all below it


def test_a_network_that_is_refused_or_compiled_trains_as_before(tmp_path):
    trainer = unlearning_trainer(Noisy(3), handlers=[])
    for network, outcome in (
        (Noisy(3), "cannot be kept"),
        (compiled(make_student(small_unet(), "decoder")), "compiled"),
    ):
        handler = KeepTrunk(network)
        handler(trainer)
        assert outcome in handler.report()["outcome"] and not isinstance(trainer.inferer, TrunkInferer)
