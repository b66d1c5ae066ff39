# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Did it work: scores, membership attacks, statistics, a verdict and a report."""

from .distance import compare_cases, js_divergence, tug_of_war
from .durability import anamnesis_index, relearn_curve, removable, rounded, with_statistics_of
from .membership import (
    attack,
    attack_difference,
    attacked_scores,
    likelihood_ratio,
    lira,
    membership_table,
    negative_control,
    rank_test,
    retained_leak,
    rmia,
    strongest_attack,
    two_version_leak,
)
from .probes import embed, linear_probe, penultimate_features, relearn_class
from .reference import References, completeness, expected_unseen, reference_parts, regression_reference
from .report import audit, audit_weights, write_report
from .residual import residual_memory, residual_profiles
from .scores import SplitEvaluator, cl_dice, expected_calibration_error, f1_scores, score_cases, surface_band
from .statistics import (
    auc,
    auc_resolution,
    bootstrap_auc,
    bootstrap_auc_difference,
    bootstrap_difference,
    bootstrap_mean,
    clopper_pearson,
    epsilon,
    equivalence,
    non_inferiority,
    seed_margin,
    tpr_at_fpr,
)
from .suppression import suppressed_class, suppressed_structure
from .verdict import judge_verdict

__all__ = [
    "References",
    "SplitEvaluator",
    "anamnesis_index",
    "attack",
    "attack_difference",
    "attacked_scores",
    "auc",
    "auc_resolution",
    "audit",
    "audit_weights",
    "bootstrap_auc",
    "bootstrap_auc_difference",
    "bootstrap_difference",
    "bootstrap_mean",
    "cl_dice",
    "clopper_pearson",
    "compare_cases",
    "completeness",
    "embed",
    "epsilon",
    "equivalence",
    "expected_calibration_error",
    "expected_unseen",
    "f1_scores",
    "js_divergence",
    "judge_verdict",
    "likelihood_ratio",
    "linear_probe",
    "lira",
    "membership_table",
    "negative_control",
    "non_inferiority",
    "penultimate_features",
    "rank_test",
    "reference_parts",
    "regression_reference",
    "relearn_class",
    "relearn_curve",
    "removable",
    "residual_memory",
    "residual_profiles",
    "retained_leak",
    "rmia",
    "rounded",
    "score_cases",
    "seed_margin",
    "strongest_attack",
    "suppressed_class",
    "suppressed_structure",
    "surface_band",
    "tpr_at_fpr",
    "tug_of_war",
    "two_version_leak",
    "with_statistics_of",
    "write_report",
]
