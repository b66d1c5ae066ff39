# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Make a trained MONAI model forget chosen patients, devices or classes, with evidence."""

from . import audit
from .audit import reference_parts, write_report
from .bundle import bundle_root, content, fingerprint, frozen, phase, resolved, unlearning_targets, variant
from .checkpoint import load_weights, read_weights, save_weights, seeded, weights_digest
from .data import CheckMaskd, ForgetRetainSampler, MarkForgetd, MemoryDataset, cache_outputs
from .datasets import as_mask, as_rgb, isic_datalist, make_isic_phantom
from .engines import PrepareUnlearning, run_phase
from .handlers import (
    PhaseProgress,
    ReseedEachEpoch,
    ResumeEachEpoch,
    StopAtReference,
    StopWhenNotFinite,
    TeacherGuard,
)
from .lora import (
    adapters_disabled,
    freeze_norm,
    inject_lora,
    load_adapter,
    make_student,
    merge_lora,
    save_adapter,
)
from .losses import DistillationLoss, Target, UnlearningLoss
from .preflight import finish, normalise_arguments, prepare, print_plan, record_request
from .relabel import keep_label, random_labels, to_background, to_random_label, to_reference, to_uniform
from .request import DeletionRequest, Resolution, make_request, manifest, published_split, read_request, resolve

__version__ = "0.1.0"

__all__ = [
    "CheckMaskd",
    "DeletionRequest",
    "DistillationLoss",
    "ForgetRetainSampler",
    "MarkForgetd",
    "MemoryDataset",
    "PhaseProgress",
    "PrepareUnlearning",
    "ReseedEachEpoch",
    "Resolution",
    "ResumeEachEpoch",
    "StopAtReference",
    "StopWhenNotFinite",
    "Target",
    "TeacherGuard",
    "UnlearningLoss",
    "adapters_disabled",
    "as_mask",
    "as_rgb",
    "audit",
    "bundle_root",
    "cache_outputs",
    "content",
    "fingerprint",
    "finish",
    "freeze_norm",
    "frozen",
    "inject_lora",
    "isic_datalist",
    "keep_label",
    "load_adapter",
    "load_weights",
    "make_isic_phantom",
    "make_request",
    "make_student",
    "manifest",
    "merge_lora",
    "normalise_arguments",
    "phase",
    "prepare",
    "print_plan",
    "published_split",
    "random_labels",
    "read_request",
    "read_weights",
    "record_request",
    "reference_parts",
    "resolve",
    "resolved",
    "run_phase",
    "save_adapter",
    "save_weights",
    "seeded",
    "to_background",
    "to_random_label",
    "to_reference",
    "to_uniform",
    "unlearning_targets",
    "variant",
    "weights_digest",
    "write_report",
]
