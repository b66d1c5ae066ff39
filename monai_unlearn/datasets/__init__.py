# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Data lists of public data sets, photographs and masks read right or refused, and phantoms drawn from nothing."""

from .lists import (
    chase_datalist,
    hippocampus_datalist,
    isic_classification_datalist,
    isic_datalist,
    known_pairs,
    load_splits,
    read_datalist,
    settle_duplicates,
)
from .phantoms import (
    is_phantom,
    make_chase_phantom,
    make_hippocampus_phantom,
    make_isic_classification_phantom,
    make_isic_phantom,
)
from .reading import (
    DataError,
    as_mask,
    as_rgb,
    check_mask,
    field_of_view,
    inspect_items,
    perceptual_hash,
    read_pair,
    read_photograph,
    read_volume,
)

__all__ = [
    "DataError",
    "as_mask",
    "as_rgb",
    "chase_datalist",
    "check_mask",
    "field_of_view",
    "hippocampus_datalist",
    "inspect_items",
    "is_phantom",
    "isic_classification_datalist",
    "isic_datalist",
    "known_pairs",
    "load_splits",
    "make_chase_phantom",
    "make_hippocampus_phantom",
    "make_isic_classification_phantom",
    "make_isic_phantom",
    "perceptual_hash",
    "read_datalist",
    "read_pair",
    "read_photograph",
    "read_volume",
    "settle_duplicates",
]
