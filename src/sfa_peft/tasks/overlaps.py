# SPDX-License-Identifier: Apache-2.0
"""Counts which weights several adapters share, and whether they move them the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..sparse.delta import Deltas


@dataclass(frozen=True)
class PairOverlap:
    """What two adapters share.

    Attributes:
        first: One adapter.
        second: The other.
        shared: Weights that both select.
        share: `shared` over the size of the smaller selection, 0 to 1.
        same_sign: Share of the shared weights that both move the same way (0 counts as a way of
            its own); None where none is shared.
    """

    first: str
    second: str
    shared: int
    share: float
    same_sign: float | None


@dataclass(frozen=True)
class CombineReport:
    """Where the selections of several adapters overlap.

    Attributes:
        counts: Selected weights of each adapter.
        union: Weights that at least one selects.
        num_shared: Weights that more than one selects.
        pairs: What each two share.
    """

    counts: dict[str, int]
    union: int
    num_shared: int
    pairs: tuple[PairOverlap, ...]

    def __str__(self) -> str:
        lines = [f"{name}: {count:,} weights" for name, count in self.counts.items()]
        lines.append(f"together {self.union:,}, of which {self.num_shared:,} in several")
        for pair in self.pairs:
            sign = "" if pair.same_sign is None else f", {pair.same_sign:.1%} the same way"
            names = f"{pair.first} and {pair.second}"
            lines.append(f"  {names}: {pair.shared:,} ({pair.share:.1%} of the smaller){sign}")
        return "\n".join(lines)


def count_overlaps(selections: Mapping[str, Deltas]) -> CombineReport:
    """Return what selections share, by adapter."""
    counts = {name: _size(selection) for name, selection in selections.items()}
    union = shared = 0
    for tensor in dict.fromkeys(t for selection in selections.values() for t in selection):
        found = [selection[tensor][0] for selection in selections.values() if tensor in selection]
        _, times = torch.cat(found).unique(return_counts=True)
        union += times.numel()
        shared += int((times > 1).sum())
    pairs = tuple(_pair(a, b, selections) for a, b in combinations(selections, 2))
    return CombineReport(counts, union, shared, pairs)


def _pair(first: str, second: str, selections: Mapping[str, Deltas]) -> PairOverlap:
    a, b = selections[first], selections[second]
    shared = same = 0
    for tensor in a.keys() & b.keys():
        both, signs = _shared(*a[tensor], *b[tensor])
        shared, same = shared + both, same + signs
    smaller = min(_size(a), _size(b))
    return PairOverlap(
        first,
        second,
        shared,
        shared / smaller if smaller else 0.0,
        same / shared if shared else None,
    )


def _shared(a: Tensor, a_change: Tensor, b: Tensor, b_change: Tensor) -> tuple[int, int]:
    """Return how many positions two tensors share, and at how many the signs are equal."""
    inside = torch.isin(a, b, assume_unique=True)
    places = torch.searchsorted(b, a[inside])
    same = torch.sign(a_change[inside]) == torch.sign(b_change[places])
    return int(inside.sum()), int(same.sum())


def _size(selection: Deltas) -> int:
    return sum(indices.numel() for indices, _ in selection.values())
