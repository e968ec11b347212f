# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfa_peft import TargetError
from tests.examples.common.peers.kit import (
    assert_close,
    blocks_of,
    found,
    outputs,
    peer,
    pixels,
    scatter_new,
    swinv2,
    swinv2_maps,
    tiny_swinv2,
    tiny_vit,
    trained,
)
from tests.slow_mona import branch


def test_two_adapters_act_on_the_sums_of_a_swinv2_block() -> None:
    # Images smaller than the configured ones: maps of 6, 3, 2 and 1, in padded windows.
    model, plain = tiny_swinv2(), tiny_swinv2()
    before = outputs(model, 24)
    backbone = found(model)
    peer("mona").add(backbone, 6)
    assert trained(model) == peer("mona").parameters(backbone, 6)
    assert_close(outputs(model, 24), before, atol=0.5)
    scatter_new(model)
    pairs = [block.mona for stage in model.encoder.layers for block in stage.blocks]

    def run(number: int, block: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        scale, shift = block.layernorm_after.weight.clone(), block.layernorm_after.bias.clone()
        block.layernorm_after.weight.zero_()
        block.layernorm_after.bias.zero_()
        x = block(x, shape)[0]  # the sum after attention
        block.layernorm_after.weight.copy_(scale)
        block.layernorm_after.bias.copy_(shift)
        x = x + branch(pairs[number].after_attention, x, shape)
        x = x + block.layernorm_after(block.output(block.intermediate(x)))
        return x + branch(pairs[number].after_mlp, x, shape)

    assert_close(outputs(model, 24), swinv2_maps(plain, run, 24), atol=2e-3)


def test_a_vits_class_token_passes_by_the_convolutions() -> None:
    model, plain = tiny_vit(), tiny_vit()
    backbone = found(model)
    peer("mona").add(backbone, 5)
    scatter_new(backbone.module)

    with torch.no_grad():
        x = plain.vit.embeddings(pixels(16))
        for block, own in zip(blocks_of(plain), blocks_of(model), strict=True):
            attended = block.attention(block.layernorm_before(x))
            x = x + (attended[0] if isinstance(attended, tuple) else attended)
            x = x + branch(own.mona.after_attention, x, (4, 4), first=1)
            inner = block.layernorm_after(x)
            x = x + (block.mlp(inner) if hasattr(block, "mlp") else mlp_of_4(block, inner))
            x = x + branch(own.mona.after_mlp, x, (4, 4), first=1)
        wanted = plain.classifier(plain.vit.layernorm(x)[:, 0])

    assert_close(outputs(model, 16), [wanted], atol=1e-3)


def mlp_of_4(block: Any, x: Tensor) -> Tensor:
    return block.output.dense(block.intermediate(x))


def test_counts_are_those_of_the_papers_formula() -> None:
    def published(m: int, n: int) -> int:
        return 2 * ((2 * n + 3) * m + n**2 + 84 * n + 2)

    def beside(m: int, n: int) -> int:  # scales by channel, and biases of convolutions: the code's
        return 2 * (2 * m - 2 + 4 * n)

    for size, dims in (("base", 128), ("large", 192)):
        blocks = [dims * 2**i for i, depth in enumerate((2, 2, 18, 2)) for _ in range(depth)]
        for width in (32, 64, 128):
            wanted = sum(published(m, width) + beside(m, width) for m in blocks)
            assert peer("mona").parameters(swinv2(size), width) == wanted
            assert wanted / sum(published(m, width) for m in blocks) < 1.04


def test_other_backbones_are_refused() -> None:
    for name in ("mona", "vpt"):
        backbone = found(tiny_vit())
        other = type(backbone)(backbone.name, backbone.module, "hiera")
        with pytest.raises(TargetError, match=f"--method {name}: knows SwinV2 and ViT, got hiera"):
            peer(name).add(other, 1)
