# SPDX-License-Identifier: Apache-2.0
"""Mona's adapter, token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def branch(part: Any, x: Tensor, shape: tuple[int, int], first: int = 0) -> Tensor:
    """Return what an adapter adds, token by token; `first` tokens lie before the map."""
    mean, spread = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    normed = (x - mean) / (spread + 1e-5).sqrt() * part.norm.weight + part.norm.bias
    reduced = part.down(normed * part.norm_scale + x * part.input_scale)
    height, width = shape
    mixed = reduced.clone()
    for row in range(height):
        for column in range(width):
            around = 0
            for conv, size in zip(part.depthwise, (3, 5, 7), strict=True):
                around = around + conv.bias / 3
                for dy in range(-(size // 2), size // 2 + 1):
                    for dx in range(-(size // 2), size // 2 + 1):
                        y, z = row + dy, column + dx
                        if 0 <= y < height and 0 <= z < width:
                            tap = conv.weight[:, 0, dy + size // 2, dx + size // 2]
                            around = around + tap * reduced[:, first + y * width + z] / 3
            v = reduced[:, first + row * width + column] + around
            mixed[:, first + row * width + column] = (
                v + v @ part.mix.weight[:, :, 0, 0].T + part.mix.bias
            )
    return part.up(nn.functional.gelu(mixed))
