# SPDX-License-Identifier: Apache-2.0
"""Folders of small tasks on one saved backbone, as scripts of `examples/` leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import Swinv2Backbone

from sfa_peft import SFAConfig
from sfa_peft.dense import Preprocessing, TaskSpec
from tests.tiny import swinv2_config, upernet

NAMES = ["sky", "road", "car"]


def save_backbone(root: Path) -> Path:
    torch.manual_seed(3)
    Swinv2Backbone(swinv2_config()).save_pretrained(root / "backbone")
    return root / "backbone"


def plain_model(backbone: Path, seed: int = 0) -> Any:
    """A task model with the saved backbone and a head of its own."""
    model = upernet(seed)
    model.backbone.load_state_dict(Swinv2Backbone.from_pretrained(backbone).state_dict())
    return model


def describe(model: Any, backbone: Path) -> TaskSpec:
    return TaskSpec.describe(
        model,
        task="semantic_segmentation",
        backbone="backbone",
        source=backbone,
        preprocessing=Preprocessing("cover", (32, 32)),
        class_names=NAMES,
    )


def save_task(folder: Path, backbone: Path, *, seed: int = 0, **options: Any) -> Any:
    """Save a task as if trained, and return its model."""
    model = plain_model(backbone, seed)
    spec = describe(model, backbone)
    config = SFAConfig(
        **{"budget": 0.1, "score": "random", "seed": seed, "modules_to_save": "auto", **options}
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.01 if "sfa_pool" in name else 0.05) * noise)
    model.save_pretrained(folder)
    spec.write(folder)
    return model.eval()
