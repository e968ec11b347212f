# SPDX-License-Identifier: Apache-2.0
"""BiFPN against EfficientDet's equations, one place at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfa_peft.dense.heads.bifpn import BiFPN, BiFPNLayer, FusedNode

SHAPES = [(9, 6), (5, 3), (3, 2), (2, 1)]  # each half of the one before, rounded up


def upsampled(source: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows = [source.shape[1] * row // shape[0] for row in range(shape[0])]
    columns = [source.shape[2] * column // shape[1] for column in range(shape[1])]
    return source[:, rows][:, :, columns]


def pooled(source: np.ndarray) -> np.ndarray:
    """The largest of 3 x 3 places around every second one."""
    channels, height, width = source.shape
    out = np.empty((channels, -(-height // 2), -(-width // 2)))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            rows = slice(max(0, 2 * row - 1), 2 * row + 2)
            columns = slice(max(0, 2 * column - 1), 2 * column + 2)
            out[:, row, column] = source[:, rows, columns].max((1, 2))
    return out


def normed(source: np.ndarray, norm: torch.nn.GroupNorm) -> np.ndarray:
    groups = source.reshape(norm.num_groups, -1)
    spread = groups.var(1, keepdims=True) + norm.eps
    flat = ((groups - groups.mean(1, keepdims=True)) / np.sqrt(spread)).reshape(source.shape)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return flat * weight[:, None, None] + bias[:, None, None]


def fused(node: FusedNode, *maps: np.ndarray) -> np.ndarray:
    """Sec. 3.3: weights cut off at 0 over their sum; then a separable convolution."""
    weights = np.maximum(node.weights.detach().numpy(), 0)
    total = sum(w * m for w, m in zip(weights, maps, strict=True)) / (weights.sum() + 1e-4)
    total = total / (1 + np.exp(-total))
    around = np.pad(total, ((0, 0), (1, 1), (1, 1)))
    kernel = node.depthwise.weight.detach().numpy()[:, 0]
    out = np.zeros_like(total)
    for row in range(3):
        for column in range(3):
            part = around[:, row : row + total.shape[1], column : column + total.shape[2]]
            out += kernel[:, row, column, None, None] * part
    mixed = np.einsum("oi,ihw->ohw", node.pointwise.weight.detach().numpy()[:, :, 0, 0], out)
    return normed(mixed + node.pointwise.bias.detach().numpy()[:, None, None], node.norm)


def there_and_back(layer: BiFPNLayer, levels: list[np.ndarray]) -> list[np.ndarray]:
    """Fig. 3d, each map by its own equation."""
    last = len(levels) - 1

    def inner(level: int) -> np.ndarray:
        if level == last:
            return levels[last]
        above = upsampled(inner(level + 1), levels[level].shape[1:])
        return fused(layer.down[level], levels[level], above)

    def outer(level: int) -> np.ndarray:
        if level == 0:
            return inner(0)
        below = pooled(outer(level - 1))
        own = [levels[level]] if level == last else [levels[level], inner(level)]
        return fused(layer.up[level - 1], *own, below)

    return [outer(level) for level in range(len(levels))]


def shaken(neck: BiFPN) -> BiFPN:
    torch.manual_seed(1)
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter)
    return neck.double()


def test_a_bifpn_is_the_papers_equations_one_by_one() -> None:
    widths = [3, 5, 4, 2]
    neck = shaken(BiFPN(widths, 16, num_layers=2))
    weights = torch.cat([m.weights for m in neck.modules() if isinstance(m, FusedNode)])
    assert (weights < 0).any()  # cut off
    assert (weights > 0).any()
    maps = {
        str(level): torch.randn(2, width, *shape, dtype=torch.float64)
        for level, (width, shape) in enumerate(zip(widths, SHAPES, strict=True))
    }

    found = neck(maps)

    assert list(found) == ["0", "1", "2", "3", "pool"]
    for image in range(2):
        levels = []
        for (convolution, norm), features in zip(neck.laterals, maps.values(), strict=True):
            kernel = convolution.weight.detach().numpy()[:, :, 0, 0]
            mixed = np.einsum("oi,ihw->ohw", kernel, features[image].numpy())
            levels.append(normed(mixed + convolution.bias.detach().numpy()[:, None, None], norm))
        levels.append(pooled(levels[-1]))
        for layer in neck.layers:
            levels = there_and_back(layer, levels)
        for wanted, features in zip(levels, found.values(), strict=True):
            np.testing.assert_allclose(features[image].detach().numpy(), wanted, atol=1e-10)


def test_every_map_reaches_every_map() -> None:
    neck = BiFPN([2, 2, 2], 4, num_layers=1).double()
    maps = {
        str(level): torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True)
        for level, shape in enumerate(SHAPES[:3])
    }
    for features in neck(maps).values():
        gradients = torch.autograd.grad(
            features.square().sum(), [*maps.values()], retain_graph=True
        )
        assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("number", [2, 3])
def test_a_node_begins_as_the_mean_of_its_maps(number: int) -> None:
    node = FusedNode(number, 4)

    assert node.weights.tolist() == [1.0] * number


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 8), (44, 4), (16, 2), (12, 1), (3, 1)]
)
def test_a_norm_has_eight_channels_or_more_in_a_group(channels: int, groups: int) -> None:
    assert FusedNode(2, channels).norm.num_groups == groups


def test_a_map_of_one_place_can_be_trained_on_alone() -> None:
    neck = BiFPN([8] * 2, 16, num_layers=1)

    fused = neck({"0": torch.randn(1, 8, 2, 2), "1": torch.randn(1, 8, 1, 1)})

    assert all(features.isfinite().all() for features in fused.values())
