# SPDX-License-Identifier: Apache-2.0
"""Which slots of a pool belong to which weight: a few ranges each, one or more for every pick."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

#: For one weight the (first, last + 1) ranges of its slots in the pool.
Spans = list[tuple[int, int]]


def span_length(spans: Spans) -> int:
    """Return the number of slots in a weight's ranges."""
    return sum(b - a for a, b in spans)


def count_assigned(slots: Tensor) -> int:
    """Count positions that are assigned; none are on the meta device, which holds no values."""
    return 0 if slots.is_meta else int((slots >= 0).sum())


def find_spans(slots: Tensor, starts: Sequence[int]) -> list[Spans]:
    """Cut slots (sorted within each pick) at the weights' first positions."""
    spans: list[Spans] = [[] for _ in starts[:-1]]
    used = slots[: count_assigned(slots)]
    if not used.numel():
        return spans
    breaks = (used[1:] < used[:-1]).nonzero().squeeze(1) + 1  # where a new pick begins
    edges = [0, *breaks.tolist(), used.numel()]
    bounds = torch.tensor(starts, dtype=slots.dtype, device=slots.device)
    for first, last in pairwise(edges):
        cuts = (torch.searchsorted(used[first:last], bounds) + first).tolist()
        for ordinal, (a, b) in enumerate(pairwise(cuts)):
            if a < b:
                spans[ordinal].append((a, b))
    return spans
