# SPDX-License-Identifier: Apache-2.0
"""Whether a selection is one from the middle of a run."""

from __future__ import annotations

from ..config import SFAConfig
from ..sparse.pool import Pool
from .pick import row_sizes


def is_unfinished(pool: Pool, config: SFAConfig) -> bool:
    """Whether a run would certainly have selected more.

    Rows may leave a part of the budget open, and the literal schedule always does. How large that
    part is depends on the run, so the largest possible one passes for finished.
    """
    if not config.selects_while_training:
        return False
    selected = pool.num_selected
    return selected == 0 or pool.size - selected > _most_left_open(pool, config)


def _most_left_open(pool: Pool, config: SFAConfig) -> int:
    """Return the most slots that a finished selection may leave open."""
    left = 0
    if config.granularity == "row":  # less than the row that did not fit any more
        sizes = row_sizes([pool.weights[i].tensor for i in range(len(pool.weights))])
        left = max(sizes) - 1 if config.ranking == "global" else sum(sizes) - len(sizes)
    if config.schedule == "literal":  # 1/n, and n is at least 2
        left += pool.size if config.select_until is not None else pool.size - pool.size // 2
    return left
