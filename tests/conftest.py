# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNet

from monai_unlearn import make_isic_phantom


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A small phantom data set, drawn once."""
    return Path(make_isic_phantom(tmp_path_factory.mktemp("data") / "phantom", number=30, size=48))


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images; set MONAI_UNLEARN_DATA to run the tests that need it."""
    folder = os.environ.get("MONAI_UNLEARN_DATA")
    if not folder:
        pytest.skip("needs real images: set MONAI_UNLEARN_DATA to the folder that holds isic2018_seg and quirks")
    return Path(folder)


def small_unet(norm="batch", seed=0, **kwargs):
    """A UNet of three levels with running statistics that are not the initial ones."""
    torch.manual_seed(seed)
    options = {"spatial_dims": 2, "in_channels": 3, "out_channels": 1, "channels": (4, 8, 16), "strides": (2, 2)}
    network = UNet(**{**options, "num_res_units": 2, "norm": norm, **kwargs})
    network.train()(torch.rand(4, 3, 16, 16))
    return network.eval()


@pytest.fixture
def network():
    return small_unet()
