# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.examples.common.peers.kit import (
    assert_close,
    found,
    outputs,
    peer,
    scatter_new,
    swinv2,
    tiny_swinv2,
    tiny_vit,
    trained,
    vit_base,
)

MODELS = {"swinv2": (tiny_swinv2, 32), "vit": (tiny_vit, 16)}


@pytest.mark.parametrize("kind", MODELS)
def test_scales_and_shifts_can_be_folded_into_the_weights(kind: str) -> None:
    make, size = MODELS[kind]
    model, plain = make(), make()
    before = outputs(model, size)
    backbone = found(model)
    peer("ssf").add(backbone, 1)
    assert trained(backbone.module) == peer("ssf").parameters(backbone, 1)
    assert_close(outputs(model, size), before, atol=2.0)  # nearly neutral at the start
    scatter_new(backbone.module)

    folded = dict(plain.named_modules())
    for path, module in model.named_modules():
        if hasattr(module, "ssf"):
            layer = folded[path]
            scale, shift = 1 + module.ssf.scale.detach(), module.ssf.shift.detach()
            bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach() * scale
            layer.bias = nn.Parameter(bias + shift)
            layer.weight.data *= scale.view(-1, *[1] * (layer.weight.ndim - 1))

    assert_close(outputs(model, size), outputs(plain, size), atol=1e-4)
    assert not torch.allclose(outputs(model, size)[0], before[0], atol=1e-2)


def test_counts_are_those_of_the_papers_tables() -> None:
    for size, count, millions, percent in (
        ("base", 268_800, 88, 0.3),
        ("large", 403_200, 197, 0.2),
    ):
        assert peer("ssf").parameters(swinv2(size), 1) == count
        assert round(count / millions / 1e4, 1) == percent
    with_head = peer("ssf").parameters(vit_base(), 1) + 769 * 100
    assert with_head == 282_724  # 0.28 M in SSF's paper, ViT-B on 100 classes


def test_a_copy_of_the_model_has_hooks_of_its_own() -> None:
    model = tiny_vit()
    peer("ssf").add(found(model), 1)
    twin = copy.deepcopy(model)
    scatter_new(found(model).module)

    assert not torch.equal(outputs(twin, 16)[0], outputs(model, 16)[0])
