# SPDX-License-Identifier: Apache-2.0
"""Tiny random models on disk, in place of the ones that PEFT's tests read from the Hub."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf

_FOLDER = Path(tempfile.mkdtemp(prefix="conformance-models-"))
_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_WIDE = {**_TEXT, "intermediate_size": 64}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_SWIN = {"patch_size": 4, "embed_dim": 16, "window_size": 4}
_PYRAMID = {
    **_SWIN,
    "image_size": 64,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


@functools.cache
def saved(name: str, build: Callable[[], hf.PreTrainedModel]) -> str:
    """Path of the model, built with seed 0 and saved when it is first asked for."""
    path = _FOLDER / name
    torch.manual_seed(0)
    build().save_pretrained(path)
    return str(path)


# PEFT's tests look for the family's name in the path.
DECODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "tiny-random-OPTForCausalLM": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_TEXT, ffn_dim=64, word_embed_proj_dim=32)
    ),
    "tiny-random-GPTJForCausalLM": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    ),
    "tiny-random-LlamaForCausalLM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "tiny-dummy-qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "tiny-random-Gemma3ForCausalLM": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_GROUPED, head_dim=8)
    ),
}
ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "tiny-random-BertModel": lambda: hf.BertModel(hf.BertConfig(**_WIDE)),
    "tiny-random-RobertaModel": lambda: hf.RobertaModel(hf.RobertaConfig(**_WIDE)),
    "tiny-random-DebertaModel": lambda: hf.DebertaModel(hf.DebertaConfig(**_WIDE)),
    "tiny-random-DebertaV2Model": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**_WIDE)),
}


def _swinv2() -> hf.PreTrainedModel:
    shape = {**_SWIN, "image_size": 32, "depths": [1, 1], "num_heads": [2, 2]}
    return hf.Swinv2ForImageClassification(hf.Swinv2Config(**shape, num_labels=3))


def _vit() -> hf.PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    return hf.ViTForImageClassification(hf.ViTConfig(**shape, **image, num_labels=3))


def _segformer() -> hf.PreTrainedModel:
    shape = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    config = hf.SegformerConfig(**shape, num_attention_heads=[1, 1, 2, 2], num_labels=3)
    return hf.SegformerForSemanticSegmentation(config)


def _upernet() -> hf.PreTrainedModel:
    config = hf.UperNetConfig(
        backbone_config=hf.Swinv2Config(**_PYRAMID),
        hidden_size=16,
        auxiliary_in_channels=64,
        auxiliary_channels=16,
        num_labels=3,
    )
    return hf.UperNetForSemanticSegmentation(config)


def _mask2former() -> hf.PreTrainedModel:
    widths = ("hidden_dim", "feature_size", "mask_feature_size", "encoder_feedforward_dim")
    config = hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(**_PYRAMID),
        **dict.fromkeys((*widths, "dim_feedforward"), 32),
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def _dpt() -> hf.PreTrainedModel:
    config = hf.DPTConfig(
        backbone_config=hf.Swinv2Config(**_PYRAMID),
        fusion_hidden_size=16,
        neck_hidden_sizes=[16, 32, 64, 128],
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
    )
    return hf.DPTForDepthEstimation(config)


# name -> (build, class to load with, side of the image, name of the tensor to compare)
VISION = {
    "swinv2_cls": (_swinv2, hf.Swinv2ForImageClassification, 32, "logits"),
    "vit_cls": (_vit, hf.ViTForImageClassification, 32, "logits"),
    "segformer_seg": (_segformer, hf.SegformerForSemanticSegmentation, 64, "logits"),
    "upernet_swinv2": (_upernet, hf.UperNetForSemanticSegmentation, 64, "logits"),
    "mask2former_swin": (
        _mask2former,
        hf.Mask2FormerForUniversalSegmentation,
        64,
        "class_queries_logits",
    ),
    "dpt_swinv2_depth": (_dpt, hf.DPTForDepthEstimation, 64, "predicted_depth"),
}
