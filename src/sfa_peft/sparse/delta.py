# SPDX-License-Identifier: Apache-2.0
"""A sparse change of weights: positions and changes, of one weight (`Delta`) or of all (`Deltas`).

Where it trains, changes lie in one flat pool, and *slots* say which position each belongs to. A
weight's slots are a few ranges (`Spans`), one or more for every pick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: For one weight the (first, last + 1) ranges of its slots in the pool.
Spans = list[tuple[int, int]]

#: How the changes of several adapters become one.
METHODS = ("sum", "larger", "disjoint")


class Delta(NamedTuple):
    """The sparse change of one weight.

    Attributes:
        indices: Flat C-order positions, int64 (n,), strictly increasing.
        change: What is added there, float32 (n,).
    """

    indices: Tensor
    change: Tensor

    def added_to(self, weight: Tensor) -> Tensor:
        """Return a copy of a weight with the change added, on the weight's device."""
        indices, change = self.indices.to(weight.device), self.change.to(weight.device)
        flat = weight.detach().reshape(-1).clone()
        flat[indices] = adapt(flat[indices], change)
        return flat.view(weight.shape)


#: By full name of a weight; weights without a change are left out.
Deltas = Mapping[str, Delta]


def adding_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which changes are added to weights of a type: float32, or a wider one."""
    return torch.promote_types(dtype, torch.float32)


def adapt(base: Tensor, change: Tensor) -> Tensor:
    """Return base + change, added in float32 (or the base's wider type), of the base's type."""
    wide = adding_type(base.dtype)
    return (base.to(wide) + change.to(wide)).to(base.dtype)


def change_to(base: Tensor, adapted: Tensor) -> Tensor:
    """Return a change, float32, that leads from base to adapted (but for rare roundings)."""
    wide = adding_type(base.dtype)
    change = (adapted.to(wide) - base.to(wide)).float()
    missed = adapt(base, change) != adapted
    if bool(missed.any()):
        beyond = torch.where(adapted > adapt(base, change), torch.inf, -torch.inf)
        change = torch.where(missed, torch.nextafter(change, beyond.to(change)), change)
    return change


def count(deltas: Deltas) -> int:
    """Return how many weights are changed."""
    return sum(delta.indices.numel() for delta in deltas.values())


def unite(selections: Sequence[Deltas], factors: Sequence[float], method: str) -> dict[str, Delta]:
    """Return the union of several changes; added in float64.

    Args:
        selections: The changes.
        factors: One for each, for "sum".
        method: "sum", "larger" or "disjoint" (the first that has an entry gives its change).
    """
    united = {}
    for name in dict.fromkeys(n for selection in selections for n in selection):
        present = [
            (*selection[name], factor)
            for selection, factor in zip(selections, factors, strict=True)
            if name in selection
        ]
        indices = torch.cat([i for i, _, _ in present]).unique()
        values = torch.zeros_like(indices, dtype=torch.float64)
        taken = torch.zeros_like(indices, dtype=torch.bool)
        for own, change, factor in present:
            places = torch.searchsorted(indices, own)
            values[places] = _joined(values[places], taken[places], change, factor, method)
            taken[places] = True
        united[name] = Delta(indices, values.float())
    return united


def _joined(before: Tensor, taken: Tensor, change: Tensor, factor: float, method: str) -> Tensor:
    change = change.double()
    if method == "sum":
        return before + factor * change
    if method == "larger":
        return torch.where(change.abs() > before.abs(), change, before)
    return torch.where(taken, before, change)


class Slice(Protocol):
    """One adapter's change of one weight, while it lies in a pool (see `pool.PoolSlice`)."""

    # ruff: disable[D102]
    @property
    def spans(self) -> Spans: ...
    @property
    def trains(self) -> bool: ...
    @property
    def is_stand_in(self) -> bool: ...
    @property
    def keeps_graph(self) -> bool: ...
    def stamp(self) -> tuple[Any, ...]: ...
    def indices(self) -> Tensor: ...
    def change(self) -> Tensor: ...
    def room(self, dtype: torch.dtype, device: torch.device) -> Tensor: ...
    def free_room(self) -> None: ...
    def stand_in(self) -> Tensor: ...
    def everywhere(self, weight: Tensor) -> Tensor: ...

    # ruff: enable[D102]


# --- slots -------------------------------------------------------------------------------------


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


def by_weight(slots: Tensor, values: Tensor, starts: Sequence[int]) -> list[Delta]:
    """Return the change of each weight, out of slots; of the type of `values`.

    Args:
        slots: Positions over all weights, -1 for values without one.
        values: One per slot.
        starts: First position of each weight, and the end.
    """
    assigned = slots >= 0
    positions, order = slots[assigned].long().sort()
    values = values[assigned][order]
    cuts = torch.searchsorted(positions, positions.new_tensor(starts)).tolist()
    return [
        Delta(positions[a:b] - start, values[a:b])
        for (a, b), start in zip(pairwise(cuts), starts, strict=False)
    ]
