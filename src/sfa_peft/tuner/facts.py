# SPDX-License-Identifier: Apache-2.0
"""What a model card says about an adapter, counted on the live model."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

from torch import nn

from ..config import SFAConfig
from ..model_card import CardFacts, StageFacts
from .adapter import Adapter
from .layer import SFALayer, adapter_layers, find_adapter


def card_facts(model: nn.Module, config: SFAConfig, adapter_name: str) -> CardFacts:
    """Return what an adapter's budget became, by stage of the backbone."""
    layers = adapter_layers(model, adapter_name)
    adapter = cast(Adapter, find_adapter(model, adapter_name))
    pool = adapter.pool
    eligible: dict[int | None, int] = defaultdict(int)
    selected: dict[int | None, int] = defaultdict(int)
    widths: dict[int | None, list[int]] = defaultdict(list)
    if pool is not None:
        for ordinal, weight in enumerate(pool.weights):
            stage = cast(SFALayer, weight.owner).stage
            eligible[stage] += weight.tensor.numel()
            selected[stage] += pool.count(ordinal)
    external = 0
    for layer in layers:
        if adapter_name in layer.sfa_down:
            parts = layer.sfa_down[adapter_name], layer.sfa_up[adapter_name]
            external += sum(p.numel() for part in parts for p in part.parameters())
            widths[layer.stage].append(parts[0].weight.shape[0])  # pyright: ignore
    stages = sorted({*eligible, *widths}, key=lambda stage: -1 if stage is None else stage)
    return CardFacts(
        budget=config.budget,
        backbone=adapter.record.total,
        external=external,
        to_select=0 if pool is None else pool.size,
        stages=[StageFacts(s, eligible[s], selected[s], widths[s]) for s in stages],
    )
