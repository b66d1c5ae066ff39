# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import logging
import pickle
import re

import pytest
import torch
from conftest import small_unet
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    DenseNet121,
    DynUNet,
    EfficientNetBN,
    FlexibleUNet,
    SegResNet,
    VNet,
)
from torch import nn

from monai_unlearn.checkpoint import CheckpointError
from monai_unlearn.lora import (
    WeightLora,
    adapted_layers,
    adapters_disabled,
    drift,
    freeze_norm,
    hold_part,
    inject_lora,
    limit_drift,
    load_adapter,
    make_restorable,
    make_student,
    mask_logits,
    merge_lora,
    save_adapter,
    scope_pattern,
    shrink,
    unfreeze_norm,
)


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def shake(network, seed=0):
    """Give the adapters values as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(network).values():
        weight = layer.lora_B["default"].weight
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return network


LAYERS = [
    (nn.Linear(6, 10), (3, 6)),
    (nn.Conv1d(6, 10, 3, padding=1), (2, 6, 8)),
    (nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 8, 8)),
    (nn.Conv2d(6, 10, 3, dilation=2, padding=2, padding_mode="reflect"), (2, 6, 8, 8)),
    (nn.Conv2d(6, 12, 3, groups=3), (2, 6, 8, 8)),
    (nn.Conv2d(6, 10, 1, bias=False), (2, 6, 8, 8)),
    (nn.Conv3d(6, 10, 1), (2, 6, 4, 4, 4)),
    (nn.ConvTranspose1d(6, 10, 3, stride=2), (2, 6, 8)),
    (nn.ConvTranspose2d(6, 10, 3, stride=2, padding=1, output_padding=1), (2, 6, 8, 8)),
    (nn.ConvTranspose2d(6, 12, 2, groups=2), (2, 6, 8, 8)),
    (nn.ConvTranspose3d(6, 10, 2, stride=2), (2, 6, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "")
def test_every_kind_of_layer_starts_as_its_base_and_merges_exactly(layer, shape):
    plain = nn.Sequential(layer)
    x = torch.randn(shape)
    network = inject_lora(copy.deepcopy(plain), rank=3, alpha=6)
    equal(network(x), plain(x))
    shake(network)
    adapted = network(x)
    assert (adapted - plain(x)).abs().max() > 1e-3
    merged = merge_lora(network)
    equal(merged(x), adapted)
    assert list(merged.state_dict()) == list(plain.state_dict())
    with adapters_disabled(network):
        equal(network(x), plain(x))
    equal(network(x), adapted)


def test_the_adapted_weight_is_the_outer_product_of_the_factors():
    network = shake(inject_lora(nn.Sequential(nn.Linear(6, 10)), rank=3, alpha=6))
    layer = network[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer.adapted_weight(), layer.base_layer.weight + 2.0 * b @ a)
    torch.testing.assert_close(drift(network)["0"], ((2.0 * b @ a).norm() / layer.base_layer.weight.norm()).item())


def test_gradients_equal_those_of_stock_peft():
    from peft import LoraConfig, inject_adapter_in_model

    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    ours = shake(inject_lora(copy.deepcopy(plain), rank=2, alpha=4))
    stock = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]), copy.deepcopy(plain))
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)
    for network in (ours, stock):
        network(x).square().sum().backward()
    for (name, one), (_, two) in zip(ours.named_parameters(), stock.named_parameters()):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)


NETWORKS = {
    "UNet": lambda: small_unet(),
    "BasicUNet": lambda: BasicUNet(2, 3, 2, features=(4, 4, 8, 8, 8, 4)),
    "AttentionUnet": lambda: AttentionUnet(2, 3, 2, channels=(4, 8, 16), strides=(2, 2)),
    "SegResNet": lambda: SegResNet(2, init_filters=8, in_channels=3, out_channels=2),
    "DynUNet": lambda: DynUNet(2, 3, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8]),
    "VNet": lambda: VNet(spatial_dims=2, in_channels=1, out_channels=2),
    "FlexibleUNet": lambda: FlexibleUNet(3, 1, "resnet18", spatial_dims=2, pretrained=False),
    "UNETR": lambda: UNETR(3, 2, 32, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_monai_networks_can_be_adapted_and_merged_back(name):
    plain = NETWORKS[name]().eval()
    x = torch.randn(1, 1 if name == "VNet" else 3, 32, 32)
    network = inject_lora(copy.deepcopy(plain), rank=2, alpha=8)
    equal(network(x), plain(x))
    shake(network)
    merged = merge_lora(network)
    equal(merged(x), network(x))
    assert list(merged.state_dict()) == list(plain.state_dict())
    inside = set(adapted_layers(inject_lora(copy.deepcopy(plain), rank=1, scope="decoder")))
    assert inside and inside < set(adapted_layers(network))
    names = dict(plain.named_modules())
    assert any(re.fullmatch(scope_pattern(plain, "head"), name) for name in names)


def test_nothing_but_the_adapters_trains():
    network = inject_lora(small_unet(), rank=2)
    assert {".lora_A." in n or ".lora_B." in n for n, p in network.named_parameters() if p.requires_grad} == {True}
    assert not any(p.requires_grad for n, p in network.named_parameters() if ".lora_" not in n)


def test_no_adapter_is_larger_than_its_layer_and_what_is_left_out_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        network = inject_lora(small_unet(), rank=64, alpha=128)
    for name, layer in adapted_layers(network).items():
        size = layer.lora_A["default"].weight.numel() + layer.lora_B["default"].weight.numel()
        assert size <= layer.base_layer.weight.numel(), name
        assert layer.scaling["default"] == 2.0
    assert "model.2.1.conv.unit0.conv" in caplog.text


def test_a_scope_that_cannot_be_meant_is_refused_and_changes_nothing():
    network = small_unet()
    before = state(network)
    with pytest.raises(ValueError, match="matches no layer of UNet that an adapter fits in"):
        inject_lora(network, scope="nowhere.*")
    equal(state(network), before)
    with pytest.raises(ValueError, match=r"cannot be adapted: 1 \(GRU\)"):
        inject_lora(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), scope=r"\d")
    with pytest.raises(ValueError, match="which part of Sequential is the decoder is not known"):
        inject_lora(nn.Sequential(nn.Linear(2, 2)), scope="decoder")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        inject_lora(network, rank=0)
    inject_lora(network, rank=1)
    with pytest.raises(ValueError, match="has adapters already"):
        inject_lora(network, rank=1)


def test_scopes_are_nested():
    with pytest.raises(ValueError, match="EfficientNetBN"):
        scope_pattern(EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2), "head")
    network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=3)
    names = adapted_layers(inject_lora(network, scope=r"features\.denseblock4\..*"))
    assert len(names) == 32


def test_a_seed_fixes_the_adapters_and_leaves_the_world_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    torch.manual_seed(5)
    for network in (one, two):
        inject_lora(network, seed=1, rank=2)
    equal(torch.rand(1), expected)
    equal(one[0].lora_A["default"].weight, two[0].lora_A["default"].weight)


def test_adapters_survive_copying_and_pickling():
    network = shake(inject_lora(small_unet(), rank=2))
    x = torch.rand(1, 3, 16, 16)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        equal(again(x), network(x))


def test_stored_adapters_come_back(tmp_path):
    plain = small_unet()
    network = shake(inject_lora(copy.deepcopy(plain), rank=2, alpha=8))
    save_adapter(network, tmp_path / "adapter")
    again = load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    x = torch.rand(1, 3, 16, 16)
    equal(again.eval()(x), network.eval()(x))
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(plain, tmp_path)


@pytest.mark.parametrize(
    "plain",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3)),
        nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 16, 2)),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 8)),
    ],
)
def test_stock_peft_loads_our_files_with_the_same_output(plain, tmp_path):
    from peft import PeftModel

    network = shake(inject_lora(copy.deepcopy(plain), rank=2, alpha=4))
    save_adapter(network, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    x = torch.randn(2, 3, *([8] * (3 if isinstance(plain[0], nn.Conv3d) else 2)))
    torch.testing.assert_close(stock(x), network(x), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, WeightLora) for module in stock.modules())


def test_adapters_for_other_weights_or_of_another_kind_are_refused(tmp_path):
    plain = small_unet()
    save_adapter(shake(inject_lora(copy.deepcopy(plain), rank=2)), tmp_path)
    with pytest.raises(CheckpointError, match="belong to weights with sha256"):
        load_adapter(small_unet(seed=1), tmp_path)
    config = tmp_path / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "r": 1}))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_adapter(copy.deepcopy(plain), tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(copy.deepcopy(plain), tmp_path)


def test_nothing_in_an_adapters_configuration_is_imported(tmp_path, monkeypatch):
    plain = small_unet()
    save_adapter(inject_lora(copy.deepcopy(plain), rank=2), tmp_path)
    config = tmp_path / "adapter_config.json"
    evil = {
        "auto_mapping": {"parent_library": "canary"},
        "base_model_name_or_path": "canary",
        "layer_replication": "$x",
    }
    config.write_text(json.dumps({**json.loads(config.read_text()), **evil}))
    (tmp_path / "canary.py").write_text("open('canary_ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    load_adapter(copy.deepcopy(plain), tmp_path)
    assert not (tmp_path / "canary_ran").exists()


def test_frozen_normalisation_keeps_every_buffer_in_train_mode():
    network = freeze_norm(small_unet())
    for again in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        before = state(again)
        again.train()(torch.rand(4, 3, 16, 16)).sum().backward()
        equal(state(again), before)


def test_the_control_without_freezing_moves_the_buffers():
    network = small_unet()
    before = state(network)
    network.train()(torch.rand(4, 3, 16, 16))
    assert any((network.state_dict()[name] != before[name]).any() for name in before if "running" in name)
    network = unfreeze_norm(freeze_norm(network))
    before = state(network)
    network.train()(torch.rand(4, 3, 16, 16))
    assert any((network.state_dict()[name] != before[name]).any() for name in before if "running" in name)


def test_a_student_is_a_copy_that_starts_as_the_original():
    original = small_unet()
    before = state(original)
    x = torch.rand(2, 3, 16, 16)
    for scope in ("all", "decoder", "full"):
        student = make_student(original, scope, rank=2, alpha=8).train()
        equal(student(x), original(x))
        for parameter in student.parameters():
            parameter.data += 1
    equal(state(original), before)
    assert all(p.requires_grad for p in make_student(original, "full").parameters())


def test_a_head_that_is_smaller_than_any_adapter_gets_rank_one_when_it_is_asked_for():
    network = inject_lora(small_unet(), rank=8, scope="head")
    (layer,) = adapted_layers(network).values()
    assert layer.r["default"] == 1
    assert "model.2.1.conv.unit0.conv" not in adapted_layers(inject_lora(small_unet(), rank=8, scope="all"))


def test_drift_is_limited_layer_by_layer_and_only_where_it_is_too_large():
    network = inject_lora(small_unet(), rank=2)
    shake(network)
    before = drift(network)
    cap = sorted(before.values())[len(before) // 2]
    limit_drift(network, cap)
    for name, value in drift(network).items():
        assert value == pytest.approx(min(before[name], cap), rel=1e-5)


def test_restoration_trains_nothing_but_a_copy_of_the_head():
    network = small_unet()
    before = copy.deepcopy(network.state_dict())
    student = make_restorable(network)
    heads = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert heads and all(name.startswith("model.2.1.conv.unit0.conv") for name in heads)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        student.train()(torch.rand(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == heads
    equal(network.state_dict(), before)


def test_restoration_merges_adapters_and_refuses_what_it_cannot_train():
    network = inject_lora(small_unet(), rank=2)
    shake(network)
    image = torch.rand(2, 3, 16, 16)
    student = make_restorable(network).eval()
    assert torch.equal(student(image), network.eval()(image)) and not adapted_layers(student)
    with pytest.raises(ValueError, match="matches nothing"):
        make_restorable(network, "nothing_like_it")


def test_a_part_can_start_anew_while_the_rest_stays():
    network, fresh = small_unet(), small_unet(seed=5)
    network.train()(torch.rand(4, 3, 16, 16))  # statistics that are not the initial ones
    student = make_restorable(network, "decoder", fresh)
    part = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert part and len(part) < len(list(student.parameters()))
    for name, value in student.state_dict().items():
        own = any(name.rpartition(".")[0] == other.rpartition(".")[0] for other in part)
        equal(value, (fresh if own else network).state_dict()[name])
    before = state(student)
    student.train()(torch.rand(4, 3, 16, 16))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(any(name.rpartition(".")[0] == other.rpartition(".")[0] for other in part) for name in moved)


def test_masked_logits_change_one_bias_and_nothing_else():
    network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=4).eval()
    masked = mask_logits(network, [2])
    image = torch.rand(2, 3, 32, 32)
    logits, wanted = masked(image), network(image)
    torch.testing.assert_close(logits[:, [0, 1, 3]], wanted[:, [0, 1, 3]])
    assert (logits[:, 2] < -1000).all()
    moved = [n for n, value in masked.state_dict().items() if not torch.equal(value, network.state_dict()[n])]
    assert moved == ["class_layers.out.bias"]


def test_statistics_drift_only_where_that_is_asked_for():
    image = torch.rand(4, 3, 16, 16)
    for freeze in (True, False):
        student = make_student(small_unet(), rank=2, freeze_statistics=freeze).train()
        before = copy.deepcopy(dict(student.named_buffers()))
        student(image)
        same = all(torch.equal(value, before[name]) for name, value in student.named_buffers())
        assert same == freeze


def test_a_held_part_is_the_originals_bit_for_bit_while_the_rest_trains():
    original = small_unet()
    student = shrink(original, small_unet(seed=1), 0.5)
    before = copy.deepcopy(student.state_dict())
    held = hold_part(student, original, r"model\.0(\..*)?")
    equal(student.state_dict(), before)
    optimizer = torch.optim.SGD([p for p in held.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        held.train()
        held(torch.rand(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    first, rest = ({n: v for n, v in held.state_dict().items() if n.startswith("model.0.") == inside}
                   for inside in (True, False))  # fmt: skip
    equal(first, {name: original.state_dict()[name] for name in first})
    moved = [name for name in rest if name.endswith(("weight", "running_mean"))]
    assert first and moved and not any(torch.equal(rest[name], before[name]) for name in moved)
    assert all(p.requires_grad != name.startswith("model.0.") for name, p in held.named_parameters())
    assert hold_part(student, original, None) is student and hold_part(student, original, "") is student


@pytest.mark.parametrize(
    ("scope", "message"), [("nowhere", "hold nothing: --frozen_scope ''"), (".*", "leaves nothing")]
)
def test_a_part_to_hold_that_is_none_or_all_is_refused(scope, message):
    with pytest.raises(ValueError, match=message):
        hold_part(small_unet(), small_unet(), scope)
    with pytest.raises(ValueError, match="adapters take lora_scope"):
        hold_part(make_student(small_unet()), small_unet(), scope)


def test_shrinking_mixes_weights_and_statistics_of_two_networks():
    original, fresh = small_unet(), small_unet(seed=1)
    before = copy.deepcopy(original.state_dict())
    half = shrink(original, fresh, 0.25)
    for name, value in half.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.25 * before[name] + 0.75 * fresh.state_dict()[name])
    equal(shrink(original, fresh, 1.0).state_dict(), before)
    equal(shrink(original, fresh, 0.0).state_dict(), fresh.state_dict())
    equal(original.state_dict(), before)
    assert all(parameter.requires_grad for parameter in half.parameters())
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        shrink(original, fresh, 1.5)
    with pytest.raises(ValueError, match="other weights"):
        shrink(original, nn.Linear(1, 1), 0.5)
