# SPDX-License-Identifier: Apache-2.0
"""Tiny task models built from a config, each with the path of its backbone.

Invariant: nothing is downloaded, and a class the installed Transformers lacks skips the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.model_zoo import (
    ALL_STAGES,
    FAMILIES,
    PLAIN,
    SAM,
    SIZE,
    SWIN,
    TEXT,
    pixels,
    require,
    swinv2_config,
    tiny,
)


def _swinv2_head(model: str, config: str, **options: Any) -> Callable[[], PreTrainedModel]:
    stages = options.pop("stages", ALL_STAGES)
    return lambda: require(model)(
        require(config)(backbone_config=swinv2_config(out_features=stages), **options)
    )


# Widths are multiples of 32 where a head has a GroupNorm of 32 groups.
_MASKS = {"mask_feature_size": 32}
_DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 4,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
_DPT = {"neck_hidden_sizes": [16, 32, 64, 128], "fusion_hidden_size": 16}
_RTDETR = {
    "encoder_in_channels": [32, 64, 128],
    "feat_strides": [8, 16, 32],
    "encoder_hidden_dim": 16,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "decoder_in_channels": [16] * 3,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "num_queries": 4,
    "num_denoising": 0,
    "stages": ALL_STAGES[1:],
}


def _swin_config() -> Any:
    return require("SwinConfig")(out_features=ALL_STAGES, **SWIN)


def _upernet_swin() -> PreTrainedModel:
    config = require("UperNetConfig")(
        backbone_config=_swin_config(), hidden_size=16, use_auxiliary_head=False
    )
    return require("UperNetForSemanticSegmentation")(config)


def _maskformer(backbone: Callable[[], Any] = swinv2_config) -> PreTrainedModel:
    decoder = {k: v for k, v in _DETR.items() if "backbone" not in k}
    decoder = require("DetrConfig")(backbone_config=backbone(), use_timm_backbone=False, **decoder)
    config = require("MaskFormerConfig")(
        backbone_config=backbone(), decoder_config=decoder, fpn_feature_size=32, **_MASKS
    )
    return require("MaskFormerForInstanceSegmentation")(config)


def _depth_anything() -> PreTrainedModel:
    stages = {"out_features": ["stage1", "stage2"], "reshape_hidden_states": False}
    config = require("DepthAnythingConfig")(
        backbone_config=require("Dinov2Config")(**stages, **PLAIN),
        patch_size=PLAIN["patch_size"],
        reassemble_hidden_size=16,
        neck_hidden_sizes=[16, 16],
        reassemble_factors=[1, 1],
        fusion_hidden_size=16,
    )
    return require("DepthAnythingForDepthEstimation")(config)


def _two_towers(model: str, config: str) -> Callable[[], PreTrainedModel]:
    return lambda: require(model)(require(config)(vision_config=PLAIN, text_config=TEXT))


def _grounding_dino() -> PreTrainedModel:
    text = require("BertConfig")(vocab_size=1030, **TEXT)
    options = {k: v for k, v in _DETR.items() if k != "use_timm_backbone"}
    config = require("GroundingDinoConfig")(
        backbone_config=swinv2_config(out_features=ALL_STAGES[1:]), text_config=text, **options
    )
    return require("GroundingDinoForObjectDetection")(config)


def _oneformer() -> PreTrainedModel:
    widths = dict.fromkeys(("hidden_dim", "conv_dim", "mask_dim", "text_encoder_width"), 64)
    text = {"context_length": 8, "num_layers": 1, "vocab_size": 16, "n_ctx": 2}
    config = require("OneFormerConfig")(
        backbone_config=swinv2_config(),
        task_seq_len=8,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        is_training=False,
        use_auxiliary_loss=False,
        **widths,
        **{f"text_encoder_{name}": value for name, value in text.items()},
    )
    return require("OneFormerForUniversalSegmentation")(config)


def _sam() -> PreTrainedModel:
    prompt = {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2}
    config = require("SamConfig")(
        vision_config=SAM, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    return require("SamModel")(config)


# Each task head with the path of the backbone inside it. A DETR has one more level, `conv_encoder`,
# in some releases; the paths here leave it out.
HEADS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "clip": ("vision_model", _two_towers("CLIPForImageClassification", "CLIPConfig")),
    "conditional_detr": (
        "model.backbone.model",
        _swinv2_head(
            "ConditionalDetrForObjectDetection", "ConditionalDetrConfig", stages=["stage4"], **_DETR
        ),
    ),
    "d_fine": (
        "model.backbone.model",
        _swinv2_head("DFineForObjectDetection", "DFineConfig", **_RTDETR),
    ),
    "dab_detr": (
        "model.backbone.model",
        _swinv2_head("DabDetrForObjectDetection", "DabDetrConfig", stages=["stage4"], **_DETR),
    ),
    "deformable_detr": (
        "model.backbone.model",
        _swinv2_head(
            "DeformableDetrForObjectDetection",
            "DeformableDetrConfig",
            stages=ALL_STAGES[1:],
            num_feature_levels=4,
            **_DETR,
        ),
    ),
    "depth_anything": ("backbone", _depth_anything),
    "detr": (
        "model.backbone.model",
        _swinv2_head("DetrForObjectDetection", "DetrConfig", stages=["stage4"], **_DETR),
    ),
    "detr segmentation": (
        "detr.model.backbone.model",
        _swinv2_head("DetrForSegmentation", "DetrConfig", **_DETR),
    ),
    "dpt": (
        "backbone",
        _swinv2_head("DPTForDepthEstimation", "DPTConfig", reassemble_factors=[1] * 4, **_DPT),
    ),
    "glpn": ("glpn", FAMILIES["glpn"]),
    "grounding_dino": ("model.backbone.model", _grounding_dino),
    "mask2former": (
        "model.pixel_level_module.encoder",
        _swinv2_head(
            "Mask2FormerForUniversalSegmentation",
            "Mask2FormerConfig",
            feature_size=32,
            hidden_dim=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            **_MASKS,
        ),
    ),
    "maskformer": ("model.pixel_level_module.encoder", _maskformer),
    "maskformer swin": ("model.pixel_level_module.encoder", lambda: _maskformer(_swin_config)),
    "masked image modeling": (
        "swinv2",
        tiny("Swinv2ForMaskedImageModeling", "Swinv2Config", **SWIN),
    ),
    "oneformer": ("model.pixel_level_module.encoder", _oneformer),
    "rt_detr": (
        "model.backbone.model",
        _swinv2_head("RTDetrForObjectDetection", "RTDetrConfig", **_RTDETR),
    ),
    "rt_detr_v2": (
        "model.backbone.model",
        _swinv2_head("RTDetrV2ForObjectDetection", "RTDetrV2Config", **_RTDETR),
    ),
    "sam": ("vision_encoder", _sam),
    "segformer": ("segformer", FAMILIES["segformer"]),
    "siglip": ("vision_model", _two_towers("SiglipForImageClassification", "SiglipConfig")),
    "swinv2": ("swinv2", FAMILIES["swinv2"]),
    "upernet": (
        "backbone",
        _swinv2_head(
            "UperNetForSemanticSegmentation",
            "UperNetConfig",
            hidden_size=16,
            use_auxiliary_head=False,
        ),
    ),
    "upernet swin": ("backbone", _upernet_swin),
    "vit_mae": ("vit", FAMILIES["vit_mae"]),
    "zoedepth": (
        "backbone",
        _swinv2_head(
            "ZoeDepthForDepthEstimation",
            "ZoeDepthConfig",
            reassemble_factors=[1] * 4,
            backbone_hidden_size=128,
            bottleneck_features=16,
            bin_embedding_dim=16,
            num_attractors=[4, 4, 2, 1],
            bin_configurations=[
                {"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}
            ],
            **_DPT,
        ),
    ),
}


def inputs(head: str) -> dict[str, Tensor]:
    """Return a batch of two that a tiny task model accepts."""
    others: dict[str, dict[str, Tensor]] = {
        "grounding_dino": {"input_ids": torch.tensor([[101, 5, 1012, 102]] * 2)},
        "oneformer": {"task_inputs": torch.zeros(2, 8)},
        "sam": {"input_points": torch.ones(2, 1, 1, 2)},
    }
    return {"pixel_values": pixels(head), **others.get(head, {})}
