# SPDX-License-Identifier: Apache-2.0
"""Tiny stand-ins with timm's module names (checked against timm 1.0.31), which needs torchvision.

Only what names and call order depend on is there; windows are not, so a "Swin" attends globally.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """`attn`: `qkv` or, as in PVT v2, `q` and `kv`; then `proj`."""

    def __init__(self, dim: int, *, split: bool = False) -> None:
        super().__init__()
        if split:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention over (B, N, C)."""
        both = self.qkv(x) if hasattr(self, "qkv") else torch.cat([self.q(x), self.kv(x)], -1)
        return self.proj(F.scaled_dot_product_attention(*both.chunk(3, -1)))


class Mlp(nn.Module):
    """`mlp`: `fc1`, `fc2`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of (B, N, C)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, dim: int, *, split: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, split=split)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """`blocks.N.attn.qkv/proj`, `blocks.N.mlp.fc1/fc2`, `patch_embed.proj`, `head`."""

    def __init__(self, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, 8, 8))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 3) of pixels (B, 3, H, W)."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Merging(nn.Module):
    """`downsample`: four neighbours into one token of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N / 4, 2C) of (B, N, C)."""
        return self.reduction(self.norm(x.reshape(len(x), -1, 4 * x.shape[-1])))


class Stage(nn.Module):
    """`downsample` (but for the first stage), then `blocks.M`."""

    def __init__(self, dim: int, depth: int, *, merges: bool, split: bool) -> None:
        super().__init__()
        self.downsample = Merging(dim // 2) if merges else nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, split=split) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's tokens."""
        return self.blocks(self.downsample(x))


class SwinTransformer(nn.Module):
    """`layers.N.blocks.M...`; with `flat` the names of `features_only`: `layers_N.blocks.M...`."""

    def __init__(self, dim: int = 8, *, flat: bool = False, split: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, 8, 8))
        stages = [Stage(dim, 1, merges=False, split=split)]
        stages.append(Stage(2 * dim, 2, merges=True, split=split))
        self.flat = flat
        if flat:
            self.layers_0, self.layers_1 = stages
        else:
            self.layers = nn.Sequential(*stages)
        self.head = nn.Sequential()
        self.head.add_module("fc", nn.Linear(2 * dim, 3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 3) of pixels (B, 3, H, W)."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = self.layers_1(self.layers_0(x)) if self.flat else self.layers(x)
        return self.head(x.mean(1))
