# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Did it work: scores, membership attacks, statistics, a verdict and a report."""

from .membership import attack, membership_table, negative_control, rank_test
from .reference import completeness, expected_unseen, reference_parts, regression_reference
from .report import audit, write_report
from .scores import SCORES, SplitEvaluator, score_cases
from .statistics import auc, bootstrap_auc, bootstrap_mean, clopper_pearson, tpr_at_fpr

__all__ = [
    "SCORES",
    "SplitEvaluator",
    "attack",
    "auc",
    "audit",
    "bootstrap_auc",
    "bootstrap_mean",
    "clopper_pearson",
    "completeness",
    "expected_unseen",
    "membership_table",
    "negative_control",
    "rank_test",
    "reference_parts",
    "regression_reference",
    "score_cases",
    "tpr_at_fpr",
    "write_report",
]
