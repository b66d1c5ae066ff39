# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Did it work: scores, membership attacks, statistics, a verdict and a report."""

from .membership import attack, membership_table, negative_control, rank_test
from .probes import embed, linear_probe, penultimate_features, relearn_class
from .reference import completeness, expected_unseen, reference_parts, regression_reference
from .report import audit, write_report
from .scores import SplitEvaluator, cl_dice, f1_scores, score_cases
from .statistics import auc, bootstrap_auc, bootstrap_mean, clopper_pearson, tpr_at_fpr
from .suppression import suppressed_class, suppressed_structure

__all__ = [
    "SplitEvaluator",
    "attack",
    "auc",
    "audit",
    "bootstrap_auc",
    "bootstrap_mean",
    "cl_dice",
    "clopper_pearson",
    "completeness",
    "embed",
    "expected_unseen",
    "f1_scores",
    "linear_probe",
    "membership_table",
    "negative_control",
    "penultimate_features",
    "rank_test",
    "reference_parts",
    "regression_reference",
    "relearn_class",
    "score_cases",
    "suppressed_class",
    "suppressed_structure",
    "tpr_at_fpr",
    "write_report",
]
