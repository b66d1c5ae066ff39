# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_unet
from monai.inferers import SlidingWindowInferer
from sklearn.metrics import roc_auc_score
from torch import nn
from toy import ITEMS, dataset, draw

from monai_unlearn.audit import (
    References,
    SplitEvaluator,
    attack,
    attack_difference,
    auc,
    audit,
    bootstrap_auc,
    bootstrap_auc_difference,
    bootstrap_mean,
    cl_dice,
    clopper_pearson,
    completeness,
    expected_unseen,
    f1_scores,
    linear_probe,
    membership_table,
    negative_control,
    penultimate_features,
    rank_test,
    reference_parts,
    regression_reference,
    score_cases,
    suppressed_class,
    tpr_at_fpr,
    write_report,
)
from monai_unlearn.audit.cost import cost_table
from monai_unlearn.audit.membership import attacked_scores
from monai_unlearn.audit.page import render
from monai_unlearn.audit.report import _patients, plain
from monai_unlearn.audit.scores import case_scores, hard_masks, summary
from monai_unlearn.audit.statistics import group_means
from monai_unlearn.audit.suppression import judge_suppression
from monai_unlearn.audit.verdict import controls, judge_verdict
from monai_unlearn.engines import forward_flops
from monai_unlearn.request import DeletionRequest, Resolution, resolve

RNG = np.random.default_rng(0)


# statistics -----------------------------------------------------------------------------------------------------------


def test_the_area_under_the_curve_has_its_closed_form():
    assert auc([3, 2], [1, 2]) == 0.875
    assert auc([1, 2], [3, 2]) == 0.125
    assert auc([1], [1]) == 0.5
    assert np.isnan(auc([], [1]))
    a, b = RNG.normal(0.5, 1, 40).round(1), RNG.normal(0, 1, 60).round(1)
    assert auc(a, b) == pytest.approx(roc_auc_score([1] * 40 + [0] * 60, [*a, *b]))
    assert auc(-a, -b) == pytest.approx(1 - auc(a, b))


def test_group_means_do_not_depend_on_the_order():
    assert group_means([1, 3, 10], ["b", "b", "a"]).tolist() == [10, 2]


def test_the_interval_of_a_mean_agrees_with_scipy_where_every_case_is_a_group():
    from scipy.stats import bootstrap

    values = RNG.exponential(1, 60)
    low, high = bootstrap_mean(values, range(60))
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", rng=1).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_intervals_draw_whole_groups():
    values = RNG.normal(0, 1, 30)
    single = np.diff(bootstrap_mean(values, range(30)))[0]
    repeated = np.diff(bootstrap_mean(np.repeat(values, 10), np.repeat(range(30), 10)))[0]
    assert repeated == pytest.approx(single, rel=0.05)  # ten copies of a patient tell nothing new


def test_intervals_without_variation_or_groups_say_so():
    assert bootstrap_mean([0.5, 0.5], ["a", "b"]) == (0.5, 0.5)
    assert np.isnan(bootstrap_mean([0.1, 0.9], ["a", "a"])).all()
    assert np.isnan(bootstrap_auc([1], [1, 2])).all()


def test_the_interval_of_the_auc_covers_as_often_as_it_says():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        low, high = bootstrap_auc(rng.normal(0, 1, 40), rng.normal(0, 1, 60), resamples=400, seed=seed)
        covered += low <= 0.5 <= high
    assert covered >= 51


def test_the_interval_of_a_difference_of_aucs_is_paired():
    rng = np.random.default_rng(0)
    hard, unseen = rng.normal(0, 1, 40), rng.normal(0, 1, 60)  # how hard each patient is, for every model
    one, other = (hard + 0.8, unseen), (hard + 0.5 + rng.normal(0, 0.1, 40), unseen + rng.normal(0, 0.1, 60))
    low, high = bootstrap_auc_difference(one, other, resamples=500, seed=3)
    draws, differences = np.random.default_rng(3), []
    counts = [draws.multinomial(n, np.full(n, 1 / n), size=500) for n in (40, 60)]
    for drawn in zip(*counts, strict=True):  # each patient as often as drawn, and the same ones for both models
        sides = [
            [np.repeat(values, count) for values, count in zip(model, drawn, strict=True)] for model in (one, other)
        ]
        differences.append(auc(*sides[0]) - auc(*sides[1]))
    assert (low, high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-12)
    assert low < auc(*one) - auc(*other) < high
    apart = bootstrap_auc(*one, seed=3), bootstrap_auc(*other, seed=4)
    assert high - low < 0.5 * max(end - start for start, end in apart)  # what both find hard cancels
    assert bootstrap_auc_difference(one, one) == (0, 0)
    assert np.isnan(bootstrap_auc_difference(([1], [1, 2]), ([2], [1, 2]))).all()


def test_an_attack_on_one_model_is_held_against_the_same_attack_on_another():
    retrained, known = model(0.70, seed=40), model(0.85, seed=30)
    found = attack_difference(known, retrained, JUDGE, GROUPS)
    sides = [attacked_scores(rows, JUDGE, GROUPS)["calibrated"] for rows in (known, retrained)]
    assert found["difference"] == pytest.approx(auc(*sides[0]) - auc(*sides[1]))
    assert 0 < found["ci"][0] < found["difference"] < found["ci"][1]
    assert attack_difference(retrained, retrained, JUDGE, GROUPS) == {"difference": 0, "ci": [0, 0]}
    raw = [attacked_scores(rows, JUDGE, GROUPS)["raw"] for rows in (known, retrained)]
    other = attack_difference(known, retrained, JUDGE, GROUPS, name="raw")
    assert other["difference"] == auc(*raw[0]) - auc(*raw[1]) != found["difference"]
    holes = {split: {key: values.copy() for key, values in rows.items()} for split, rows in known.items()}
    holes["forget"]["iou"][0] = np.nan
    without = {split: {key: values[1:] if split == "forget" else values for key, values in rows.items()}
               for split, rows in known.items()}  # fmt: skip
    rest = {"forget": {key: values[1:] for key, values in retrained["forget"].items()}, "holdout": retrained["holdout"]}
    judge = {"forget": {key: values[1:] for key, values in JUDGE["forget"].items()}, "holdout": JUDGE["holdout"]}
    groups = {**GROUPS, "forget": GROUPS["forget"][1:]}
    assert attack_difference(holes, retrained, JUDGE, GROUPS) == attack_difference(without, rest, judge, groups)
    assert attack_difference(known, retrained, JUDGE, {**GROUPS, "forget": ["p"] * 40}) is None


def test_exact_shares():
    assert clopper_pearson(0, 20)[0] == 0 and clopper_pearson(0, 20)[1] == pytest.approx(0.1684, abs=5e-5)
    assert clopper_pearson(20, 20)[1] == 1
    assert clopper_pearson(3, 10) == pytest.approx((0.0667, 0.6525), abs=5e-5)


def test_the_true_positive_rate_keeps_the_false_positive_rate():
    others = np.arange(100.0)
    assert tpr_at_fpr([93.5, 95.0], others) == 0.5
    assert tpr_at_fpr(others, others) <= 0.05
    assert tpr_at_fpr([1, 2, 3], [0]) == 1


def test_one_patient_is_ranked_among_the_unseen():
    assert rank_test(9, np.zeros(100))["p_up"] == pytest.approx(1 / 101)
    assert rank_test(-9, np.zeros(100))["p"] == pytest.approx(2 / 101)
    assert rank_test(0, np.zeros(10))["p"] == 1


# scores ---------------------------------------------------------------------------------------------------------------


def test_overlap_has_its_closed_form():
    prediction, truth = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)
    prediction[..., :6] = 1
    truth[..., 3:7] = 1
    scores = case_scores(prediction * 20 - 10, truth)
    assert scores["dice"].item() == pytest.approx(0.6) and scores["iou"].item() == pytest.approx(3 / 7)


def test_both_empty_is_one_and_one_empty_is_zero():
    empty, full = torch.full((1, 1, 4, 4), -9.0), torch.full((1, 1, 4, 4), 9.0)
    zeros, ones = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    for logits, label, expected in ((empty, zeros, 1), (full, zeros, 0), (empty, ones, 0), (full, ones, 1)):
        scores = case_scores(logits, label)
        assert (scores["iou"].item(), scores["dice"].item()) == (expected, expected)


def test_a_batch_scores_as_each_case_alone_and_doubling_the_grid_changes_nothing():
    logits, label = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8).argmax(1)
    label = nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    together = case_scores(logits, label)
    big = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (logits, label)]
    for name, values in together.items():
        alone = torch.cat([case_scores(logits[i : i + 1], label[i : i + 1])[name] for i in range(5)])
        torch.testing.assert_close(values, alone)
        torch.testing.assert_close(case_scores(*big)[name], values)
    torch.testing.assert_close(
        together["loss"], nn.functional.cross_entropy(logits, label, reduction="none").mean((1, 2))
    )
    assert hard_masks(logits).sum(1).eq(1).all()


def test_scoring_leaves_the_network_as_it_was_and_does_not_depend_on_the_batch():
    network = small_unet().train()
    before = copy.deepcopy(dict(network.state_dict()))
    one, other = (score_cases(network, dataset(), batch_size=size) for size in (1, 5))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)
    assert network.training and all(module.training for module in network.modules())
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert score_cases(network, type(dataset())([], draw)) == {}


def test_the_evaluator_of_splits_takes_a_fixed_sample():
    data = {"forget": dataset(), "retain": dataset()}
    one, other = (SplitEvaluator(small_unet(), data, limit=5, seed=3) for _ in range(2))
    one.run()
    other.run()
    assert one.state.metrics == other.state.metrics and one.cases == 10
    assert [i["image"] for i in one.datasets["forget"].data] == [i["image"] for i in other.datasets["retain"].data]


def test_a_scored_case_costs_all_the_windows_it_is_cut_into():
    data = {"forget": dataset()}
    size = data["forget"][0]["image"].shape[-1]
    whole = SplitEvaluator(small_unet(), data).case_flops()
    halves = SplitEvaluator(small_unet(), data, inferer=SlidingWindowInferer(size // 2, overlap=0.0)).case_flops()
    assert whole == halves == forward_flops(small_unet(), data["forget"][0]["image"])
    quarters = SplitEvaluator(small_unet(), data, inferer=SlidingWindowInferer(size // 2, overlap=0.5)).case_flops()
    assert quarters == 9 / 4 * whole


# references -----------------------------------------------------------------------------------------------------------


def test_references_get_disjoint_whole_groups_whatever_the_order():
    items = [{"image": str(i), "group": str(i // 3)} for i in range(60)]
    parts = reference_parts(items, 3, seed=1)
    assert [len(part) for part in parts] == [39, 21]
    groups = [{item["group"] for item in part} for part in parts]
    assert not groups[0] & groups[1] and len(set.union(*groups)) == 20
    assert [len(part) for part in reference_parts(items, 2, seed=1)] == [30, 30]
    again = reference_parts(items[::-1], 3, seed=1)
    assert [sorted(i["image"] for i in p) for p in again] == [sorted(i["image"] for i in p) for p in parts]
    assert reference_parts(items, 3, seed=2) != parts
    with pytest.raises(ValueError, match="2 retained groups cannot be dealt into 3"):
        reference_parts(items[:6], 3)
    with pytest.raises(ValueError, match="one to teach and one to judge; got 1"):
        reference_parts(items, 1)


def test_the_expected_score_of_an_unseen_case():
    assert expected_unseen(np.array([0.461]), np.array([0.482]), np.array([0.5])) == pytest.approx(0.443)
    scores = np.array([0.5, 0.6]), np.array([0.7]), np.array([0.55])
    assert expected_unseen(*scores) == pytest.approx(0.70)
    assert expected_unseen(*scores, np.array([0.6, 0.7])) == pytest.approx(0.65)  # the original's own score is less
    assert expected_unseen(*scores, np.array([0.9, 0.9])) == pytest.approx(0.70)
    assert completeness(0.95, 0.80, 0.75) == pytest.approx(0.75)
    assert completeness(0.95, 0.70, 0.75) > 1
    assert completeness(0.76, 0.70, 0.75) is None


def test_regression_finds_a_linear_relation_exactly():
    def rows(number):
        return {name: RNG.uniform(0.2, 0.8, number) for name in ("iou", "entropy", "area")}

    unseen, forget = rows(60), rows(20)

    def truth(r):
        return 0.3 + 0.5 * r["iou"] - 0.2 * r["entropy"] + 0.1 * r["area"]

    assert regression_reference(forget, unseen, truth(unseen)) == pytest.approx(truth(forget).mean())


def test_regression_is_closer_than_the_difference_where_the_reference_is_noisy():
    errors = {"difference": [], "regression": []}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = rng.normal(0.75, 0.12, 200).clip(0, 1)
        rows = {
            "iou": (truth + rng.normal(0, 0.12, 200)).clip(0, 1),
            "entropy": rng.random(200),
            "area": rng.random(200),
        }
        forget, unseen = ({k: v[part] for k, v in rows.items()} for part in (slice(0, 60), slice(60, 200)))
        errors["difference"].append(expected_unseen(forget["iou"], truth[60:], unseen["iou"]) - truth[:60].mean())
        errors["regression"].append(regression_reference(forget, unseen, truth[60:]) - truth[:60].mean())
    assert np.std(errors["regression"]) < 0.9 * np.std(errors["difference"])


def test_too_few_unseen_cases_for_a_regression_give_the_difference():
    few = {name: np.array([0.5, 0.6, 0.7]) for name in ("iou", "entropy", "area")}
    assert regression_reference(few, few, np.array([0.6, 0.7, 0.8])) == pytest.approx(0.7)


# membership -----------------------------------------------------------------------------------------------------------


def test_an_attack_says_in_which_direction_the_forgotten_stand_out():
    unseen = RNG.normal(0, 1, 80)
    assert attack(RNG.normal(2, 1, 40), unseen)["direction"] == "remembered"
    assert attack(RNG.normal(-2, 1, 40), unseen)["direction"] == "over-forgotten"
    assert attack(RNG.normal(0, 1, 40), unseen)["direction"] == "none"
    assert attack(np.array([1.0]), unseen)["auc"] is None


def case_arrays(number, level, difficulty, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    iou = level + difficulty + rng.normal(0, noise, number)
    return {"iou": iou, "loss": 1 - iou, "dice": iou, "area": np.full(number, 0.2), "entropy": np.full(number, 0.1)}


HARD = {"forget": RNG.normal(0, 0.1, 40), "holdout": RNG.normal(0, 0.1, 80), "retain": RNG.normal(0, 0.1, 60)}
GROUPS = {name: [f"{name}{i}" for i in range(len(values))] for name, values in HARD.items()}


def model(forget, holdout=0.70, retain=0.9, seed=0):
    levels = {"forget": forget, "holdout": holdout, "retain": retain}
    return {n: case_arrays(len(HARD[n]), level, HARD[n], seed=seed + i) for i, (n, level) in enumerate(levels.items())}


JUDGE = model(0.64, 0.64, 0.64, seed=90)
ORIGINAL = model(0.90, seed=10)


def test_calibration_finds_what_the_raw_score_hides():
    slightly = model(0.78, seed=20)
    table = membership_table({"m": slightly}, JUDGE, GROUPS)["m"]
    assert table["calibrated"]["auc"] > 0.9 > table["raw"]["auc"]
    assert table["calibrated"]["score"] == "iou" and table["raw_loss"]["score"] == "loss"
    assert sum(row["strongest"] for row in table.values()) == 1


def test_the_patient_is_the_unit():
    one = {name: ["p"] * len(values) for name, values in HARD.items()}
    row = membership_table({"m": ORIGINAL}, JUDGE, {**GROUPS, "forget": one["forget"]})["m"]["calibrated"]
    assert row["auc"] is None and row["n_forget"] == 1


def test_halves_of_the_unseen_look_alike_unless_patients_are_torn_apart():
    values = RNG.normal(0, 1, 80)
    assert negative_control(values, GROUPS["holdout"])["ok"]
    assert not negative_control(values[:3], ["a", "b", "c"])["ok"]


# verdict --------------------------------------------------------------------------------------------------------------


def verdict(unlearned, original=ORIGINAL, retrained=None, job="deletion", groups=GROUPS, limits=()):
    scores = {"original": original, "unlearned": unlearned, "judge": JUDGE}
    if retrained is not None:
        scores["retrained"] = retrained
    request = DeletionRequest({"ids": ["a"]}, job=job, limits=dict(limits))
    resolution = Resolution(request, [], [], [], {})
    target = expected_unseen(JUDGE["forget"]["iou"], original["holdout"]["iou"], JUDGE["holdout"]["iou"])
    attacked = {name: rows for name, rows in scores.items() if name != "judge"}
    table = membership_table(attacked, JUDGE, groups)

    return judge_verdict(resolution, scores, groups, target, table, controls(scores, table, groups, 0))


def test_a_model_like_the_retrained_is_not_refuted():
    name, reasons = verdict(model(0.70, seed=30), retrained=model(0.70, seed=40))
    assert name == "NOT REFUTED", reasons
    assert "no proof of erasure" in reasons[0]


def test_the_original_itself_fails():
    name, reasons = verdict(ORIGINAL)
    assert name == "FAIL" and "still scores" in reasons[0] and "remembered" in reasons[1]


def test_forgetting_too_much_fails_as_well():
    name, reasons = verdict(model(0.30, seed=30))
    assert name == "FAIL" and "over-forgotten" in " ".join(reasons)


def test_patients_who_are_hard_for_every_model_that_never_saw_them_fail_nobody_who_is_no_worse():
    """The judge says .70 of an unseen case; the retrained model, which never saw these, does worse on them."""
    unseen = model(0.68, seed=60)
    name, reasons = verdict(model(0.68, seed=50))
    assert name == "FAIL" and "direction over-forgotten" in reasons[0]
    assert verdict(model(0.68, seed=50), retrained=unseen)[0] == "NOT REFUTED"
    assert verdict(model(0.70, seed=50), retrained=unseen)[0] == "NOT REFUTED"  # between chance and the retrained model
    for level, direction in ((0.64, "over-forgotten"), (0.73, "remembered")):
        name, reasons = verdict(model(level, seed=50), retrained=unseen)
        assert name == "FAIL" and f"in the retrained model, direction {direction}" in " ".join(reasons), level


def test_a_collapsed_model_fails_though_its_forget_score_is_right():
    name, reasons = verdict(model(0.70, holdout=0.6, seed=30))
    assert name == "FAIL" and "unseen cases lost" in reasons[0]
    name, reasons = verdict(model(0.70, retain=0.7, seed=30), retrained=model(0.70, seed=40))
    assert name == "FAIL" and "retained cases lost" in reasons[0]


def test_an_original_that_remembers_nothing_leaves_it_open():
    name, reasons = verdict(model(0.70, seed=30), original=model(0.70, seed=10))
    assert name == "INCONCLUSIVE" and "nothing measurable to forget" in reasons[0]
    assert "proves nothing" in reasons[1]


def test_suppression_is_left_open():
    assert verdict(model(0.70, seed=30), job="suppression")[0] == "INCONCLUSIVE"


def test_one_patient_is_judged_by_rank():
    groups = {**GROUPS, "forget": ["p"] * 40}
    assert verdict(model(0.70, seed=30), groups=groups)[0] == "NOT REFUTED"
    name, reasons = verdict(model(0.85, seed=30), groups=groups)
    assert name == "FAIL" and "rank test" in " ".join(reasons)
    easy, wide = model(0.78, seed=30), {"forget": 0.095}
    assert "rank test" in " ".join(verdict(easy, groups=groups, limits=wide)[1])
    for retrained, failed in ((0.78, False), (0.70, True), (0.62, True)):  # as easy for it; not; the reverse
        found = verdict(easy, retrained=model(retrained, seed=40), groups=groups, limits=wide)
        assert ("rank test" in " ".join(found[1])) == failed, retrained


def test_the_requests_own_limits_count():
    slightly = model(0.76, seed=30)
    assert verdict(slightly)[0] == "FAIL"
    assert verdict(slightly, limits={"forget": 0.08, "membership": 0.49}.items())[0] == "NOT REFUTED"


# report ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    items = [{**item, "group": f"p{item['image']}"} for item in ITEMS]
    holdout = [{"image": str(i), "label": "m", "group": f"h{i}", "sex": "fm"[i % 2]} for i in range(50, 58)]
    resolution = Resolution(DeletionRequest({"ids": ["a"]}, id="r <1>"), items, holdout, [], {})
    networks = {"original": small_unet(), "unlearned": small_unet(seed=1), "reference": None}
    phases = {"unlearn": {"seconds": 2.0, "flops": 10, "images": 5, "reports": {}, "trainable_parameters": 3},
              "cache": {"seconds": 1.0, "flops": 2, "images": 1}}  # fmt: skip
    return audit(resolution, networks, small_unet(seed=2), draw, phases=phases, data="toy", show_forget=True,
                 loss=nn.BCEWithLogitsLoss(), subgroups=["sex"], key=b"k" * 16,
                 private=tmp_path_factory.mktemp("private"))  # fmt: skip


def test_the_retained_cases_can_be_scored_by_sample():
    items = [{**item, "group": f"p{int(item['image']) // 2}"} for item in ITEMS]
    holdout = [{"image": str(i), "label": "m", "group": f"h{i}"} for i in range(50, 58)]
    resolution = Resolution(DeletionRequest({"ids": ["a"]}), items, holdout, [], {})
    networks = {"original": small_unet(), "unlearned": small_unet(seed=1)}
    retained = resolution.splits["retain"]

    def scored(**options):
        return audit(resolution, networks, None, draw, **options)["scores"]["original"]["retain"]["n"]

    assert scored(retain_cases=4) in (4, 5) and scored(retain_cases=99) == scored() == len(retained) == 9
    samples = [_patients(retained, 4, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    for sample in samples:  # whole patients only
        inside = {item["group"] for item in sample}
        assert [item for item in retained if item["group"] in inside] == sample


def test_the_report_holds_what_others_build_on(report):
    assert report["schema"] == "monai_unlearn.report/1"
    assert report["splits"] == {"forget": 3, "retain": 9, "holdout": 8}
    assert set(report["scores"]) == {"original", "unlearned", "judge"}
    row = report["scores"]["unlearned"]["holdout"]
    assert set(row) >= {"mean_iou", "mean_dice", "loss", "n", "ci"} and row["n"] == 8
    assert report["tier"] == 1 and report["references"] == 1
    assert set(report["membership"]["original"]) >= {"raw", "calibrated", "raw_loss", "calibrated_loss", "rmia"}
    assert report["verdict"] in ("FAIL", "INCONCLUSIVE", "NOT REFUTED") and report["not_tested"]
    assert set(row) >= {"ece", "ece_band", "brier", "mean_hd95", "mean_nsd", "n_hd95_undefined"}
    assert set(report["relearn"]) == {"forget", "benign", "unrelated"} and report["stop"] is None
    assert [at["steps"] for at in report["relearn"]["benign"]["judge"]] == [0, 5, 10, 20, 40]
    assert report["relearn"]["forget"]["unlearned"][0] == report["relearn"]["unrelated"]["unlearned"][0]
    assert [row["value"] for row in report["subgroups"]] == ["f", "m"] and report["subgroups"][0]["n"] == 4
    assert set(report["probes"]["rounding"]) == {"bf16", "int8", "int4"}
    assert len(report["cases"]) == 3 and all(len(row["cases"][0]) == 12 for row in report["cases"])
    json.dumps({key: value for key, value in report.items() if not key.startswith("_")}, allow_nan=False)


def test_costs_add_up_and_what_was_not_run_is_empty(report):
    cost = report["cost"]
    assert (cost["unlearn_seconds"], cost["unlearn_flops"], cost["unlearn_images"]) == (3.0, 12, 6)
    assert cost["references_given"] and cost["reference_seconds"] == 0 and cost["retrain_seconds"] is None
    assert cost_table({}, {"seconds": 1, "flops": 1, "images": 1})["unlearn_seconds"] is None


def test_the_page_is_one_file_with_its_figures_and_escapes_what_it_shows(report, tmp_path, capsys):
    page = write_report(report, tmp_path)
    text = Path(page).read_text()
    assert text.count("data:image/png;base64,") == 6 and "http" not in text.replace("https", "")
    assert "r &lt;1&gt;" in text and "r <1>" not in text
    assert report["verdict"] in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    stop = {"reference": 0.7, "best_epoch": 1, "history": [{"epoch": 0, "forget": 0.9, "retain": 0.9}]}
    assert render({**report, "stop": stop}).count("data:image/png") == 7
    assert any(case["split"] == "forget" for case in report["_figures"]["cases"])
    beside = {"difference": 0.014, "ci": [-0.031, 0.06]}
    assert "from the retrained model" not in text and report["attack_beside_retrained"] is None
    page = re.sub("<[^>]+>", "", render({**report, "attack_beside_retrained": beside}))
    assert "The calibrated AUC lies +0.014 [-0.031, 0.060] from the retrained model" in page


def test_numbers_that_are_not_finite_become_nothing():
    assert plain({"a": float("nan"), "b": [np.float32(1), np.int64(2), np.bool_(True)], "c": np.inf}) == {
        "a": None, "b": [1.0, 2, True], "c": None}  # fmt: skip


def test_the_judge_must_not_be_the_teacher():
    teacher, models = small_unet(seed=5), {"original": small_unet(), "unlearned": small_unet(seed=1)}
    with pytest.raises(ValueError, match="must not be the reference"):  # another object, the same weights
        audit(None, {**models, "reference": teacher}, copy.deepcopy(teacher), draw)
    with pytest.raises(ValueError, match="must not be the original"):
        audit(None, models, References([small_unet(seed=7), small_unet()]), draw)
    with pytest.raises(ValueError, match="needs the unlearned model"):
        audit(None, {"original": teacher}, small_unet(), draw)


# classification -------------------------------------------------------------------------------------------------------


def test_class_scores_have_their_closed_form():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    label = torch.eye(3)[[0, 1]]
    rows = case_scores(logits, label)
    assert rows["accuracy"].tolist() == [1, 0] and rows["predicted"].tolist() == [0, 2]
    p = logits.softmax(1)[[0, 1], [0, 1]]
    torch.testing.assert_close(rows["loss"], -p.log())
    torch.testing.assert_close(rows["margin"], torch.log(p / (1 - p)))
    torch.testing.assert_close(case_scores(logits[1:], label[1:])["margin"], rows["margin"][1:])


def test_f1_agrees_with_scikit_learn_and_counts_weights_as_repeats():
    from sklearn.metrics import balanced_accuracy_score, f1_score

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    np.testing.assert_allclose(f1_scores(true, predicted, 4), f1_score(true, predicted, average=None))
    weights = rng.integers(0, 3, (5, 60))
    for row, drawn in zip(weights, f1_scores(true, predicted, 4, weights)):
        repeated = np.repeat(np.arange(60), row)
        np.testing.assert_allclose(drawn, f1_score(true[repeated], predicted[repeated], average=None))
    assert np.isnan(f1_scores(true, predicted, 5)[4])
    rows = {"true": true, "predicted": predicted, "accuracy": (true == predicted) * 1.0, "loss": np.ones(60)}
    found = summary(rows, ["a", "b", "c", "d"])
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))


def test_centreline_dice_has_its_closed_forms():
    bar = np.zeros((20, 40), bool)
    bar[8:11, 5:35] = True
    assert cl_dice(bar, bar) == 1
    assert cl_dice(np.zeros_like(bar), np.zeros_like(bar)) == 1 and cl_dice(bar, np.zeros_like(bar)) == 0
    thick = np.zeros_like(bar)
    thick[6:13, 3:37] = True  # thicker, the same line: overlap falls, the centreline does not
    assert cl_dice(thick, bar) == pytest.approx(1, abs=0.06)
    line = np.zeros_like(bar)
    line[9, 5:35] = True  # one pixel wide: its own skeleton
    half = line & (np.arange(40) < 20)
    assert cl_dice(half, line) == pytest.approx(2 * 1 * 0.5 / 1.5)  # precision 1, sensitivity one half


def test_masks_are_compared_inside_the_region_only():
    logits, label = torch.full((1, 1, 4, 4), -5.0), torch.zeros(1, 1, 4, 4)
    logits[..., :2, :], label[..., :1, :] = 5.0, 1.0
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., :1, :] = True
    assert case_scores(logits, label, region)["dice"] == 1 and case_scores(logits, label)["dice"] == pytest.approx(
        2 / 3
    )
    expected = nn.functional.softplus(torch.tensor(-5.0))
    torch.testing.assert_close(case_scores(logits, label, region)["loss"][0], expected)
    torch.testing.assert_close(case_scores(logits, label)["confidence"][0], torch.sigmoid(torch.tensor(5.0)))


def test_further_metrics_see_the_hard_masks():
    logits, label = torch.randn(3, 1, 6, 6), (torch.rand(3, 1, 6, 6) > 0.5).float()
    rows = case_scores(logits, label, metrics={"area": lambda mask, truth: mask.mean() - truth.mean()})
    torch.testing.assert_close(
        rows["area"].float(), ((logits > 0).float() - label).flatten(1).mean(1), check_dtype=False
    )


KINDS = ("a", "b", "c")


def picture(item):
    """Classes 0 to 2 as brightness with noise fixed by the number."""
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(int(item["image"])))
    return {"image": 0.3 * item["label"] + 0.2 * noise, "label": torch.eye(3)[item["label"]]}


class Brightness(nn.Module):
    """Names a picture by its mean brightness; ``ResNet`` in name, so that its head is known."""

    def __init__(self, blind=None):
        super().__init__()
        self.fc = nn.Linear(1, 3)
        centre = torch.tensor([0.1, 0.4, 0.7])
        with torch.no_grad():
            self.fc.weight.copy_(2 * 60 * centre[:, None])
            self.fc.bias.copy_(-60 * centre**2)
            if blind is not None:
                self.fc.bias[blind] = -1e4

    def forward(self, x):
        return self.fc(x.mean((1, 2, 3))[:, None])


Brightness.__name__ = "ResNet"


def suppression_of(unlearned, retrained):
    numbers = iter(range(1000))
    items = [{"image": str(next(numbers)), "label": n % 3, "diagnosis": KINDS[n % 3]} for n in range(30)]
    holdout = [{"image": str(next(numbers)), "label": n % 3, "diagnosis": KINDS[n % 3]} for n in range(45)]
    request = DeletionRequest({"class": "c"}, job="suppression")
    resolution = resolve(request, items, holdout)
    networks = {"original": Brightness(), "unlearned": unlearned, "retrained": retrained}
    return audit(resolution, networks, None, picture, classes=KINDS)


def test_a_class_hidden_in_the_head_alone_is_found_by_the_probe(tmp_path):
    class Deaf(Brightness):
        def forward(self, x):  # never learned what makes the class bright
            return self.fc(x.mean((1, 2, 3))[:, None].clamp_max(0.35))

    Deaf.__name__ = "ResNet"
    hidden = suppression_of(Brightness(blind=2), Deaf(blind=2))
    found = hidden["suppression"]
    assert found["f1_unseen"]["original"] == 1 and found["f1_unseen"]["unlearned"] == 0
    assert found["linear_probe"]["unlearned"] == 1.0
    assert hidden["relearn"]["few_shot"]["original"][0]["f1"] == 1
    assert hidden["relearn"]["few_shot"]["unlearned"][0]["f1"] == 0
    assert found["macro_f1_others"]["unlearned"] == 1
    assert hidden["verdict"] == "FAIL" and "head only" in hidden["reasons"][0]
    assert hidden["expected_unseen"] == 0 and hidden["membership"] == {}
    text = Path(write_report(hidden, tmp_path)).read_text()
    for title in ("Is c gone?", "F1 of each class", "Where the forgotten cases went", "Decision regions"):
        assert title in text
    embedded = hidden["_figures"]["embedded"]
    assert set(embedded) == {"original", "unlearned", "retrained"}
    assert embedded["original"]["points"].shape == (30, 2) and embedded["original"]["forget"].sum() == 10
    assert not (embedded["unlearned"]["predicted"] == 2).any() and (embedded["original"]["predicted"] == 2).sum() == 10
    still = suppression_of(Brightness(), Brightness(blind=2))
    assert still["verdict"] == "FAIL" and "still found" in still["reasons"][0]


def site_items(number, first, site):
    return [{"image": str(first + n), "label": n % 3, "site": site} for n in range(number)]


def seen_darker(item):
    """Pictures of site s are darker, by an amount that differs from one to the next."""
    sample = picture(item)
    if item["site"] == "s":
        sample["image"] = sample["image"] - 0.1 - 0.1 * float(sample["image"][0, 0, 0])
    return sample


class Remembers(Brightness):
    """Brightens a picture that it has seen, and in part one whose kind it has seen."""

    def __init__(self, seen, alike):
        super().__init__()
        self.seen, self.alike = seen, alike

    def forward(self, x):
        sums = [float(one.sum()) for one in x]
        lift = [0.15 if s in self.seen else 0.08 if s in self.alike else 0.0 for s in sums]
        return super().forward(x + torch.tensor(lift).reshape(-1, 1, 1, 1))


Remembers.__name__ = "ResNet"


def revision_of(alike=30):
    """A site that a retrained model reads worse than the rest; the unlearned model is the retrained one."""
    training = [*site_items(30, 0, "s"), *site_items(60, 100, "r")]
    holdout = [*site_items(alike, 200, "s"), *site_items(60, 300, "r")]
    request = DeletionRequest({"rule": "site == 's'"}, job="revision")
    resolution = resolve(request, training, holdout)
    sums = [{float(seen_darker(item)["image"].sum()) for item in part} for part in (training[:30], holdout[:alike])]
    networks = {"original": Remembers(*sums), "unlearned": Brightness(), "retrained": Brightness()}
    judge = Brightness()
    with torch.no_grad():
        judge.fc.weight *= 0.5  # as certain of the darker pictures as the others are, and less of the rest
        judge.fc.bias *= 0.5
    return audit(resolution, networks, judge, seen_darker, classes=KINDS)


def test_a_site_is_compared_with_unseen_cases_of_the_site_and_its_references_with_the_others():
    report = revision_of()
    assert report["compared_with"] == {"attacks": "holdout_alike", "expected_unseen": "holdout_other"}
    scores = {
        model: {split: row["accuracy"] for split, row in rows.items()} for model, rows in report["scores"].items()
    }
    assert (
        scores["original"]["forget"] == 1 and scores["original"]["holdout_alike"] > scores["retrained"]["holdout_alike"]
    )
    lag = scores["original"]["holdout_other"] - scores["judge"]["holdout_other"]
    assert report["expected_unseen"] == pytest.approx(scores["judge"]["forget"] + lag)
    assert report["expected_unseen"] == pytest.approx(scores["retrained"]["forget"])
    assert abs(report["membership"]["retrained"]["calibrated"]["auc"] - 0.5) < 0.05
    few = revision_of(alike=6)  # too few of the site to be compared with
    assert few["compared_with"] == {"attacks": "holdout", "expected_unseen": "holdout_other"}
    assert abs(few["membership"]["retrained"]["calibrated"]["auc"] - 0.5) > 0.1


def suppression_verdict(f1=0.0, others=0.7, change=(-0.01, 0.01), probe=(0.95, 0.7, 0.68)):
    names = ("original", "unlearned", "retrained")
    return judge_suppression(
        {"class": "c", "f1_unseen": {"original": 0.8, "unlearned": f1}, "macro_f1_others_change_ci": change,
         "macro_f1_others": {"original": 0.7, "unlearned": others}, "linear_probe": dict(zip(names, probe))}, 0.02
    )  # fmt: skip


def test_a_suppressed_class_is_judged_by_its_unseen_members_the_others_and_the_probe():
    assert suppression_verdict()[0] == "NOT REFUTED"
    assert suppression_verdict(f1=0.2)[0] == "FAIL"
    assert suppression_verdict(others=0.6, change=(-0.15, -0.05))[0] == "FAIL"
    assert "head only" in suppression_verdict(probe=(0.95, 0.9, 0.7))[1][0]
    assert "over-forgotten" in suppression_verdict(probe=(0.95, 0.5, 0.7))[1][0]
    assert "cannot tell" in suppression_verdict(probe=(0.95, 0.94, 0.9))[1][0]
    assert suppression_verdict(probe=(0.95, 0.9))[0] == "INCONCLUSIVE"


def test_what_a_search_did_is_told_on_the_page(tmp_path):
    report = suppression_of(Brightness(blind=2), Brightness(blind=2))
    report["relabelling"] = {
        "routes": {"crossed": 8, "grown": 0, "runner_up": 2}, "destinations": {"0": 1, "1": 9}, "mean_steps": 4.25
    }  # fmt: skip
    text = render(report)
    assert "1 a, 9 b. How they were found: 8 crossed, 2 runner up; 4.2 steps on average" in text


def test_only_a_class_of_the_model_can_be_suppressed():
    items = [{"image": str(n), "label": n % 3, "diagnosis": KINDS[n % 3]} for n in range(9)]
    resolution = resolve(DeletionRequest({"class": "c"}, job="suppression"), items, [])
    assert suppressed_class(resolution, KINDS) == 2 and suppressed_class(resolution, ()) is None
    with pytest.raises(ValueError, match="no class 'c'"):
        suppressed_class(resolution, ("a", "b"))
    deletion = resolve(DeletionRequest({"ids": ["1"]}), items, [])
    assert suppressed_class(deletion, KINDS) is None


def test_the_probe_needs_members_in_every_fold_and_keeps_groups_whole():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4))
    is_class = np.arange(60) % 3 == 0
    features[is_class] += 4
    groups = [str(n) for n in range(60)]
    assert linear_probe(features, is_class, groups) == 1.0
    assert (
        abs(linear_probe(rng.normal(size=(300, 4)), np.arange(300) % 3 == 0, [str(n) for n in range(300)]) - 0.5) < 0.15
    )
    assert linear_probe(features, np.arange(60) < 3, groups) is None
    with pytest.raises(ValueError, match="has 0 heads"):
        penultimate_features(type("DenseNet", (nn.Module,), {})(), None)
