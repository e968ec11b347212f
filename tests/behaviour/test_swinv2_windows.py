# SPDX-License-Identifier: Apache-2.0
"""transformers' SwinV2 has the windows, shifts and masks of the original code, at any image size.

The attention of each block is computed again pair of tokens by pair of tokens, by the rules of the
published code: a window is never larger than the map that the model was built for; where it
covers that map nothing is shifted; maps are padded with zeros to whole windows; tokens attend to
each other if they share a window, and no border of the map was rolled in between them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import Swinv2Backbone, Swinv2Config

PRETRAINED = [4, 4, 2, 0]


def windows_and_shifts(image_size: int, window: int, stages: int = 4) -> list[list[int]]:
    """Return window and shift of the second block of each stage, as SwinTransformerBlock's init."""
    rows = []
    for stage in range(stages):
        resolution = image_size // 4 // 2**stage
        size, shift = window, window // 2
        if resolution <= size:
            size, shift = resolution, 0
        rows.append([size, shift])
    return rows


def bias_of(attention: Any, down: int, right: int, window: int, pretrained: int) -> torch.Tensor:
    """Return the heads' position bias of a key so far below and to the right of its query."""
    side = pretrained if pretrained > 0 else window
    log_spaced = [
        math.copysign(math.log2(1 + abs(8 * -step / max(side - 1, 1))) / 3, -step)
        for step in (down, right)
    ]
    return 16 * attention.continuous_position_bias_mlp(torch.tensor(log_spaced)).sigmoid()


def attended(
    layer: Any, tokens: torch.Tensor, size: tuple[int, int], rule: list[int], pretrained: int
) -> torch.Tensor:
    """Return the attention's output `(H * W, C)` of tokens `(H * W, C)`, pair by pair."""
    (height, width), (window, shift) = size, rule
    module, dense = layer.attention.self, layer.attention.output.dense
    rows, columns = (-(-side // window) * window for side in size)
    padded = torch.zeros(rows, columns, tokens.shape[-1])
    padded[:height, :width] = tokens.view(height, width, -1)
    heads = module.num_attention_heads
    query, key, value = (
        part(padded).unflatten(-1, (heads, -1)) for part in (module.query, module.key, module.value)
    )
    query, key = (torch.nn.functional.normalize(part, dim=-1) for part in (query, key))
    scale = module.logit_scale.clamp(max=math.log(100)).exp().flatten()
    biases = {
        (down, right): bias_of(module, down, right, window, pretrained)
        for down in range(1 - window, window)
        for right in range(1 - window, window)
    }

    def place(row: int, column: int) -> tuple[int, int, bool, bool]:
        """Return which window a token is in, and whether it was rolled around a border."""
        return (
            (row - shift) % rows // window,
            (column - shift) % columns // window,
            row < shift,
            column < shift,
        )

    positions = [(row, column) for row in range(rows) for column in range(columns)]
    together: dict[Any, list[tuple[int, int]]] = {}
    for position in positions:
        together.setdefault(place(*position), []).append(position)
    outputs = []
    for row in range(height):
        for column in range(width):
            others = together[place(row, column)]
            logits = torch.stack(
                [
                    scale * (query[row, column] * key[other]).sum(-1)
                    + biases[other[0] - row, other[1] - column]
                    for other in others
                ]
            )
            shares = logits.softmax(0)
            values = torch.stack([value[other] for other in others])
            outputs.append((shares[..., None] * values).sum(0).flatten())
    return dense(torch.stack(outputs))


@pytest.mark.parametrize(
    ("built_for", "window", "image"),
    [
        (32, 4, (32, 32)),  # maps of 8, 4, 2, 1: smaller than a window from the second stage on
        (32, 16, (32, 32)),  # a window larger than the image
        (64, 4, (36, 52)),  # a smaller image, whole windows only with padding
        (32, 4, (48, 72)),  # a larger one
        (48, 5, (48, 48)),  # 12 tokens in windows of 5
    ],
)
def test_attention_is_that_of_the_original_code(
    built_for: int, window: int, image: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=built_for,
        window_size=window,
        embed_dim=8,
        depths=[2] * 4,
        num_heads=[1, 2, 2, 2],
        pretrained_window_sizes=PRETRAINED,
        out_features=["stage4"],
    )
    model = Swinv2Backbone(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # biases too: padding has the values' bias as its value
        parameter.add_(torch.randn_like(parameter) * 0.2)
    seen: list[Any] = []
    for stage in model.encoder.layers:
        for layer in stage.blocks:
            layer.register_forward_pre_hook(lambda _, args: seen.append([args[0][0], args[1]]))
            layer.layernorm_before.register_forward_pre_hook(
                lambda _, args: seen[-1].append(args[0][0])
            )

    model(torch.randn(1, 3, *image))

    rules = windows_and_shifts(built_for, window)
    layers = [layer for stage in model.encoder.layers for layer in stage.blocks]
    assert len(seen) == len(layers) == 8
    for number, (layer, (tokens, size, found)) in enumerate(zip(layers, seen, strict=True)):
        stage, shifted = divmod(number, 2)
        size_and_shift = rules[stage] if shifted else [rules[stage][0], 0]
        expected = attended(layer, tokens, tuple(size), size_and_shift, PRETRAINED[stage])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("image_size", "window", "published"),
    [
        (192, 12, [[12, 6], [12, 6], [12, 0], [6, 0]]),
        (480, 30, [[30, 15], [30, 15], [30, 0], [15, 0]]),  # MIM-Depth on NYUv2
        (352, 22, [[22, 11], [22, 11], [22, 0], [11, 0]]),  # and on KITTI
        (640, 12, [[12, 6], [12, 6], [12, 6], [12, 6]]),
        (64, 4, [[4, 2], [4, 2], [4, 0], [2, 0]]),
    ],
)
def test_windows_and_shifts_of_each_stage_are_the_published_ones(
    image_size: int, window: int, published: list[list[int]]
) -> None:
    config = Swinv2Config(image_size=image_size, window_size=window, depths=[2] * 4)
    with torch.device("meta"):
        model = Swinv2Backbone(config)

    blocks = [stage.blocks for stage in model.encoder.layers]
    assert [[pair[1].window_size, pair[1].shift_size] for pair in blocks] == published
    assert [pair[0].shift_size for pair in blocks] == [0] * 4
    assert windows_and_shifts(image_size, window) == published
