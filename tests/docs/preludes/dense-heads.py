# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from transformers import DPTConfig, DPTForDepthEstimation, TrainingArguments

import tests.tiny
from sfa_peft.dense import SceneDataset
from tests.head_zoo import HEADS
from tests.task_folder import save_backbone
from tests.tiny import swinv2_config

Path("path/to").mkdir(parents=True)
save_backbone(Path("path/to"))
upernet, mask2former = tests.tiny.upernet(), HEADS["mask2former"][1]()
dpt = DPTForDepthEstimation(
    DPTConfig(
        backbone_config=swinv2_config(),
        neck_hidden_sizes=[16, 32, 64, 128],
        fusion_hidden_size=16,
        reassemble_factors=[1] * 4,
    )
)
args, train = TrainingArguments("out/depth", use_cpu=True), SceneDataset(4)
