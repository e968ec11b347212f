# SPDX-License-Identifier: Apache-2.0
"""Models of timm and segmentation_models_pytorch: what `SFAConfig()` finds in them, as a table.

python -m tests.encoder_zoo

prints the table of docs/backbones.md. It needs both packages and torchvision, as `make
test-torchvision` installs them. Models are built without memory and without weights.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from sfa_peft import find_backbone, role_modules
from sfa_peft.backbones import Backbone
from sfa_peft.blocks import find_rows
from sfa_peft.tuner.targets import doubt
from tests.conformance.outcomes import table

PACKAGES = ("timm", "segmentation-models-pytorch", "torchvision", "torch", "transformers")
#: Of timm; the second kind are those that have to be told their layers.
TIMM = (
    "vit_base_patch16_224",
    "deit3_base_patch16_224",
    "beit_base_patch16_224",
    "eva02_base_patch14_224",
    "eva02_large_patch14_224",
    "vit_base_patch14_dinov2",
    "vit_base_patch16_dinov3",
    "vit_relpos_base_patch16_224",
    "aimv2_large_patch14_224",
    "samvit_base_patch16",
    "hiera_base_224",
    "swin_base_patch4_window7_224",
    "swinv2_base_window8_256",
    "swinv2_cr_base_224",
    "swin_s3_base_224",
    "pvt_v2_b2",
    "mvitv2_base",
    "twins_svt_base",
    "davit_base",
    "nest_base",
    "gcvit_base",
    "convit_base",
    "focalnet_base_srf",
    "mobilevit_s",
    "convnext_base",
    "convnextv2_base",
    "poolformer_m36",
)
TIMM_TOLD = (
    "cait_s24_224",
    "xcit_small_12_p16_224",
    "volo_d1_224",
    "crossvit_base_240",
    "tnt_b_patch16_224",
    "edgenext_base",
    "vitamin_base_224",
    "naflexvit_base_patch16_gap",
    "maxvit_base_tf_224",
    "levit_256",
    "mixer_b16_224",
    "resnet50",
)
TIMM_FEATURES = ("vit_base_patch16_224", "swin_base_patch4_window7_224", "swinv2_base_window8_256")
#: Class and encoder of segmentation_models_pytorch.
SMP = (
    ("Unet", "mit_b0"),
    ("Unet", "tu-swin_base_patch4_window7_224"),
    ("Unet", "tu-swinv2_base_window8_256"),
    ("DPT", "tu-vit_base_patch16_224"),
    ("Segformer", "mit_b0"),
    ("Segformer", "tu-pvt_v2_b2"),
    ("UPerNet", "tu-convnext_base"),
    ("Unet", "resnet50"),
)


def models() -> dict[str, Callable[[], nn.Module]]:
    """Return a constructor for each row of the table, by its name there."""
    import segmentation_models_pytorch as smp
    import timm
    import transformers

    built: dict[str, Callable[[], nn.Module]] = {}
    for name in (*TIMM, *TIMM_TOLD):
        built[f"timm `{name}`"] = lambda name=name: timm.create_model(name)
    for name in TIMM_FEATURES:
        built[f"timm `{name}`, `features_only`"] = lambda name=name: timm.create_model(
            name, features_only=True
        )
    wrapped = transformers.TimmWrapperConfig(architecture="vit_base_patch16_224", num_labels=3)
    built["Transformers `TimmWrapperForImageClassification`, `vit_base_patch16_224`"] = lambda: (
        transformers.TimmWrapperForImageClassification(wrapped)
    )
    built["Transformers UperNet, `TimmBackbone` with `pvt_v2_b2`"] = lambda: upernet("pvt_v2_b2")
    for head, encoder in SMP:
        built[f"smp `{head}`, `{encoder}`"] = lambda head=head, encoder=encoder: getattr(smp, head)(
            encoder, encoder_weights=None
        )
    return built


def upernet(backbone: str) -> nn.Module:
    """Return Transformers' UperNet on a backbone of timm."""
    import transformers

    inner = transformers.TimmBackboneConfig(
        backbone=backbone,
        out_features=None,
        out_indices=[0, 1, 2, 3],
        use_pretrained_backbone=False,
    )
    config = transformers.UperNetConfig(
        backbone_config=inner, num_labels=3, hidden_size=32, use_auxiliary_head=False
    )
    return transformers.UperNetForSemanticSegmentation(config)


def found(model: nn.Module, backbone: Backbone) -> list[str]:
    """Return where a backbone is, its blocks by stage, adapters, and share of eligible weights."""
    roles = role_modules(backbone)
    stages = Counter(stage for _, stage in {(r.block, r.stage) for r in roles})
    weights: list[Any] = [model.get_submodule(r.name).weight for r in roles]
    own = sum(p.numel() for n, p in model.named_parameters() if backbone.holds(n))
    return [
        f"`{backbone.name}`" if backbone.name else "the model",
        " + ".join(str(stages[stage]) for stage in sorted(stages)),
        str(sum(r.role.endswith("_out") for r in roles)),
        f"{sum(weight.numel() for weight in weights) / own:.0%}",
    ]


def lines() -> str:
    """Return the versions and both tables, as docs/backbones.md has them."""
    known, told = [], []
    for name, build in models().items():
        # The rates of dropped paths of smp's own encoders are read from a tensor.
        device = "cpu" if "mit_" in name else "meta"
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            model = build()
        backbone = find_backbone(model)
        if backbone is not None:
            known.append([name, *found(model, backbone)])
            continue
        rows = find_rows(model)
        reason = doubt(rows) if rows else "no blocks with such names"
        told.append([name, ", ".join(f"`{row.name}`" for row in rows), reason])
    used = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in PACKAGES)
    head = ["model", "backbone", "blocks by stage", "adapters", "eligible"]
    parts = [f"With {used}:", table(head, known), "These have to be told their layers:"]
    return "\n\n".join([*parts, table(["model", "blocks found", "why"], told)])


if __name__ == "__main__":
    print(lines())
