# SPDX-License-Identifier: Apache-2.0
"""Every family, bare and below a task head, through its whole life: wrap, train, save, reload."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
from peft import get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.tuner import SFALayer
from tests.head_zoo import HEADS
from tests.head_zoo import inputs as head_inputs
from tests.model_zoo import FAMILIES, depths, pixels
from tests.whole_life import BUDGET, adapters, evaluate, fresh, live_through


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_comes_back_to_the_bit(family: str, tmp_path) -> None:
    live_through(FAMILIES[family], {"pixel_values": pixels(family)}, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_has_its_adapters_and_they_run_attention_first(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(fresh(FAMILIES[family]), SFAConfig(budget=BUDGET)).eval()
    calls: list[tuple[int | None, str | None]] = []
    for layer in adapters(model):
        layer.sfa_up["default"].register_forward_hook(
            lambda *_, layer=layer: calls.append((layer.block, layer.role))
        )
    evaluate(model, {"pixel_values": pixels(family)})
    sub_layers = ["mlp_out"] if "convnext" in family else ["attn_out", "mlp_out"]
    blocks = range(sum(depths(family)))
    assert calls == [(block, role) for block in blocks for role in sub_layers]
    roles = Counter(layer.role for layer in adapters(model))
    assert roles == dict.fromkeys(sub_layers, len(blocks))


@pytest.mark.parametrize("head", HEADS)
def test_below_a_head_only_the_backbone_is_adapted(head: str, tmp_path) -> None:
    path, build = HEADS[head]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(fresh(build), SFAConfig(budget=BUDGET))
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    assert all(m.name.replace("conv_encoder.", "").startswith(f"{path}.") for m in layers)
    if head not in FAMILIES:  # those have lived already
        live_through(build, head_inputs(head), tmp_path)
