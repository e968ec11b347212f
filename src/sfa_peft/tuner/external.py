# SPDX-License-Identifier: Apache-2.0
r"""External adapters: a bottleneck with its own residual behind a layer (Eq. 3).

.. math:: x' = x + \mathrm{FC}_{d \to D}(\mathrm{ReLU}(\mathrm{FC}_{D \to d}(x)))

The up projection starts at zero, so a fresh adapter changes nothing, to the bit.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .weight_storage import is_packed, stored


def output_features(layer: nn.Module) -> int:
    """Return D, the number of features (channels) that a linear or convolution puts out."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features  # pyright: ignore


def make_projections(
    layer: nn.Module, width: int, *, bias: bool, neutral: bool
) -> tuple[nn.Module, nn.Module]:
    """Return the down (D to d) and up (d to D) projection for the output of `layer`.

    Args:
        layer: A linear layer, or a 2-D convolution (which gets 1x1 convolutions). Behind packed
            weights the projections are float32.
        width: d.
        bias: Whether both have biases.
        neutral: Whether the up projection starts at zero; otherwise at random values.
    """
    size, weight = output_features(layer), next(stored(layer))
    dtype = torch.float32 if is_packed(weight) else weight.dtype
    options = {"bias": bias, "device": weight.device, "dtype": dtype}
    if isinstance(layer, nn.Conv2d):
        down, up = nn.Conv2d(size, width, 1, **options), nn.Conv2d(width, size, 1, **options)
    else:
        down, up = nn.Linear(size, width, **options), nn.Linear(width, size, **options)
    if neutral:
        for parameter in up.parameters():
            nn.init.zeros_(parameter)
    return down, up


def apply_bottleneck(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    """Return Eq. 3 for features `x` (any shape the projections take), in the dtype of `x`."""
    # Autocast casts the weights (it knows no meta device); features need not become float32 first.
    is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    features = x if is_cast else x.to(cast(Tensor, down.weight).dtype)
    return x + up(torch.relu(down(features))).to(x.dtype)


class AdaptedLayer(nn.Module):
    """A plain layer followed by its external adapters: what merging leaves of them.

    A bottleneck is not linear, so it cannot be folded into a weight; it stays as ordinary modules.
    """

    def __init__(self, layer: nn.Module, projections: list[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.ModuleList(down for down, _ in projections)
        self.up = nn.ModuleList(up for _, up in projections)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the layer's output with every adapter applied, in order."""
        out = self.layer(*args, **kwargs)
        for down, up in zip(self.down, self.up, strict=True):
            out = apply_bottleneck(out, down, up)
        return out
