# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.examples.common.peers.kit import (
    assert_close,
    blocks_of,
    found,
    outputs,
    peer,
    pixels,
    scatter_new,
    swinv2,
    tiny_swinv2,
    tiny_vit,
    trained,
    vit_base,
)


class LiteralWindows(nn.Module):
    """Prompts before the tokens of each window, all of them queries, keys and values."""

    def __init__(self, attention: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.own, self.prompts = attention, prompts

    def forward(self, x: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor]:
        own, count, size = self.own, len(self.prompts), x.shape[1]
        heads, width = own.num_attention_heads, own.attention_head_size
        table = own.continuous_position_bias_mlp(own.relative_coords_table).view(-1, heads)
        windows = []
        for number, window in enumerate(x):
            tokens = torch.cat((self.prompts, window))
            result = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                q, k, v = (f(tokens)[:, part] for f in (own.query, own.key, own.value))
                q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
                scores = q @ k.T * min(float(own.logit_scale[head].exp()), 100.0)
                bias = 16 * torch.sigmoid(table[own.relative_position_index, head])
                if mask is not None:
                    bias = bias + 2 * mask[number % len(mask)]
                scores[count:, count:] += bias
                result.append(torch.softmax(scores, dim=1) @ v)
            windows.append(torch.cat(result, dim=1)[count:])
        assert windows[0].shape == (size, heads * width)
        return (torch.stack(windows),)


def test_each_window_attends_to_its_blocks_prompts() -> None:
    model, plain = tiny_swinv2(), tiny_swinv2()
    before = outputs(model)
    backbone = found(model)
    peer("vpt").add(backbone, 3)
    assert trained(model) == peer("vpt").parameters(backbone, 3)
    scatter_new(model)
    masked = 0
    for stage, own in zip(plain.encoder.layers, model.encoder.layers, strict=True):
        for block, other in zip(stage.blocks, own.blocks, strict=True):
            masked += block.shift_size > 0
            prompts = other.attention.self.prompts
            assert prompts.shape[0] == 3
            block.attention.self = LiteralWindows(block.attention.self, prompts)
    assert masked  # the meta-test: some windows have masks

    assert_close(outputs(model), outputs(plain), atol=1e-4)
    assert not torch.allclose(outputs(model)[0], before[0], atol=1e-2)


def test_prompts_that_nobody_looks_at_change_nothing() -> None:
    model = tiny_swinv2()
    before = outputs(model)
    peer("vpt").add(found(model), 2)
    with torch.no_grad():
        for stage in model.encoder.layers:
            for block in stage.blocks:
                block.attention.self._shared = lambda projection, x, own=block.attention.self: (
                    own._heads(projection(x))[:, :, :0]  # no prompt at all
                )
                block.attention.self.prompts = nn.Parameter(torch.empty(0, 1))

    assert_close(outputs(model), before, atol=1e-5)


def test_a_vits_prompts_stand_after_the_class_token_of_each_block() -> None:
    model, plain = tiny_vit(), tiny_vit()
    backbone = found(model)
    peer("vpt").add(backbone, 3)
    assert trained(backbone.module) == peer("vpt").parameters(backbone, 3) == 3 * 3 * 24
    scatter_new(backbone.module)

    with torch.no_grad():
        x = plain.vit.embeddings(pixels(16))
        for block, own in zip(blocks_of(plain), blocks_of(model), strict=True):
            prompts = own.attention.prompts.expand(2, -1, -1)
            output = block(torch.cat((x[:, :1], prompts, x[:, 1:]), dim=1))
            x = output[0] if isinstance(output, tuple) else output
            x = torch.cat((x[:, :1], x[:, 4:]), dim=1)
        wanted = plain.classifier(plain.vit.layernorm(x)[:, 0])

    assert_close(outputs(model, 16), [wanted])


def test_counts_are_those_of_the_papers_tables() -> None:
    # 50 prompts a block, VPT's usual number.
    for size, count, millions, percent in (
        ("base", 601_600, 88, 0.7),
        ("large", 902_400, 197, 0.5),
    ):
        assert peer("vpt").parameters(swinv2(size), 50) == count
        assert round(count / millions / 1e4, 1) == percent
    assert peer("vpt").parameters(vit_base(), 50) == 12 * 50 * 768


def test_prompts_start_within_the_bound_of_the_patch_embedding() -> None:
    model = tiny_vit()
    peer("vpt").add(found(model), 200)
    bound = math.sqrt(6 / (3 * 4 * 4 + 24))
    for block in blocks_of(model):
        assert 0.95 * bound < float(block.attention.prompts.detach().abs().max()) <= bound
