# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
    vit_base,
)


def adapted(part: Any, x: Tensor) -> Tensor:
    inner = x @ part.down.weight.T + part.down.bias
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    return x + part.scale * (inner @ part.up.weight.T + part.up.bias)


def test_what_a_block_puts_out_goes_through_its_adapter() -> None:
    model, plain = tiny_swinv2(), tiny_swinv2()
    before = outputs(model)
    backbone = found(model)
    peer("adapter_plus").add(backbone, 20)
    assert trained(model) == peer("adapter_plus").parameters(backbone, 20)
    assert_close(outputs(model), before, atol=0.05)  # Houlsby's start is nearly neutral
    scatter_new(model)
    blocks = [block for stage in model.encoder.layers for block in stage.blocks]
    assert [b.adapter_plus.down.out_features for b in blocks] == [16, 16, 20, 20, 20, 20]

    maps = swinv2_maps(
        plain, lambda i, block, x, shape: adapted(blocks[i].adapter_plus, block(x, shape)[0])
    )

    assert_close(outputs(model), maps, atol=1e-3)
    assert not torch.allclose(maps[0], before[0], atol=0.1)


def test_a_vits_blocks_have_them_too() -> None:
    model, plain = tiny_vit(), tiny_vit()
    backbone = found(model)
    peer("adapter_plus").add(backbone, 5)
    scatter_new(backbone.module)

    with torch.no_grad():
        x = plain.vit.embeddings(pixels(16))
        for block, own in zip(blocks_of(plain), blocks_of(model), strict=True):
            output = block(x)
            x = adapted(own.adapter_plus, output[0] if isinstance(output, tuple) else output)
        wanted = plain.classifier(plain.vit.layernorm(x)[:, 0])

    assert_close(outputs(model, 16), [wanted])


def test_counts_are_the_published_ones() -> None:
    # The paper's 0.20 M for width 8, a head of 50 classes (VTAB's mean) among them.
    assert peer("adapter_plus").parameters(vit_base(), 8) + 769 * 50 == 204_434


def test_one_bottleneck_a_block_cannot_spend_more_than_16_percent() -> None:
    backbone = swinv2("base")
    total = sum(p.numel() for p in backbone.module.parameters())
    for name in ("adapter_plus", "adaptformer"):
        shares = [peer(name).parameters(backbone, width) / total for width in (1024, 5000)]
        assert [round(100 * share) for share in shares] == [16, 16]


@pytest.mark.parametrize("width", [1, 300])
def test_no_bottleneck_is_wider_than_its_block(width: int) -> None:
    model = tiny_vit()
    peer("adapter_plus").add(found(model), width)
    assert {b.adapter_plus.down.out_features for b in blocks_of(model)} == {min(width, 24)}
