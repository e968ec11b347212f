# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Swinv2Backbone

from sfa_peft import SFAConfig
from sfa_peft.dense import DeconvDepthConfig, DeconvForDepthEstimation, Preprocessing, TaskSpec
from tests.task_folder import save_backbone, save_task

backbone = save_backbone(Path())
save_task(Path("out/ade20k"), backbone, seed=1)
estimator = Swinv2Backbone.from_pretrained(backbone)
depth_model = DeconvForDepthEstimation(DeconvDepthConfig(estimator.config, max_depth=10.0))
depth_model.backbone = estimator
spec = TaskSpec.describe(
    depth_model,
    task="depth_estimation",
    backbone="backbone",
    source=backbone,
    preprocessing=Preprocessing("keep"),
)
get_peft_model(depth_model, SFAConfig(modules_to_save="auto", score="random")).save_pretrained(
    "out/nyu"
)
spec.write("out/nyu")
x = a = b = torch.randn(1, 3, 32, 32)
loader = [x, x]
