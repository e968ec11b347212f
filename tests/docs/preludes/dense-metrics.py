# SPDX-License-Identifier: Apache-2.0
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import Dataset

import sfa_peft.dense
from sfa_peft.dense import (
    CLASS_NAMES,
    THING_NAMES,
    DeconvDepthConfig,
    DeconvForDepthEstimation,
    SceneSplit,
)
from tests.head_zoo import HEADS
from tests.tiny import swinv2_config, upernet

data = SimpleNamespace(validation=SceneSplit(1, size=32), class_names=CLASS_NAMES)
objects = SimpleNamespace(validation=SceneSplit(1, "instances", size=64))
names, val = THING_NAMES, Dataset()
model, mask2former = upernet(num_labels=8).eval(), HEADS["mask2former"][1]().eval()
depth_model = DeconvForDepthEstimation(DeconvDepthConfig(swinv2_config(), max_depth=10.0)).eval()
mask2former.config.num_labels = len(names)
pixel_values = torch.randn(1, 3, 512, 530)
predicted = labels = np.zeros((1, 512, 530), int)
# Two scales in place of six: the page's picture is as large as its windows.
fewer = partial(sfa_peft.dense.multi_scale_probabilities, scales=(0.5, 1.0))
monkeypatch.setattr(sfa_peft.dense, "multi_scale_probabilities", fewer)
