# SPDX-License-Identifier: Apache-2.0
"""BiFPN: maps of all scales, fused from the coarse to the fine and back (Tan et al., 2020).

Section 3 of EfficientDet (https://arxiv.org/abs/1911.09070): weighted fusion, separable
convolutions, no node where there is nothing to fuse. Two things differ, for detectors with few
images a device: GroupNorm in place of BatchNorm, and one extra level in place of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu, silu

_EPSILON = 1e-4  # of the sum of weights, Sec. 3.3


class BiFPN(nn.Module):
    """Maps of one width, fused both ways, in place of torchvision's ``FeaturePyramidNetwork``.

    Args:
        in_channels: Channels of the backbone's maps, the finest first; each has half the height and
            width of the one before, rounded up.
        out_channels: Channels of all maps that come out.
        num_layers: How often the maps are fused there and back.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, *, num_layers: int = 3
    ) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, out_channels, 1), _norm(out_channels))
            for channels in in_channels
        )
        self.layers = nn.ModuleList(
            BiFPNLayer(len(in_channels) + 1, out_channels) for _ in range(num_layers)
        )

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return fused maps by the names of the given ones, and ``pool``, half as high as the last.

        Args:
            maps: The backbone's, ``(B, in_channels[i], h_i, w_i)``, the finest first.

        Returns:
            ``(B, out_channels, h_i, w_i)`` each.
        """
        levels = [
            lateral(features)
            for lateral, features in zip(self.laterals, maps.values(), strict=True)
        ]
        levels.append(_half(levels[-1]))
        for layer in self.layers:
            levels = layer(levels)
        return dict(zip([*maps, "pool"], levels, strict=True))


class BiFPNLayer(nn.Module):
    """One way down and up again (Fig. 3d of EfficientDet).

    Args:
        num_levels: Maps, 2 or more.
        channels: Of each map.
    """

    def __init__(self, num_levels: int, channels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(FusedNode(2, channels) for _ in range(num_levels - 1))
        # Between the ends the map that came in is fused once more.
        self.up = nn.ModuleList(
            FusedNode(3 if level < num_levels - 1 else 2, channels)
            for level in range(1, num_levels)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return fused maps of the same shapes, the finest first."""
        above = levels[-1]
        inner = [above]
        for level in range(len(levels) - 2, -1, -1):
            size = (levels[level].shape[-2], levels[level].shape[-1])
            above = self.down[level](levels[level], interpolate(above, size, mode="nearest"))
            inner.insert(0, above)
        outer = [inner[0]]
        for level in range(1, len(levels)):
            own = [levels[level]] if level == len(levels) - 1 else [levels[level], inner[level]]
            outer.append(self.up[level - 1](*own, _half(outer[-1])))
        return outer


class FusedNode(nn.Module):
    """A mean of maps with learnt weights of 0 or more, and a separable convolution (Sec. 3.3).

    Args:
        num_inputs: Maps that are fused.
        channels: Of each map.
    """

    def __init__(self, num_inputs: int, channels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_inputs))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.norm = _norm(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give each map the same weight."""
        nn.init.ones_(self.weights)

    def forward(self, *maps: Tensor) -> Tensor:
        """Return one map of the shape that all the given ones have, ``(B, channels, h, w)``."""
        weights = relu(self.weights)
        shares = weights / (weights.sum() + _EPSILON)
        fused = torch.zeros_like(maps[0])
        for share, features in zip(shares, maps, strict=True):
            fused = fused + share * features
        return self.norm(self.pointwise(self.depthwise(silu(fused))))


def _half(features: Tensor) -> Tensor:
    return max_pool2d(features, 3, stride=2, padding=1)


def _norm(channels: int) -> nn.GroupNorm:
    """Return a norm of groups of 8 channels, as 32 of 256 are, or of a few more."""
    most = max(1, channels // 8)
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)
