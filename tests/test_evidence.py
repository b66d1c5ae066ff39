# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""The further evidence: what attacks see, references that saw some cases, durability, equivalence, any two models."""

import copy
import math
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import small_unet
from monai.inferers import SlidingWindowInferer
from torch import nn
from toy import ITEMS, dataset, draw

from monai_unlearn import MemoryDataset, make_student, merge_lora, save_weights
from monai_unlearn.audit import (
    References,
    anamnesis_index,
    attack,
    auc_resolution,
    audit,
    audit_weights,
    bootstrap_difference,
    bootstrap_mean,
    compare_cases,
    epsilon,
    equivalence,
    expected_calibration_error,
    js_divergence,
    judge_verdict,
    likelihood_ratio,
    lira,
    membership_table,
    non_inferiority,
    relearn_curve,
    removable,
    residual_memory,
    residual_profiles,
    retained_leak,
    rmia,
    rounded,
    score_cases,
    seed_margin,
    strongest_attack,
    surface_band,
    tug_of_war,
    two_version_leak,
    with_statistics_of,
    write_report,
)
from monai_unlearn.audit.durability import durability_warnings
from monai_unlearn.audit.membership import attacked_scores
from monai_unlearn.audit.residual import coloured
from monai_unlearn.audit.scores import BINS, detailed_scores, rows_of, summary
from monai_unlearn.audit.statistics import group_means
from monai_unlearn.audit.verdict import controls, equivalence_to_retrained
from monai_unlearn.lora import save_adapter
from monai_unlearn.request import DeletionRequest, Resolution

RNG = np.random.default_rng(0)


# what an attack sees --------------------------------------------------------------------------------------------------


def test_the_band_lies_on_both_sides_of_the_surface():
    label = torch.zeros(1, 1, 20, 20)
    label[..., 6:14, 6:14] = 1
    band = surface_band(label)
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[3:17, 3:17] = True
    expected[9:11, 9:11] = False
    assert torch.equal(band[0, 0], expected)
    assert not surface_band(torch.zeros(1, 1, 9, 9)).any() and not surface_band(torch.ones(1, 1, 9, 9)).any()
    volume = torch.zeros(1, 2, 12, 12, 12)
    volume[:, 1, 4:8, 4:8, 4:8] = 1
    volume[:, 0] = 1 - volume[:, 1]
    assert surface_band(volume, 1).sum() == 6**3 - 2**3


def test_scores_near_the_surface_have_their_closed_form():
    label = torch.zeros(1, 1, 20, 20)
    label[..., 6:14, 6:14] = 1
    logits = torch.full_like(label, math.log(0.8 / 0.2)) * (2 * label - 1)  # .8 for the true class everywhere
    logits[..., 0, 0] = 5.0  # one sure mistake, away from the band
    rows = detailed_scores(logits, label)
    assert rows["band_loss"].item() == pytest.approx(-math.log(0.8))
    assert rows["band_logit"].item() == pytest.approx(math.log(0.8 / 0.2))
    worst = math.log1p(math.exp(5.0))
    assert rows["top_loss"].item() == pytest.approx((worst + 3 * -math.log(0.8)) / 4)  # 1 % of 400 voxels
    assert rows["volume_error"].item() == pytest.approx(1 / 400)
    wrong = 1 / (1 + math.exp(-5.0))
    assert rows["brier"].item() == pytest.approx((399 * 0.04 + wrong**2) / 400)
    ece = expected_calibration_error(rows["calibration"].numpy())
    assert ece == pytest.approx((399 * 0.2 + wrong) / 400, abs=1e-6)  # .8 sure, always right
    assert expected_calibration_error(rows["calibration_band"].numpy()) == pytest.approx(0.2, abs=1e-6)
    assert "flip" not in rows and detailed_scores(logits, label, flipped=logits)["flip"].item() == 1


def test_scores_without_a_surface_are_undefined_and_said_so():
    empty, full = torch.full((1, 1, 8, 8), -9.0), torch.full((1, 1, 8, 8), 9.0)
    zeros, ones = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    rows = detailed_scores(empty, zeros)
    assert rows["band_loss"].isnan() and rows["hd95"] == 0 and rows["nsd"] == 1
    for logits, label in ((full, zeros), (empty, ones)):
        rows = detailed_scores(logits, label)
        assert rows["hd95"].isnan() and rows["nsd"] == 0
    case = {"iou": np.zeros(2), "loss": np.zeros(2), "area": np.array([0.0, 0.5]), "hd95": np.array([np.nan, 3.0])}
    assert summary(case)["mean_hd95"] == 3 and summary(case)["n_hd95_undefined"] == 1


def test_surface_distances_agree_with_a_shifted_square():
    label, logits = torch.zeros(1, 1, 24, 24), torch.full((1, 1, 24, 24), -9.0)
    label[..., 6:14, 6:14] = 1
    logits[..., 9:17, 6:14] = 9
    rows = detailed_scores(logits, label)
    assert rows["hd95"].item() == pytest.approx(3)
    assert 0 < rows["nsd"].item() < 1 and detailed_scores(20 * label - 10, label)["nsd"] == 1


def test_several_channels_score_like_one_where_there_are_two_classes():
    label = (torch.rand(3, 1, 16, 16) > 0.6).float()
    logits = torch.randn(3, 1, 16, 16)
    two = detailed_scores(torch.cat([torch.zeros_like(logits), logits], 1), torch.cat([1 - label, label], 1))
    for name, values in detailed_scores(logits, label).items():
        scale = 2 if name == "brier" else 1  # the sum over two classes
        torch.testing.assert_close(two[name], scale * values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_voxels_outside_the_region_do_not_count():
    label = torch.zeros(1, 1, 16, 16)
    label[..., 2:7, 2:7] = 1
    logits = torch.randn(1, 1, 16, 16)
    region = torch.zeros(1, 1, 16, 16)
    region[..., :10, :10] = 1
    changed = torch.where(region > 0, logits, torch.full_like(logits, 8.0))
    one, other = (detailed_scores(x, label, region) for x in (logits, changed))
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    assert one["calibration"][0, 0].sum() == 100


def test_the_modified_entropy_has_its_closed_form_and_rows_do_not_mix():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    label = torch.eye(3)[[0, 0]]
    rows = detailed_scores(p.log(), label)
    assert rows["modified_entropy"][0].item() == pytest.approx(0.1622, abs=5e-5)
    alone = torch.cat([detailed_scores(p[i : i + 1].log(), label[i : i + 1])["modified_entropy"] for i in range(2)])
    torch.testing.assert_close(rows["modified_entropy"], alone)
    assert rows["modified_entropy"][1] > rows["modified_entropy"][0]  # sure and wrong stands out
    assert rows["calibration"].shape == (2, 3, BINS) and rows["calibration"][:, 0].sum() == 2
    torch.testing.assert_close(rows["brier"], torch.tensor([0.09 + 0.04 + 0.01, 0.81 + 0.64 + 0.01]))


def test_detailed_scores_do_not_depend_on_the_batch_and_leave_the_network():
    network = small_unet().train()
    before = copy.deepcopy(dict(network.state_dict()))
    one, other = (score_cases(network, dataset(), batch_size=size, detailed=True) for size in (1, 5))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-4)
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert network.training and {"flip", "band_logit", "hd95"} <= set(one)


# attacks --------------------------------------------------------------------------------------------------------------


def test_likelihood_attacks_have_their_closed_forms():
    assert likelihood_ratio(np.array(0.9), np.array(0.5), 0) == pytest.approx(1.2)
    assert likelihood_ratio(np.array(0.9), np.array(0.5), 1) == pytest.approx(1.8)
    assert lira(np.array(2.0), 2.0, 1.0, 0.0, 1.0) == pytest.approx(2)
    out = np.full(4, 0.5)
    shares = rmia(np.array([0.9, 0.5]), out[:2], np.array([0.2, 0.6, 0.8, 0.95]), out)
    assert shares.tolist() == [0.75, 0.25]
    same = rmia(np.array([0.1, 0.2, 0.3]), out[:3], np.array([0.1, 0.2, 0.3]), out[:3], same=True)
    assert same.tolist() == [0, 0.5, 1]


def rows_for(number, level, difficulty, seed):
    rng = np.random.default_rng(seed)
    iou = level + difficulty + rng.normal(0, 0.02, number)
    return {"iou": iou, "loss": 1 - iou, "likelihood": np.exp(iou - 1), "area": np.full(number, 0.2)}


HARD = {name: RNG.normal(0, 0.1, number) for name, number in (("forget", 40), ("holdout", 80), ("retain", 60))}
GROUPS = {name: [f"{name}{i}" for i in range(len(values))] for name, values in HARD.items()}


def model(forget, holdout=0.70, retain=0.9, seed=0):
    levels = {"forget": forget, "holdout": holdout, "retain": retain}
    return {n: rows_for(len(HARD[n]), level, HARD[n], seed + i) for i, (n, level) in enumerate(levels.items())}


JUDGE, ORIGINAL, FORGOT = model(0.64, 0.64, 0.64, 90), model(0.9, seed=10), model(0.70, seed=30)


def test_every_attack_of_the_family_finds_memory_and_nothing_where_there_is_none():
    for name, sides in attacked_scores(ORIGINAL, JUDGE, GROUPS).items():
        assert attack(*sides)["auc"] > 0.8, name
    table = membership_table({"unlearned": FORGOT}, JUDGE, GROUPS)["unlearned"]
    for name in ("calibrated", "calibrated_loss", "rmia"):
        assert abs(table[name]["auc"] - 0.5) < 0.12 and table[name]["direction"] == "none"
    assert table["raw"]["null"] == pytest.approx(attack(*attacked_scores(JUDGE, None, GROUPS)["raw"])["auc"])
    assert set(attacked_scores(ORIGINAL, None, GROUPS)) == {"raw", "raw_loss"}


def test_the_strongest_attack_is_chosen_and_tested_on_different_patients():
    assert strongest_attack(ORIGINAL, JUDGE, GROUPS)["auc"] > 0.95
    over_forgotten = strongest_attack(model(0.1, seed=10), JUDGE, GROUPS)  # an AUC of 0 is as strong as one of 1
    assert over_forgotten["auc"] < 0.05 and over_forgotten["direction"] == "over-forgotten"
    found = strongest_attack(FORGOT, JUDGE, GROUPS)
    assert (found["n_forget"], found["n_holdout"]) == (20, 40) and not found["attack"].startswith("raw")
    over, values = 0, []
    for seed in range(40):  # noise alone: chosen on one half it does not stand out on the other
        rng = np.random.default_rng(seed)
        noise = {s: {k: rng.normal(0, 1, n) for k in ("iou", "loss", "band_loss", "band_logit", "top_loss")}
                 for s, n in (("forget", 30), ("holdout", 60))}  # fmt: skip
        zero = {s: {k: np.zeros(n) for k in noise[s]} for s, n in (("forget", 30), ("holdout", 60))}
        row = strongest_attack(noise, zero, {s: [f"{s}{i}" for i in range(len(noise[s]["iou"]))] for s in noise}, seed)
        over += row["ci"][0] > 0.5 or row["ci"][1] < 0.5
        values.append(row["auc"])
    assert abs(np.mean(values) - 0.5) < 0.05 and over <= 7
    assert strongest_attack(ORIGINAL, JUDGE, {**GROUPS, "forget": ["one"] * 40}) is None


def test_two_versions_give_the_forgotten_away_and_those_who_stay_are_looked_at():
    assert two_version_leak(ORIGINAL, FORGOT, GROUPS)["auc"] > 0.95
    assert abs(two_version_leak(ORIGINAL, model(0.9, seed=50), GROUPS)["auc"] - 0.5) < 0.15
    seen = {**JUDGE, "retain": {k: np.where(np.arange(60) < 20, np.nan, v) for k, v in JUDGE["retain"].items()}}
    row = retained_leak(ORIGINAL, seen, GROUPS)
    assert row["n_retain"] == 40 and row["n_holdout"] == 80 and row["auc"] > 0.95  # the reference saw the other 20
    assert two_version_leak(ORIGINAL, FORGOT, GROUPS)["n_retain"] == 60


def test_an_attack_says_what_so_few_patients_resolve():
    assert auc_resolution(10, 10) == pytest.approx(1.96 * math.sqrt(21 / 1200))
    few = attack(RNG.normal(0, 1, 10), RNG.normal(0, 1, 30))
    assert few["resolution"] == pytest.approx(auc_resolution(10, 30)) and few["tpr_at_1pct_fpr"] is None
    assert attack(np.array([1.0, 2.0, np.nan]), RNG.normal(0, 1, 100))["n_forget"] == 2
    assert attack(RNG.normal(9, 1, 10), RNG.normal(0, 1, 100))["tpr_at_1pct_fpr"] == 1


# statistics -----------------------------------------------------------------------------------------------------------


def test_epsilon_takes_the_larger_of_two_ratios():
    assert epsilon(0.1, 0.1) == pytest.approx(math.log(9))
    assert epsilon(0.5, 0.5) == 0 and epsilon(0.2, 0.0) == math.inf
    assert epsilon(0.4, 0.1) == pytest.approx(math.log(6)) == epsilon(0.1, 0.4)


def test_equivalence_needs_the_interval_inside_the_margin():
    assert equivalence(0.0, (-0.01, 0.019), 0.02)["ok"] and not equivalence(0.0, (-0.03, 0.01), 0.02)["ok"]
    few, many = RNG.normal(0, 0.1, 8), RNG.normal(0, 0.1, 2000)
    few -= few.mean()  # no difference at all, and yet too few to say so
    assert not equivalence(0, bootstrap_mean(few, range(8), level=0.9), 0.02)["ok"]
    assert equivalence(0, bootstrap_mean(many - many.mean(), range(2000), level=0.9), 0.02)["ok"]


def test_non_inferiority_is_neither_shown_nor_refuted_where_the_data_do_not_tell():
    assert non_inferiority(RNG.normal(0, 0.01, 200), range(200), 0.01)["ok"]
    assert non_inferiority(RNG.normal(-0.05, 0.01, 200), range(200), 0.01)["worse"]
    open_question = non_inferiority(RNG.normal(-0.01, 0.1, 12), range(12), 0.01)
    assert not open_question["ok"] and not open_question["worse"]


def test_the_difference_of_two_sets_has_the_width_of_the_formula():
    a, b = RNG.normal(0, 1, 80), RNG.normal(0, 1, 120)
    low, high = bootstrap_difference(a, range(80), b, range(120))
    width = 2 * 1.96 * math.sqrt(a.var() / 80 + b.var() / 120)
    assert high - low == pytest.approx(width, rel=0.05)
    assert low < a.mean() - b.mean() < high


def test_the_margin_of_seeds_is_what_they_differ_by_and_never_less_than_asked():
    q = RNG.normal(0.7, 0.1, 60)
    assert seed_margin(q, q, range(60), 0.02) == 0.02
    assert seed_margin(q, q + 0.05, range(60), 0.02) == pytest.approx(0.05)


def test_groups_without_a_defined_value_are_undefined():
    means = group_means([1.0, np.nan, np.nan, 4.0], ["a", "a", "b", "c"])
    assert means[0] == 1 and np.isnan(means[1]) and means[2] == 4


# distance -------------------------------------------------------------------------------------------------------------


def test_divergence_is_bounded_finite_and_symmetric():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert js_divergence(p, q).item() == pytest.approx(0.3113, abs=5e-5)
    assert js_divergence(q, 1 - q).item() == pytest.approx(1) and js_divergence(q, q).item() == 0
    single = torch.tensor([[0.3]]), torch.tensor([[0.9]])
    pair = [torch.cat([x, 1 - x], 1) for x in single]
    torch.testing.assert_close(js_divergence(*single), js_divergence(*pair))
    torch.testing.assert_close(js_divergence(*pair), js_divergence(*pair[::-1]))
    from scipy.spatial.distance import jensenshannon

    a, b = torch.rand(5, 4).softmax(1), torch.rand(5, 4).softmax(1)
    theirs = [jensenshannon(x, y, base=2) ** 2 for x, y in zip(a.numpy(), b.numpy())]
    np.testing.assert_allclose(js_divergence(a, b).numpy(), theirs, atol=1e-6)


def test_a_model_agrees_with_itself_and_less_with_another():
    networks = {"same": small_unet(), "other": small_unet(seed=3), "retrained": small_unet()}
    rows = compare_cases(networks, "retrained", dataset(), batch_size=5)
    assert set(rows) == {"same", "other"}
    assert (rows["same"]["agreement"] == 1).all() and (rows["same"]["js"] == 0).all()
    assert rows["other"]["js"].mean() > 0 and rows["other"]["js_band"].shape == (12,)
    assert tug_of_war([0.1, 0.2, 0.0]) == pytest.approx(0.72)


# references -----------------------------------------------------------------------------------------------------------


def test_each_case_is_judged_only_by_models_that_never_saw_it():
    items = [{**item, "fold": int(item["image"]) % 3} for item in ITEMS]
    networks = {fold: small_unet(seed=fold) for fold in range(3)}
    references = References.of_folds(networks, items)
    sets = {"forget": MemoryDataset(items, draw)}
    rows = references.score(sets)["forget"]
    for index, item in enumerate(items):
        alone = score_cases(networks[item["fold"]], MemoryDataset([item], draw))
        assert rows["iou"][index] == pytest.approx(alone["iou"][0])
        assert rows["likelihood"][index] == pytest.approx(math.exp(-alone["loss"][0]))
    with pytest.raises(ValueError, match="no reference model for fold 2"):
        References.of_folds({0: networks[0], 1: networks[1]}, items)
    with pytest.raises(ValueError, match="no reference model for fold unknown"):
        References.of_folds(networks, [{"image": "a"}])
    unseen = [{"image": "a", "fold": "1"}, {"image": "b", "fold": 7}, {"image": "c"}]
    everyone = References.of_folds(networks, items, unseen)
    assert [len(everyone.never_saw(item)) for item in (items[0], *unseen)] == [1, 1, 3, 3]


def test_every_case_has_equally_many_references_and_none_is_an_error():
    items = [dict(item) for item in ITEMS]
    networks = [small_unet(seed=seed) for seed in range(3)]
    saw = [{items[0]["image"]}, {items[0]["image"]}, set()]
    split = {"forget": MemoryDataset(items[:1], draw), "holdout": MemoryDataset(items[1:], draw)}
    rows = References(networks, saw).score(split)
    each = [score_cases(network, split["holdout"])["iou"] for network in networks]
    for index, value in enumerate(rows["holdout"]["iou"]):  # one of the three, and not a mean of several
        assert min(abs(value - one[index]) for one in each) < 1e-9
    chosen = {min(range(3), key=lambda k: abs(each[k][i] - v)) for i, v in enumerate(rows["holdout"]["iou"])}
    assert len(chosen) > 1
    everywhere = References(networks, [set()] * 3).score(split)
    np.testing.assert_allclose(everywhere["holdout"]["iou"], np.mean(each, 0))
    with pytest.raises(ValueError, match="1 forget or unseen cases were seen by every reference"):
        References(networks, [{items[0]["image"]}] * 3).score(split)


def test_retained_cases_that_a_reference_saw_stay_undefined():
    items = [dict(item) for item in ITEMS]
    parts = {"forget": items[:4], "holdout": items[4:8], "retain": items[8:]}
    sets = {name: MemoryDataset(part, draw) for name, part in parts.items()}
    rows = References([small_unet()], [{items[8]["image"], items[9]["image"]}]).score(sets, detailed=True)
    assert np.isnan(rows["retain"]["iou"]).tolist() == [True, True, False, False]
    everything = References([small_unet()], [{item["image"] for item in items[8:]}]).score(sets)
    assert set(everything) == {"forget", "holdout"}
    assert not np.isnan(rows["forget"]["iou"]).any() and rows["retain"]["calibration"].shape == (4, 3, BINS)


# durability -----------------------------------------------------------------------------------------------------------


def test_relearning_trains_a_copy_and_repeats():
    network = small_unet()
    before = copy.deepcopy(dict(network.state_dict()))
    state = torch.get_rng_state()
    options = {"loss": nn.BCEWithLogitsLoss(), "steps": (0, 3, 6), "learning_rate": 1e-2, "batch_size": 4}
    curves = [relearn_curve(network, dataset(), dataset(), **options) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert curves[0] == curves[1] and [at["steps"] for at in curves[0]] == [0, 3, 6]
    assert curves[0][0]["score"] == pytest.approx(score_cases(network, dataset())["iou"].mean())
    assert curves[0][-1]["score"] != curves[0][0]["score"]
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    still = relearn_curve(network, dataset(), dataset(), **{**options, "learning_rate": 0.0})
    assert len({at["score"] for at in still}) == 1
    whole = relearn_curve(network, dataset(), dataset(), **options, inferer=SlidingWindowInferer(16, overlap=0.0))
    assert whole[-1]["score"] == pytest.approx(curves[0][-1]["score"], abs=1e-4)
    all_of_it = relearn_curve(network, dataset(), dataset(), **options, patch_size=(16, 16))
    patches = relearn_curve(network, dataset(), dataset(), **options, patch_size=(8, 8))
    assert len(all_of_it) == 3 and patches[0] == curves[0][0] and patches[-1] != curves[0][-1]


def test_the_relearning_index_interpolates_and_says_when_a_curve_never_gets_there():
    def curve(*scores):
        return [{"steps": 10.0 * n, "score": s} for n, s in enumerate(scores)]

    found = anamnesis_index(curve(0.5, 0.7, 0.9), curve(0.5, 0.6, 0.7, 0.9), 0.8)
    assert found["unlearned"] == pytest.approx(15) and found["retrained"] == pytest.approx(25)
    assert found["ain"] == pytest.approx(0.6)
    assert anamnesis_index(curve(0.9), curve(0.5, 0.6), 0.8) == {
        "unlearned": 0,
        "retrained": None,
        "level": 0.8,
        "ain": None,
    }


def test_a_set_that_comes_back_by_itself_is_told():
    def curves(*ends):
        return {name: [{"steps": 0, "score": 0.7}, {"steps": 40, "score": end}]
                for name, end in zip(("unlearned", "retrained"), ends)}  # fmt: skip

    assert durability_warnings({"benign": curves(0.72, 0.70), "forget": curves(0.95, 0.7)}) == []
    (warning,) = durability_warnings({"benign": curves(0.80, 0.71), "unrelated": curves(0.7, 0.7)})
    assert "40 steps of training on retained cases" in warning and "0.100 (the retrained model: 0.010)" in warning
    assert durability_warnings({}) == []


def test_rounding_keeps_every_weight_within_half_a_step():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, 2))
    before = copy.deepcopy(network.state_dict())
    for precision, levels in (("int8", 127), ("int4", 7)):
        new = rounded(network, precision)
        for index, axis in ((0, 0), (1, 1), (3, 0)):
            weight, changed = network[index].weight.detach(), new[index].weight
            others = [dim for dim in range(weight.ndim) if dim != axis]
            scale = weight.abs().amax(others, keepdim=True) / levels
            assert ((weight - changed).abs() <= scale / 2 + 1e-7).all() and not torch.equal(weight, changed)
            torch.testing.assert_close((changed / scale).round(), changed / scale, atol=1e-3, rtol=0)
        assert torch.equal(new[2].weight, network[2].weight) and torch.equal(new[0].bias, network[0].bias)
    half = rounded(network, "bf16")[0].weight
    assert torch.equal(half, half.bfloat16().float())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        rounded(network, "int3")


def test_statistics_are_put_back_on_a_copy_where_they_moved():
    original, drifted = small_unet(), small_unet()
    assert with_statistics_of(drifted, original) is None
    drifted.train()(torch.rand(4, 3, 16, 16))
    moved = copy.deepcopy(dict(drifted.named_buffers()))
    restored = with_statistics_of(drifted.eval(), original)
    for name, value in restored.named_buffers():
        assert torch.equal(value, dict(original.named_buffers())[name])
    for name, value in drifted.named_buffers():
        assert torch.equal(value, moved[name])


def test_weights_with_adapters_are_recognised():
    assert not removable(small_unet().state_dict())
    assert removable(make_student(small_unet(), "all").state_dict())


# residual memory ------------------------------------------------------------------------------------------------------


def test_residual_memory_is_the_difference_of_the_losses():
    unlearned, others = small_unet(), References([small_unet(seed=1), small_unet(seed=2)])
    maps = list(residual_memory(unlearned, others, dataset()))
    losses = [score_cases(network, dataset())["loss"] for network in (unlearned, *others.networks)]
    np.testing.assert_allclose([m.mean() for m in maps], losses[0] - np.mean(losses[1:], 0), atol=1e-5)
    zero = list(residual_memory(unlearned, References([small_unet()]), dataset()))
    assert all((m == 0).all() for m in zero)


def test_profiles_and_maps_of_the_forget_cases_are_private(tmp_path):
    sets = {"forget": MemoryDataset(ITEMS[:3], draw), "holdout": MemoryDataset(ITEMS[3:], draw)}
    found = residual_profiles(small_unet(), References([small_unet(seed=1)]), sets, folder=tmp_path, key=b"k" * 16)
    assert set(found) == {"forget", "holdout"} and len(found["forget"]["profile"]) == 25
    files = sorted((tmp_path / "residual_memory").iterdir())
    assert len(files) == 3 and all(len(path.stem) == 12 and path.stat().st_mode & 0o077 == 0 for path in files)
    assert (tmp_path / "residual_memory").stat().st_mode & 0o077 == 0
    red, blue = coloured(np.array([[-2.0]]))[0, 0], coloured(np.array([[1.0]]))[0, 0]
    assert red.tolist() == [1, 0, 0, 1] and blue.tolist() == [0, 0, 1, 0.5]


def test_maps_of_volumes_keep_their_affine(tmp_path):
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.double))
    affine[:3, 3] = torch.tensor([5.0, -7.0, 9.0])

    def volume(item):
        label = torch.zeros(2, 8, 8, 8)
        label[1, 2:5, 2:5, 2:5] = 1
        label[0] = 1 - label[1]
        return {"image": torch.rand(1, 8, 8, 8), "label": label, "affine": affine}

    class Head(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(bias))

        def forward(self, x):
            return torch.cat([x, -x + self.bias], 1)

    sets = {name: MemoryDataset([{"image": f"{name}{i}", "label": "m"} for i in range(2)], volume)
            for name in ("forget", "holdout")}  # fmt: skip
    residual_profiles(Head(0.3), References([Head(0.0)]), sets, folder=tmp_path)
    written = nib.load(next((tmp_path / "residual_memory").glob("*.nii.gz")))
    np.testing.assert_allclose(written.affine, affine.numpy())
    assert written.shape == (8, 8, 8)


# verdict --------------------------------------------------------------------------------------------------------------


def verdict(unlearned, job="deletion", tier=1, scores=None, **options):
    scores = {"original": ORIGINAL, "unlearned": unlearned, **({"judge": JUDGE} if tier else {}), **(scores or {})}
    resolution = Resolution(DeletionRequest({"ids": ["a"]}, job=job), [], [], [], {})
    out = scores.get("judge")
    table = membership_table({n: scores[n] for n in ("original", "unlearned")}, out, GROUPS)
    groups = {**GROUPS, "holdout_alike": GROUPS["holdout"][:40]}
    found = controls(scores, table, GROUPS, 0)
    return judge_verdict(resolution, scores, groups, 0.70 if tier else None, table, found, **options)


def test_without_references_a_pass_is_impossible_and_a_failure_is_not():
    name, reasons = verdict(FORGOT, tier=0)
    assert name == "INCONCLUSIVE" and "tier 0" in reasons[0]
    name, reasons = verdict(model(0.99, seed=10), tier=0)
    assert name == "FAIL" and "(raw)" in reasons[0] and "remembered" in reasons[0]
    assert verdict(model(0.3, seed=10), tier=0)[0] == "FAIL"
    assert "unseen cases lost" in verdict(model(0.7, holdout=0.6, seed=10), tier=0)[1][0]


def test_a_model_with_adapters_that_come_off_is_suppressed_only():
    assert verdict(FORGOT)[0] == "NOT REFUTED"
    name, reasons = verdict(FORGOT, removable=True)
    assert name == "FAIL" and "suppression" in reasons[0]


def test_the_strongest_attack_counts_too():
    row = {"attack": "calibrated_band_loss", "auc": 0.8, "ci": [0.7, 0.9], "direction": "remembered", "resolution": 0.1}
    name, reasons = verdict(FORGOT, strongest=row)
    assert name == "FAIL" and "calibrated band loss, the strongest" in reasons[0]
    handful = {**row, "auc": 0.0, "ci": [0.0, 0.0], "resolution": auc_resolution(2, 4)}  # two of two: chance does that
    assert verdict(FORGOT, strongest=handful)[0] == "NOT REFUTED"
    assert verdict(FORGOT, strongest={**handful, "resolution": auc_resolution(20, 40)})[0] == "FAIL"


def test_a_right_score_with_outputs_far_from_the_retrained_models_fails():
    """Half the way from the original's divergence of .5 to a second retrained model's of .1 is .3, the margin .01."""

    def found(js, **models):
        rows = {"original": {"js": np.full(40, 0.5)}, "retrained_other": {"js": np.full(40, 0.1)}, **models}
        return verdict(FORGOT, compared={"forget": rows | {"unlearned": {"js": js}}})

    noise = RNG.normal(0, 0.02, 40)
    name, reasons = found(0.35 + noise)
    assert name == "FAIL" and "diverge by 0.3" in reasons[0] and "(the original's by 0.500" in reasons[0]
    for js in (0.1 + noise, 0.25 + noise, np.full(40, 0.309), np.where(np.arange(40) < 4, 0.9, 0.25)):
        assert found(js)[0] == "NOT REFUTED", js.mean()  # the last: a few patients far off are no evidence
    assert found(np.full(40, 0.311))[0] == "FAIL"
    alike = {"js": np.full(40, 0.1)}  # nothing was memorised: a small step away from both is none
    assert found(np.full(40, 0.105), original=alike)[0] == "NOT REFUTED"
    alone = {"unlearned": {"js": np.full(40, 0.9)}, "original": {"js": np.full(40, 0.5)}}
    assert verdict(FORGOT, compared={"forget": alone})[0] == "NOT REFUTED"  # how far two of them lie apart is unknown


def test_a_revision_looks_at_unseen_cases_of_the_device():
    def with_alike(rows, shift):
        alike = {k: v[:40] + shift if k == "iou" else v[:40] for k, v in rows["holdout"].items()}
        return {**rows, "holdout_alike": alike}

    retrained = with_alike(model(0.70, seed=40), 0.0)
    assert verdict(with_alike(FORGOT, 0.0), "revision", scores={"retrained": retrained})[0] == "NOT REFUTED"
    name, reasons = verdict(with_alike(FORGOT, 0.1), "revision", scores={"retrained": retrained})
    assert name == "FAIL" and "unseen cases like the forgotten" in " ".join(reasons)


def test_equivalence_needs_every_one_of_its_parts():
    number = 400
    groups = {name: [f"{name}{i}" for i in range(number)] for name in ("forget", "holdout")}
    hard = RNG.normal(0, 0.1, number)

    def rows(level, seed):
        return {name: rows_for(number, level, hard, seed + i) for i, name in enumerate(groups)}

    scores = {"unlearned": rows(0.7, 1), "retrained": rows(0.7, 5), "retrained_other": rows(0.7, 9)}
    same = {"agreement": np.full(number, 0.8), "js": np.full(number, 0.05)}
    compared = {"forget": {"unlearned": same, "retrained_other": same}}
    limits = {"forget": 0.02, "utility": 0.02}
    found = equivalence_to_retrained(scores, compared, groups, limits, 0)
    assert found["ok"] and found["forget"]["margin"] == 0.02
    assert verdict(FORGOT, equivalent=found)[0] == "RETRAIN-EQUIVALENT"
    assert verdict(ORIGINAL, equivalent=found)[0] == "FAIL"
    far = {"agreement": np.full(number, 0.7), "js": np.full(number, 0.05)}
    assert not equivalence_to_retrained(
        scores, {"forget": {**compared["forget"], "unlearned": far}}, groups, limits, 0
    )["ok"]
    assert not equivalence_to_retrained({**scores, "unlearned": rows(0.8, 1)}, compared, groups, limits, 0)["ok"]
    small = {name: {s: rows_of(r, np.arange(number) < 6) for s, r in m.items()} for name, m in scores.items()}
    short = {"forget": {n: rows_of(r, np.arange(number) < 6) for n, r in compared["forget"].items()}}
    small["unlearned"]["forget"]["iou"] = small["unlearned"]["forget"]["iou"] + np.linspace(-0.1, 0.1, 6)
    assert not equivalence_to_retrained(small, short, {n: g[:6] for n, g in groups.items()}, limits, 0)["ok"]
    assert equivalence_to_retrained({"unlearned": FORGOT, "retrained": FORGOT}, compared, groups, limits, 0) is None


# any two models -------------------------------------------------------------------------------------------------------


LISTS = {
    "forget": [{"image": str(i), "label": "m", "patient_id": f"p{i}"} for i in range(6)],
    "retain": [{"image": str(i), "label": "m"} for i in range(6, 16)],
    "holdout": [{"image": str(i), "label": "m"} for i in range(16, 30)],
}


def test_any_two_models_are_audited_from_their_weights(tmp_path):
    save_weights(small_unet(), tmp_path / "o.pt")
    weights = {"original": tmp_path / "o.pt", "unlearned": small_unet(seed=1).state_dict()}
    report = audit_weights(
        lambda: small_unet(seed=9), weights, LISTS, draw, references=[small_unet(seed=2).state_dict()]
    )
    assert report["tier"] == 1 and report["splits"] == {"forget": 6, "retain": 10, "holdout": 14}
    assert report["cost"]["unlearn_seconds"] is None and report["relearn"] is None
    assert "relearning curves and benign fine-tuning" in report["not_tested"]
    assert "how they were made is not known" in Path(write_report(report, tmp_path)).read_text()
    bare = audit_weights(small_unet, weights, LISTS, draw)
    assert bare["tier"] == 0 and bare["expected_unseen"] is None and bare["verdict"] != "NOT REFUTED"
    assert "tier 0" in Path(write_report(bare, tmp_path)).read_text()
    alone = {name: LISTS[name] for name in ("forget", "holdout")}
    report = audit_weights(small_unet, weights, alone, draw, references=[small_unet(seed=2).state_dict()])
    assert report["splits"]["retain"] == 0 and report["leaks"] is None and report["tug_of_war"] is None
    assert "retain" not in report["scores"]["unlearned"]
    write_report(report, tmp_path)
    with pytest.raises(ValueError, match="0 stands under forget and under holdout"):
        audit_weights(small_unet, weights, {**LISTS, "holdout": LISTS["forget"]}, draw)
    with pytest.raises(ValueError, match="needs a data list of holdout cases"):
        audit_weights(small_unet, weights, {"forget": LISTS["forget"]}, draw)


def test_two_retrained_models_make_the_third_tier(tmp_path):
    networks = {"original": 0, "unlearned": 1, "retrained": 3, "retrained_other": 4}
    weights = {name: small_unet(seed=seed).state_dict() for name, seed in networks.items()}
    report = audit_weights(small_unet, weights, LISTS, draw, references=[small_unet(seed=2).state_dict()])
    assert report["tier"] == 2 and set(report["agreement"]) == {"original", "unlearned", "retrained_other"}
    assert report["equivalence"]["forget"]["margin"] >= 0.02 and report["tug_of_war"]["unlearned"] <= 1
    assert report["floor"].keys() == {"forget", "retain", "holdout"}
    assert "case by case" in Path(write_report(report, tmp_path)).read_text()


def test_one_patient_gets_a_rank_and_no_area(tmp_path):
    lists = {**LISTS, "forget": [{**item, "patient_id": "one"} for item in LISTS["forget"]]}
    networks = {"original": 0, "unlearned": 1, "retrained": 3, "retrained_other": 4}
    weights = {name: small_unet(seed=seed).state_dict() for name, seed in networks.items()}
    report = audit_weights(small_unet, weights, lists, draw, references=[small_unet(seed=2).state_dict()])
    assert report["membership"]["unlearned"]["calibrated"]["auc"] is None
    assert report["controls"]["positive"]["rank_test"]["p_up"] >= 1 / 15
    assert len(report["cases"]) == 1 and report["strongest_attack"]["unlearned"] is None
    assert not report["equivalence"]["ok"]
    assert "one patient, so no interval" in Path(write_report(report, tmp_path)).read_text()


def test_subgroups_need_their_column():
    weights = {"original": small_unet().state_dict(), "unlearned": small_unet(seed=1).state_dict()}
    with pytest.raises(ValueError, match="no column 'site'"):
        audit_weights(small_unet, weights, LISTS, draw, subgroups=["site"])


def test_the_page_renders_in_a_browser(tmp_path):
    """No broken figure, nothing fetched, no error in the console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a browser: chromium, chromium-browser or google-chrome on the PATH")
    networks = {"original": small_unet(), "unlearned": small_unet(seed=1), "retrained": small_unet(seed=3)}
    items = [{**item, "group": item["image"]} for item in ITEMS]
    holdout = [{"image": str(i), "label": "m", "group": f"h{i}"} for i in range(50, 58)]
    resolution = Resolution(DeletionRequest({"ids": ["a"]}), items, holdout, [], {})
    report = audit(resolution, networks, small_unet(seed=2), draw, show_forget=True)
    page = Path(write_report(report, tmp_path))
    text = page.read_text()
    probe = (
        "<script>addEventListener('load',()=>{const i=[...document.images];document.title='figures '+i.length+"
        "' broken '+i.filter(x=>!x.complete||!x.naturalWidth||!x.alt).length+' fetched '"
        "+performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length})</script></body>"
    )
    page.write_text(text.replace("</body>", probe))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    figures = text.count("<img ")
    assert figures >= 5 and f"<title>figures {figures} broken 0 fetched 0</title>" in done.stdout
    assert 'src="http' not in text and 'href="http' not in text


def test_a_student_is_audited_with_its_adapter_beside_it(tmp_path):
    original = small_unet()
    student = make_student(original, "all", rank=2, alpha=4.0, seed=0)
    for parameter in student.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.01)
    save_adapter(student, tmp_path / "adapter")
    weights = {"original": original.state_dict(), "unlearned": merge_lora(student).state_dict()}
    report = audit_weights(small_unet, weights, LISTS, draw, adapter=tmp_path / "adapter")
    assert report["probes"]["adapter"] == {"gives_original_back": True}
    other = {**weights, "unlearned": small_unet(seed=1).state_dict()}
    assert audit_weights(small_unet, other, LISTS, draw, adapter=tmp_path / "adapter")["probes"]["adapter"] == {
        "gives_original_back": False
    }
    elsewhere = {"original": small_unet(seed=8).state_dict(), "unlearned": weights["unlearned"]}
    assert audit_weights(small_unet, elsewhere, LISTS, draw, adapter=tmp_path / "adapter")["probes"]["adapter"] == {
        "gives_original_back": False
    }
    assert report["probes"]["original_statistics"] is None
