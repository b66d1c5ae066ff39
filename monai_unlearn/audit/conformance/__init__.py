# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Does a metric of unlearning compute what its name says? Run it on ours, or on your own.

    pytest --pyargs monai_unlearn.audit.conformance
    MONAI_UNLEARN_METRICS="auc=my_package.metrics:auc" pytest --pyargs monai_unlearn.audit.conformance

Each check takes a callable and returns what is wrong with it in plain words; an empty list is a pass.
"""

from .checks import CHECKS, violations
from .controls import ControlModels, control_models

__all__ = ["CHECKS", "ControlModels", "control_models", "violations"]
