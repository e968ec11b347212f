# SPDX-License-Identifier: Apache-2.0
"""The whole selection at once, by a score that needs no data."""

from __future__ import annotations

from ..config import SFAConfig
from ..sparse.pool import Pool
from .pick import pick, row_sizes
from .topk import RandomSource, Source, TensorSource


def select_without_data(pool: Pool, config: SFAConfig) -> None:
    """Make the whole selection at once, by a score that needs no gradients."""
    weights = [pool.weights[i].scored(pool.adapter_name) for i in range(len(pool.weights))]
    if any(weight.is_meta for weight in weights) or pool.values.is_meta:
        return
    sources: list[Source] = [TensorSource(w) for w in weights]
    if config.score == "random":
        sources = [
            RandomSource(w.numel(), f"{config.seed}/{i}", w.device) for i, w in enumerate(weights)
        ]
    pool.assign(
        pick(
            sources,
            pool.values.numel(),
            [pool.slots[:0].long()] * len(weights),
            ranking=config.ranking,
            granularity=config.granularity,
            row_sizes=row_sizes(weights),
        )
    )
