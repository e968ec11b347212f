# SPDX-License-Identifier: Apache-2.0
r"""External adapters: a bottleneck with its own residual behind a layer.

.. math:: x' = x + \mathrm{FC}_{d \to D}(\phi(\mathrm{down}(x)))

"bottleneck" is the paper's (Eq. 3), of one linear and a ReLU. "mona" is Mona's
(https://arxiv.org/abs/2408.08345), which looks at neighbours in the feature map too:

.. math::
    u &= \mathrm{FC}_{D \to d}(\mathrm{LN}(x) \odot g + x \odot g_x) \\
    v &= u + (\mathrm{dw}_3(u) + \mathrm{dw}_5(u) + \mathrm{dw}_7(u)) / 3 \\
    \phi(\mathrm{down}(x)) &= \mathrm{GELU}(v + \mathrm{conv}_1(v))

The up projection starts at zero, so a fresh adapter changes nothing, to the bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feature_map import FeatureMap
from .weight_storage import is_packed, stored

#: Sizes of Mona's depthwise convolutions, and what its norm is multiplied by at the start.
_KERNELS, _NORM_SCALE = (3, 5, 7), 1e-6


def output_features(layer: nn.Module) -> int:
    """Return D, the number of features (channels) that a linear, convolution or norm puts out."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features  # pyright: ignore


def make_projections(
    layer: nn.Module,
    width: int,
    *,
    bias: bool,
    neutral: bool,
    kind: str = "bottleneck",
    feature_map: FeatureMap | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Return the way down (D to d) and up (d to D) for the output of `layer`.

    Args:
        layer: A linear layer, or a 2-D convolution (which gets 1x1 convolutions). Behind packed
            weights the projections are float32.
        width: d.
        bias: Whether they have biases.
        neutral: Whether the up projection starts at zero; otherwise at random values.
        kind: One of `EXTERNAL_TYPES` of the config.
        feature_map: For "mona" how the layer's tokens lie in the image; None where its output is a
            map already.
    """
    size, weight = output_features(layer), next(stored(layer))
    dtype = torch.float32 if is_packed(weight) else weight.dtype
    options: dict[str, Any] = {"bias": bias, "device": weight.device, "dtype": dtype}
    is_convolution = isinstance(layer, nn.Conv2d)
    down: nn.Module
    if kind == "mona":
        down = MapDown(size, width, feature_map, channels_first=is_convolution, **options)
    elif is_convolution:
        down = nn.Conv2d(size, width, 1, **options)
    else:
        down = nn.Linear(size, width, **options)
    up = (
        nn.Conv2d(width, size, 1, **options)
        if is_convolution
        else nn.Linear(width, size, **options)
    )
    if neutral:
        for parameter in up.parameters():
            nn.init.zeros_(parameter)
    return down, up


class MapDown(nn.Linear):
    """Mona's way down, its activation included.

    Args:
        features: D.
        width: d.
        feature_map: How tokens lie in the image; None where features come as a map.
        channels_first: Whether features come as `(B, D, H, W)`.
        bias: Whether projection and convolutions have biases.
        options: Device and dtype of all parameters.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    mix_weight: Tensor
    mix_bias: Tensor | None

    def __init__(
        self,
        features: int,
        width: int,
        feature_map: FeatureMap | None,
        *,
        channels_first: bool,
        bias: bool,
        **options: Any,
    ) -> None:
        super().__init__(features, width, bias=bias, **options)
        self.feature_map, self.channels_first = feature_map, channels_first
        self.norm_scale = nn.Parameter(torch.full((features,), _NORM_SCALE, **options))
        self.input_scale = nn.Parameter(torch.ones(features, **options))
        self._take("norm", nn.LayerNorm(features, **options))
        for k in _KERNELS:
            own = nn.Conv2d(width, width, k, groups=width, bias=bias, **options)
            self._take(f"depthwise_{k}", own)
        self._take("mix", nn.Conv2d(width, width, 1, bias=bias, **options))

    def _take(self, name: str, layer: nn.Module) -> None:
        """Make a layer's parameters ours: PEFT finds no adapter's name in front of deeper ones."""
        for own, parameter in layer._parameters.items():
            self.register_parameter(f"{name}_{own}", parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Return d features for each of `(B, N, D)`, `(B, H, W, D)` or `(B, D, H, W)`."""
        x = input.movedim(1, -1) if self.channels_first else input
        normed = F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias)
        reduced = super().forward(normed * self.norm_scale + x * self.input_scale)
        if reduced.ndim == 4:
            out = self._mixed(reduced)
        else:
            leading, height, width = FeatureMap.find(self.feature_map, reduced.shape[1])
            before, tokens = reduced.split((leading, height * width), dim=1)
            out = self._mixed(tokens.unflatten(1, (height, width))).flatten(1, 2)
            out = torch.cat((before, out), dim=1) if leading else out
        out = F.gelu(out)
        return out.movedim(-1, 1) if self.channels_first else out

    def _mixed(self, tokens: Tensor) -> Tensor:
        """Return `(B, H, W, d)` after the convolutions and their residuals."""
        maps = tokens.movedim(-1, 1)
        maps = F.conv2d(maps, *self._kernel(), padding=_KERNELS[-1] // 2, groups=maps.shape[1])
        return (maps + F.conv2d(maps, self.mix_weight, self.mix_bias)).movedim(1, -1)

    def _kernel(self) -> tuple[Tensor, Tensor | None]:
        """Return the depthwise convolutions and their residual as a single one, and its bias."""
        largest = _KERNELS[-1]
        weights: list[Tensor] = [getattr(self, f"depthwise_{k}_weight") for k in _KERNELS]
        margins = [(largest - k) // 2 for k in _KERNELS]
        padded = [F.pad(w, [margin] * 4) for w, margin in zip(weights, margins, strict=True)]
        weight = torch.stack(padded).mean(0)
        centre = torch.zeros_like(weight[:1])
        centre[..., largest // 2, largest // 2] = 1
        if self.bias is None:
            return weight + centre, None
        biases: list[Tensor] = [getattr(self, f"depthwise_{k}_bias") for k in _KERNELS]
        return weight + centre, torch.stack(biases).mean(0)


def apply_bottleneck(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    """Return what an external adapter makes of `x` (any shape it takes), in the dtype of `x`."""
    # Autocast casts the weights (it knows no meta device); features need not become float32 first.
    is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    features = x if is_cast else x.to(cast(Tensor, down.weight).dtype)
    inner = down(features)
    return x + up(inner if isinstance(down, MapDown) else torch.relu(inner)).to(x.dtype)


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
