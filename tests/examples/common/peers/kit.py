# SPDX-License-Identifier: Apache-2.0
"""Small SwinV2 and ViT, and the paper's backbones without memory, for the methods of others."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Swinv2Backbone,
    Swinv2Config,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from sfa_peft import Backbone, find_backbone
from tests.tiny import STAGES, swinv2_config


def peer(name: str) -> Any:
    return importlib.import_module("common.peers").PEERS[name]


def paper_config(size: str) -> Swinv2Config:
    """Return the configuration of the SwinV2 of the paper's tables."""
    dim, heads = {"base": (128, 4), "large": (192, 6)}[size]
    return Swinv2Config(
        image_size=192,
        window_size=12,
        embed_dim=dim,
        depths=[2, 2, 18, 2],
        num_heads=[heads * 2**stage for stage in range(4)],
        out_features=STAGES,
    )


@cache
def swinv2(size: str) -> Backbone:
    """Return the backbone of the paper's tables, on the meta device."""
    with torch.device("meta"):
        return found(Swinv2Backbone(paper_config(size)))


@cache
def vit_base() -> Backbone:
    """Return ViT-B/16 without a head, on the meta device."""
    with torch.device("meta"):
        return found(ViTModel(ViTConfig(), add_pooling_layer=False))


def tiny_swinv2(**changes: Any) -> nn.Module:
    """Return a SwinV2 with shifted windows, padded maps and masks in its first stage."""
    torch.manual_seed(0)
    options = {"image_size": 32, "window_size": 4, "depths": [2, 1, 2, 1]} | changes
    return scattered(Swinv2Backbone(swinv2_config(**options)))


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
    )
    return scattered(ViTForImageClassification(config))


def scattered(model: nn.Module) -> nn.Module:
    """Return a model whose norms and biases are not all one and zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def found(model: nn.Module) -> Backbone:
    backbone = find_backbone(model)
    assert backbone is not None
    return backbone


def scatter_new(model: nn.Module) -> None:
    """Move what a method trains away from where it starts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def pixels(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def outputs(model: nn.Module, size: int = 32) -> list[Tensor]:
    """Return a model's feature maps, or its scores."""
    with torch.no_grad():
        result = model(pixel_values=pixels(size))
    return list(result.feature_maps) if "feature_maps" in result else [result.logits]


def swinv2_maps(model: nn.Module, run_block: Any, size: int = 32) -> list[Tensor]:
    """Run a SwinV2 block by block.

    `run_block(number, block, x, shape)` returns what a block puts out.
    """
    maps, number = [], 0
    with torch.no_grad():
        x, shape = model.embeddings(pixels(size))
        for stage in model.encoder.layers:
            for block in stage.blocks:
                x = run_block(number, block, x, shape)
                number += 1
            maps.append(x.transpose(1, 2).unflatten(2, shape))
            if stage.downsample is not None:
                x, shape = stage.downsample(x, shape), tuple((s + 1) // 2 for s in shape)
    return maps


def assert_close(found: list[Tensor], wanted: list[Tensor], atol: float = 2e-5) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def blocks_of(model: Any) -> Any:
    """Return a ViT's blocks, in the names of transformers 5 or 4."""
    return model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
