# SPDX-License-Identifier: Apache-2.0
"""Selections like those of training, for a model of any size: where their entries lie.

A trained selection prefers some rows and columns of a matrix and leaves others out, so it touches
far less memory than as many random positions. `trained_selections.json` holds what was measured on
adapters that were trained (see `trained_selections.py`): of each matrix its density, and how the
entries are spread over rows and columns. Here positions of that kind are drawn for other matrices:
each takes the numbers of the measured one in the same stage, as far up in it, of the same kind.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILE = Path(__file__).with_name("trained_selections.json")
#: Rows that hold anything are sorted by how much they hold, and cut here (as shares of them).
EDGES = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
#: How full the rows and columns that may be used can get.
FULLEST = 0.95
_PATH = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)$")


class Spread(NamedTuple):
    """How entries are spread over the rows (or columns) of a matrix.

    Attributes:
        used: Share of the rows that hold anything.
        bands: Share of the entries in each band between `EDGES` of those.
    """

    used: float
    bands: tuple[float, ...]


class Measured(NamedTuple):
    """One matrix of a measured adapter."""

    stage: int
    height: float  # of its block in the stage, from 0 to 1
    kind: str
    density: float
    rows: Spread
    columns: Spread


def spread_of(counts: Tensor) -> Spread:
    """Return how entries are spread, from their number in each row."""
    held = counts[counts > 0].double().sort(descending=True).values
    if not len(held):
        return Spread(0.0, (0.0,) * (len(EDGES) - 1))
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), held.cumsum(0)]) / held.sum()
    at = torch.tensor(EDGES, dtype=torch.float64) * len(held)
    low = at.floor().long().clamp(max=len(held) - 1)
    cut = sums[low] + (sums[low + 1] - sums[low]) * (at - low)
    return Spread(len(held) / len(counts), tuple((cut[1:] - cut[:-1]).tolist()))


def places_of(names: list[str]) -> list[tuple[int, float, str]]:
    """Return (stage, height in it from 0 to 1, kind) of weights, by their names.

    Raises:
        ValueError: If one is not of a SwinV2.
    """
    found = []
    for name in names:
        match = _PATH.search(name)
        if match is None:
            raise ValueError(f"{name}: not a weight in a block of a SwinV2")
        found.append((int(match[1]), int(match[2]), match[3]))
    last = {stage: max(b for s, b, _ in found if s == stage) for stage, _, _ in found}
    return [(stage, block / max(last[stage], 1), kind) for stage, block, kind in found]


def load(share: float, rho: float) -> list[Measured]:
    """Return the measured adapter whose budget and split are nearest."""
    cases = json.loads(FILE.read_text())["cases"]
    mixed = 0.0 < rho < 1.0
    near = min(cases, key=lambda c: ((c["rho"] > 0) != mixed, abs(c["budget"] - share)))
    spread = lambda numbers: Spread(numbers[0], tuple(numbers[1:]))  # noqa: E731
    return [
        Measured(*t["place"], t["density"], spread(t["rows"]), spread(t["columns"]))
        for t in near["tensors"]
    ]


def draw(pool: Any, count: int, measured: list[Measured], seed: int = 0) -> Tensor:
    """Return positions over all weights of a pool, int64 (count,), in no order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [weight.tensor.shape for weight in pool.weights]
    alike = [_nearest(place, measured) for place in places_of(pool.names)]
    counts = _counts(shapes, alike, count)
    found = [
        _positions(shape, like, own, generator) + start
        for shape, like, own, start in zip(shapes, alike, counts, pool.starts, strict=False)
    ]
    joined = torch.cat(found)
    return joined[torch.randperm(len(joined), generator=generator)]


def fill(pool: Any, ends: list[int], *, measured: list[Measured] | None, seed: int = 0) -> None:
    """Assign positions as several picks would have: sorted within each of them.

    Args:
        pool: Of an adapter; what it holds is overwritten.
        ends: How many are assigned after each pick, beginning with 0.
        measured: What they shall be like; None for uniform ones.
        seed: Of the positions.
    """
    slots, eligible = pool.slots, pool.starts[-1]
    if measured is not None:
        positions = draw(pool, ends[-1], measured, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        stride = eligible // len(slots)
        positions = torch.arange(len(slots)) * stride  # one of each stretch: distinct, and cheap
        positions += torch.randint(stride, positions.shape, generator=generator)
        positions = positions[torch.randperm(len(slots), generator=generator)]
    for first, last in pairwise(ends):
        slots[first:last] = positions[first:last].sort().values.to(slots)


def _nearest(place: tuple[int, float, str], measured: list[Measured]) -> Measured:
    stage, height, kind = place
    same = [m for m in measured if m.stage == stage and m.kind == kind]
    return min(same, key=lambda m: abs(m.height - height))


def _counts(shapes: list[Any], alike: list[Measured], count: int) -> list[int]:
    """Share entries out in proportion to the measured densities, as far as there is room."""
    wanted = torch.tensor([r * c * m.density for (r, c), m in zip(shapes, alike, strict=True)])
    room = torch.tensor(
        [
            FULLEST * _used(r, m.rows) * _used(c, m.columns)
            for (r, c), m in zip(shapes, alike, strict=True)
        ]
    )
    wanted, room = wanted.double(), room.double().floor()
    low, high = 0.0, 1e6
    for _ in range(200):  # the factor with which all that fits is as much as is wanted
        factor = (low + high) / 2
        low, high = (
            (factor, high) if (factor * wanted).minimum(room).sum() < count else (low, factor)
        )
    found = (high * wanted).minimum(room).floor().long()
    short = count - int(found.sum())
    for ordinal in (room - found).argsort(descending=True).tolist():
        more = min(short, int(room[ordinal]) - int(found[ordinal]))
        found[ordinal] += more
        short -= more
    if short:
        raise ValueError(f"{count} entries do not fit into the rows and columns that are used")
    return found.tolist()


def _used(size: int, spread: Spread) -> int:
    return max(1, round(spread.used * size)) if spread.used else 0


def _levels(size: int, spread: Spread, generator: torch.Generator) -> Tensor:
    """Return what share of the entries each of `size` rows gets, in random order."""
    used = _used(size, spread)
    found = torch.zeros(size)
    for share, (a, b) in zip(spread.bands, pairwise(EDGES), strict=True):
        places = torch.arange(used, dtype=torch.float64)
        # What of the band a row covers; a band can be narrower than a row.
        inside = (places + 1).clamp(max=b * used) - places.clamp(min=a * used)
        found[:used] += share * inside.clamp(min=0).float() / max((b - a) * used, 1e-9)
    return found[torch.randperm(size, generator=generator)]


def _positions(shape: torch.Size, like: Measured, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` different positions in a matrix, int64."""
    if not count:
        return torch.zeros(0, dtype=torch.int64)
    rows = _levels(shape[0], like.rows, generator)
    columns = _levels(shape[1], like.columns, generator)
    chance = rows[:, None] * columns
    low, high = 0.0, 1e9
    levels, numbers = (
        one[:, None] * other
        for one, other in zip(
            rows.unique(return_counts=True), columns.unique(return_counts=True), strict=True
        )
    )
    for _ in range(60):  # chances above 1 are full, so others get more
        factor = (low * high) ** 0.5 if low else high / 2
        enough = float(((factor * levels).clamp(max=1) * numbers).sum()) >= count
        low, high = (low, factor) if enough else (factor, high)
    is_in = torch.rand(shape, generator=generator) < high * chance
    chosen = is_in.view(-1).nonzero().squeeze(1)
    if len(chosen) < count:
        rest = ((chance > 0) & ~is_in).view(-1).nonzero().squeeze(1)
        order = torch.randperm(len(rest), generator=generator)
        return torch.cat([chosen, rest[order[: count - len(chosen)]]])
    return chosen[torch.randperm(len(chosen), generator=generator)[:count]]


def lines_touched(positions: Tensor, eligible: int, per_line: int = 16) -> float:
    """Return the share of cache lines (of 16 floats) that hold one of some positions."""
    return len((positions // per_line).unique()) / (eligible / per_line)
