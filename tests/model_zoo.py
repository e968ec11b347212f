# SPDX-License-Identifier: Apache-2.0
"""Tiny models built from a config, one per supported family.

Invariant: nothing is downloaded, and a class the installed Transformers lacks skips the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

SIZE = 32
STAGE_DEPTHS = (1, 1, 2, 1)
PLAIN_DEPTHS = (2,)

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PLAIN = {**TEXT, "image_size": SIZE, "patch_size": 8}
_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
SWIN = {
    "image_size": SIZE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": list(STAGE_DEPTHS),
    "num_heads": [1, 2, 2, 2],
    "window_size": 4,
}
_PYRAMID = {
    "num_encoder_blocks": 4,
    "depths": list(STAGE_DEPTHS),
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 1, 2, 2],
}
CONVNEXT = {"hidden_sizes": [16, 16, 32, 32], "depths": list(STAGE_DEPTHS)}
SAM = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 32,
    "image_size": SIZE,
    "patch_size": 8,
    "output_channels": 16,
    "num_pos_feats": 8,
    "global_attn_indexes": [1],
    "window_size": 2,
}
ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def require(name: str) -> Any:
    """Return a class of Transformers, or skip the test where this release lacks it."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def tiny(model: str, config: str, **options: Any) -> Callable[[], PreTrainedModel]:
    """Return a constructor of a model from its config."""
    return lambda: require(model)(require(config)(**options))


def swinv2_config(**options: Any) -> Any:
    """Return the config of a tiny Swin V2 whose four stages feed a task head."""
    return require("Swinv2Config")(**{**SWIN, "out_features": ALL_STAGES, **options})


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "beit": tiny("BeitForImageClassification", "BeitConfig", **PLAIN),
    "clip_vision_model": tiny("CLIPVisionModel", "CLIPVisionConfig", **PLAIN),
    "convnext": tiny("ConvNextForImageClassification", "ConvNextConfig", **CONVNEXT),
    "convnextv2": tiny("ConvNextV2ForImageClassification", "ConvNextV2Config", **CONVNEXT),
    "data2vec-vision": tiny(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", **PLAIN
    ),
    "deit": tiny("DeiTForImageClassification", "DeiTConfig", **PLAIN),
    "dinov2": tiny("Dinov2ForImageClassification", "Dinov2Config", **PLAIN),
    "dinov2 swiglu": tiny("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True, **PLAIN),
    "dinov2_with_registers": tiny(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **PLAIN
    ),
    "dinov3_convnext": tiny("DINOv3ConvNextModel", "DINOv3ConvNextConfig", **CONVNEXT),
    "dinov3_vit": tiny("DINOv3ViTModel", "DINOv3ViTConfig", **PLAIN),
    "dinov3_vit gated": tiny("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, **PLAIN),
    "dpt": tiny(
        "DPTForDepthEstimation",
        "DPTConfig",
        is_hybrid=False,
        neck_hidden_sizes=[16, 16],
        reassemble_factors=[1, 1],
        fusion_hidden_size=16,
        backbone_out_indices=[0, 1],
        **PLAIN,
    ),
    "eomt": tiny(
        "EomtForUniversalSegmentation",
        "EomtConfig",
        num_blocks=1,
        num_upscale_blocks=1,
        num_queries=4,
        **PLAIN,
    ),
    "focalnet": tiny(
        "FocalNetForImageClassification",
        "FocalNetConfig",
        image_size=SIZE,
        embed_dim=16,
        focal_levels=[1] * 4,
        focal_windows=[3] * 4,
        **CONVNEXT,
    ),
    "glpn": tiny(
        "GLPNForDepthEstimation",
        "GLPNConfig",
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=16,
        **_PYRAMID,
    ),
    "hiera": tiny(
        "HieraForImageClassification",
        "HieraConfig",
        image_size=[SIZE, SIZE],
        embed_dim=16,
        depths=list(STAGE_DEPTHS),
        num_heads=[1, 2, 2, 2],
    ),
    "ijepa": tiny("IJepaForImageClassification", "IJepaConfig", **PLAIN),
    "maskformer-swin": tiny("MaskFormerSwinModel", "MaskFormerSwinConfig", **SWIN),
    "pvt": tiny(
        "PvtForImageClassification",
        "PvtConfig",
        image_size=SIZE,
        sequence_reduction_ratios=[2, 2, 1, 1],
        mlp_ratios=[2] * 4,
        **_PYRAMID,
    ),
    "pvt_v2": tiny(
        "PvtV2ForImageClassification",
        "PvtV2Config",
        image_size=SIZE,
        mlp_ratios=[2] * 4,
        **_PYRAMID,
    ),
    "sam_vision_model": tiny("SamVisionModel", "SamVisionConfig", **SAM),
    "segformer": tiny(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=16,
        **_PYRAMID,
    ),
    "siglip_vision_model": tiny("SiglipVisionModel", "SiglipVisionConfig", **PLAIN),
    # Its bias table does not follow a window that is clamped, so no stage may be smaller than one.
    "swin": tiny(
        "SwinForImageClassification",
        "SwinConfig",
        **{**SWIN, "patch_size": 2, "window_size": 2},
    ),
    "swinv2": tiny("Swinv2ForImageClassification", "Swinv2Config", **SWIN),
    "videomae": tiny(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        num_frames=2,
        tubelet_size=2,
        **PLAIN,
    ),
    "vit": tiny("ViTForImageClassification", "ViTConfig", **PLAIN),
    "vit_mae": tiny("ViTMAEForPreTraining", "ViTMAEConfig", **PLAIN, **_DECODER),
    "vit_msn": tiny("ViTMSNForImageClassification", "ViTMSNConfig", **PLAIN),
    "vitdet": tiny(
        "VitDetBackbone",
        "VitDetConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        pretrain_image_size=SIZE,
        patch_size=8,
    ),
    "yolos": tiny(
        "YolosForObjectDetection",
        "YolosConfig",
        num_detection_tokens=4,
        **{**PLAIN, "image_size": [SIZE, SIZE]},
    ),
}

_STAGED = ("conv", "swin", "focal", "glpn", "hiera", "pvt", "segformer")


def depths(family: str) -> tuple[int, ...]:
    """Return the number of blocks in each stage of a family's tiny model."""
    staged = any(part in family for part in _STAGED)
    return STAGE_DEPTHS if staged else PLAIN_DEPTHS


def pixels(family: str) -> torch.Tensor:
    """Return a batch of two inputs that a family's tiny model accepts."""
    shape = (2, 2, 3, SIZE, SIZE) if family == "videomae" else (2, 3, SIZE, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
