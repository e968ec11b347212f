# SPDX-License-Identifier: Apache-2.0
"""Three task models whose backbones are equal: two of one class, one of another."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation, Swinv2ForImageClassification

from sfa_peft.tasks import TaskBank
from tests.tiny import images, swinv2_config, upernet

PIXELS = images(seed=5)["pixel_values"]
NAMES = ["segmentation", "depth", "classes"]
# By task: budget, external share, modules_to_save. One has no external adapter, one only that.
SETTINGS = {
    "segmentation": (0.2, 0.5, ["decode_head"]),
    # "head" alone would match `head.head` as well, which PEFT then cannot load.
    "depth": (0.1, 0.0, ["neck", "head.head"]),
    "classes": (0.05, 1.0, ["classifier"]),
}


def segmentation_model() -> nn.Module:
    return upernet(seed=0)


def depth_model() -> nn.Module:
    torch.manual_seed(7)
    config = DPTConfig(
        backbone_config=swinv2_config(),
        neck_hidden_sizes=[16, 32, 64, 128],
        fusion_hidden_size=16,
        reassemble_factors=[1] * 4,
    )
    model = DPTForDepthEstimation(config)
    model.backbone.load_state_dict(segmentation_model().backbone.state_dict())
    return model


def class_model() -> nn.Module:
    """Return a model whose backbone is of another class, under another name."""
    torch.manual_seed(8)
    model = Swinv2ForImageClassification(swinv2_config(num_labels=4))
    source = segmentation_model().backbone
    model.swinv2.encoder.load_state_dict(source.encoder.state_dict())
    model.swinv2.embeddings.load_state_dict(source.embeddings.state_dict())
    return model


MODELS = {"segmentation": segmentation_model, "depth": depth_model, "classes": class_model}


def answer(output) -> torch.Tensor:
    found = getattr(output, "logits", None)
    return output.predicted_depth if found is None else found


def make_bank(folders, names=NAMES) -> TaskBank:
    bank = TaskBank(segmentation_model())
    for name in names:
        bank.add(name, folders[name], MODELS[name]())
    return bank


def output(bank: TaskBank, name: str | None) -> torch.Tensor:
    if name is None:
        with bank.activate(None) as backbone, torch.no_grad():
            return backbone(PIXELS).feature_maps[-1]
    return answer(bank.run(name, pixel_values=PIXELS))
