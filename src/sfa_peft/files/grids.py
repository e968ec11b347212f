# SPDX-License-Identifier: Apache-2.0
"""The weights of matrices by how likely they are selected, out of counts of rows and columns.

Training selects whole rows and columns more than others. A row's *class* is the number of binary
digits of its squared count of selected entries, and so is a column's. The classes of its row and
its column give a weight its *level*: weights of one level are selected about as often as each
other, in whatever tensor they are. So each level is one long list to `indices`, with a density of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import isqrt, log2
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError
from .entropy import Section, entropy, squeeze
from .indices import (
    Indices,
    Record,
    check_positions,
    check_size,
    pack_indices,
    runs,
    unpack_indices,
)

Classes = NDArray[np.uint8]

TENSOR = np.dtype([("size", "<u8"), ("entries", "<u8"), ("columns", "<u4")])

#: Levels, the densest first; weights of a row or a column without an entry have none of them.
LEVELS = 64
#: A tensor with a grid has at least so many weights for each row or column.
_LEAST = 8


class TensorRecord(NamedTuple):
    """What a file says of one tensor; the fields of TENSOR as Python integers."""

    size: int  # weights
    entries: int  # selected ones
    columns: int  # 0 where its positions are a list of its own

    @property
    def num_classes(self) -> int:
        """Bytes of the classes of its rows and columns."""
        return self.size // self.columns + self.columns if self.columns else 0


class Grid:
    """How the weights of one tensor are dealt out to levels: in the order of their positions.

    Args:
        rows: Class of each row, uint8 (rows,).
        columns: Class of each column, uint8 (columns,).
        entries: Number of selected entries.

    Attributes:
        sizes: Number of weights of each level, int64 (LEVELS,).
    """

    def __init__(self, rows: Classes, columns: Classes, entries: int) -> None:
        self.rows, self.columns, self.entries = rows, columns, entries
        kinds, self._kind = np.unique(rows, return_inverse=True)
        # Rows of one class have the same columns in each level.
        sums = kinds[:, None].astype(np.int64) + columns
        levels = np.clip((entries**2).bit_length() + 4 - sums, 0, LEVELS - 1)
        levels[(kinds[:, None] == 0) | (columns == 0)] = LEVELS
        self._levels = levels
        self._order = levels.argsort(1, kind="stable")
        places = levels + (LEVELS + 1) * np.arange(kinds.size)[:, None]
        counts = np.bincount(places.ravel(), minlength=kinds.size * (LEVELS + 1))
        counts = counts.reshape(kinds.size, LEVELS + 1)
        self._first = np.cumsum(counts, 1) - counts  # of a level's columns in the order
        widths = counts[self._kind, :LEVELS].T  # of a row in a level
        self._starts = np.cumsum(widths).reshape(widths.shape) - widths  # level after level
        self._widths = widths
        self.sizes = widths.sum(1)

    @classmethod
    def of(cls, positions: Indices, size: int, columns: int) -> Grid:
        """Return the grid of a tensor's selected positions."""
        row, column = np.divmod(positions, columns)
        rows, cols = (
            np.bincount(places, minlength=count)
            for places, count in ((row, size // columns), (column, columns))
        )
        return cls(_classes(rows), _classes(cols), positions.size)

    def split(self, positions: Indices) -> list[Indices]:
        """Return for each level the places of selected positions in it, strictly increasing."""
        row, column = np.divmod(positions, self.columns.size)
        kind = self._kind[row]
        level = self._levels[kind, column]
        ranks = np.empty_like(self._order)
        np.put_along_axis(ranks, self._order, np.arange(self.columns.size)[None], 1)
        place = self._starts[level, row]
        place += ranks[kind, column] - self._first[kind, level]
        first = np.cumsum(self.sizes) - self.sizes
        found = [place[:0]] * LEVELS
        for i in np.unique(level).tolist():
            found[i] = place[level == i] - first[i]
        return found

    def bits(self, positions: Indices) -> float:
        """Estimate what the positions take with this grid, its classes included."""
        pairs = zip(self.split(positions), self.sizes.tolist(), strict=True)
        total = sum(_choice_bits(own.size, size) for own, size in pairs)
        return total + sum(entropy(np.bincount(own)) for own in (self.rows, self.columns))

    def join(self, places: Sequence[Indices]) -> Indices:
        """Return the positions that `split` was given, int64, strictly increasing."""
        first = np.cumsum(self.sizes) - self.sizes
        joined = np.concatenate([own + start for own, start in zip(places, first, strict=True)])
        level, row = self._widths.nonzero()
        start, kind = self._starts[level, row], self._kind[row]
        counts = np.diff(np.searchsorted(joined, start), append=joined.size)
        length = self.columns.size
        joined += np.repeat(kind * length + self._first[kind, level] - start, counts)
        found = self._order.ravel()[joined] + np.repeat(row * length, counts)
        is_there = np.zeros(self.rows.size * length, dtype=bool)  # faster than to sort
        is_there[found] = True
        return np.flatnonzero(is_there)


def _classes(counts: NDArray[np.int64]) -> Classes:
    """Return the number of binary digits of each count's square."""
    return np.frexp(counts.astype(np.float64) ** 2)[1].astype(np.uint8)


# --- all tensors -------------------------------------------------------------------------------


def pack_positions(
    indices: Sequence[Indices], sizes: Sequence[int], columns: Sequence[int]
) -> list[Section]:
    """Pack the selected positions of each tensor, by a grid where that takes fewer bytes.

    Args:
        indices: Per tensor int64 (count,): flat C-order positions, strictly increasing.
        sizes: Per tensor its number of weights, below 2^48.
        columns: Per tensor the length of a row, 0 where it has none.

    Returns:
        Sections: tensors, classes, and those of `indices.PackedIndices`.

    Raises:
        AdapterFileError: If positions are not flat int64, repeat, decrease or leave the tensor.
    """
    grids = []
    for ordinal, (positions, size, length) in enumerate(zip(indices, sizes, columns, strict=True)):
        check_positions(ordinal, positions, size)
        grid = None
        if positions.size and _can_have_grid(size, length):
            grid = Grid.of(positions, size, length)
            grid = grid if grid.bits(positions) < _list_bits(positions, size) else None
        grids.append(grid)
    plain = _packed(indices, sizes, [None] * len(sizes))
    if not any(grids):
        return plain
    # Estimates decide for each tensor, bytes for all of them.
    return min(_packed(indices, sizes, grids), plain, key=lambda s: sum(len(p.data) for p in s))


def read_tensors(raw: NDArray[np.uint8], sizes: Sequence[int]) -> list[TensorRecord]:
    """Read the first section and check it against itself and the model.

    Args:
        raw: The bytes, uint8 (20 * tensors,).
        sizes: Per tensor its number of weights in the model.

    Raises:
        AdapterFileError: Naming the first tensor whose record is impossible.
    """
    records = [TensorRecord(*row) for row in np.frombuffer(raw, dtype=TENSOR).tolist()]
    for ordinal, (record, size) in enumerate(zip(records, sizes, strict=True)):
        check_size(ordinal, record.size, size)
        has_grid = record.columns > 0
        if record.entries > size or (has_grid and not _can_have_grid(size, record.columns)):
            raise AdapterFileError(
                f"tensor {ordinal}: {record.entries} entries in rows of {record.columns} cannot be "
                f"in {size} weights; the file is damaged. Save the adapter again."
            )
    return records


def read_grids(records: Sequence[TensorRecord], classes: Classes) -> list[Grid | None]:
    """Return the grid of each tensor that has one.

    Args:
        records: The checked tensors.
        classes: The second section, uint8: for each of these those of its rows, then columns.

    Raises:
        AdapterFileError: Naming the first tensor that cannot have so many entries.
    """
    grids: list[Grid | None] = []
    edges = pairwise(accumulate((record.num_classes for record in records), initial=0))
    for ordinal, (record, (first, last)) in enumerate(zip(records, edges, strict=True)):
        if not record.columns:
            grids.append(None)
            continue
        rows, columns = np.split(classes[first:last], [record.size // record.columns])
        for own in (rows, columns):
            counts = np.bincount(own)[1:].tolist()  # by class, of those with an entry
            least = sum(n * (isqrt((1 << digits) - 1) + 1) for digits, n in enumerate(counts))
            most = sum(n * isqrt((2 << digits) - 1) for digits, n in enumerate(counts))
            if not least <= record.entries <= most:
                raise AdapterFileError(
                    f"tensor {ordinal}: its rows or columns do not have {record.entries} entries; "
                    "the file is damaged. Save the adapter again."
                )
        grids.append(Grid(rows, columns, record.entries))
    return grids


def list_sizes(records: Sequence[TensorRecord], grids: Sequence[Grid | None]) -> list[int]:
    """Return the sizes of the lists: of tensors without a grid, then of levels with a weight."""
    own = [record.size for record, grid in zip(records, grids, strict=True) if grid is None]
    return own + [size for size in _level_sizes(grids).tolist() if size]


def _level_sizes(grids: Sequence[Grid | None]) -> NDArray[np.int64]:
    sizes = [grid.sizes for grid in grids if grid is not None]
    return np.sum(sizes, 0) if sizes else np.zeros(LEVELS, dtype=np.int64)


def unpack_positions(
    tensors: Sequence[TensorRecord],
    grids: Sequence[Grid | None],
    records: Sequence[Record],
    streams: Sequence[NDArray[np.uint8]],
) -> list[Indices]:
    """Return the positions of each tensor, int64 (entries,), strictly increasing.

    Args:
        tensors: The checked tensors.
        grids: What `read_grids` returned.
        records: The checked table of the lists.
        streams: The four streams after it, of the lengths that `stream_lengths` tells.

    Raises:
        AdapterFileError: Naming the first list or tensor that does not fit its record.
    """
    lists = iter(unpack_indices(records, streams))
    own = iter([next(lists) for grid in grids if grid is None])
    first, nothing = np.zeros(LEVELS, dtype=np.int64), np.empty(0, dtype=np.int64)
    levels = [next(lists) if size else nothing for size in _level_sizes(grids)]
    taken, found = [0] * LEVELS, []
    for ordinal, (tensor, grid) in enumerate(zip(tensors, grids, strict=True)):
        if grid is None:
            found.append(next(own))
        else:
            first += grid.sizes
            places = [nothing] * LEVELS
            for i in np.flatnonzero(grid.sizes).tolist():
                end = int(np.searchsorted(levels[i], first[i]))
                places[i] = levels[i][taken[i] : end] - (first[i] - grid.sizes[i])
                taken[i] = end
            found.append(grid.join(places))
        if found[-1].size != tensor.entries:
            raise AdapterFileError(
                f"tensor {ordinal}: {found[-1].size} positions, {tensor.entries} in its record; "
                "the file is damaged. Save the adapter again."
            )
    return found


def _can_have_grid(size: int, columns: int) -> bool:
    if columns < 2 or size % columns:
        return False
    return _LEAST * (size // columns + columns) <= size


def _packed(
    indices: Sequence[Indices], sizes: Sequence[int], grids: Sequence[Grid | None]
) -> list[Section]:
    lists: list[Indices] = []
    levels: list[list[Indices]] = [[] for _ in range(LEVELS)]
    first = np.zeros(LEVELS, dtype=np.int64)
    for positions, grid in zip(indices, grids, strict=True):
        if grid is None:
            lists.append(positions)
            continue
        for level, own, start in zip(levels, grid.split(positions), first, strict=True):
            if own.size:
                level.append(own + start)
        first += grid.sizes
    pairs = zip(levels, _level_sizes(grids), strict=True)
    lists += [np.concatenate([first[:0], *level]) for level, size in pairs if size]
    tensors = [
        TensorRecord(size, positions.size, 0 if grid is None else grid.columns.size)
        for size, positions, grid in zip(sizes, indices, grids, strict=True)
    ]
    classes = [part.tobytes() for grid in grids if grid for part in (grid.rows, grid.columns)]
    packed = pack_indices(lists, list_sizes(tensors, grids))
    table = np.array(tensors, dtype=TENSOR).tobytes()
    return [squeeze([table]), squeeze(classes), *(squeeze(parts) for parts in packed)]


def _list_bits(positions: Indices, size: int) -> float:
    """Estimate what the positions of a tensor take as a list of its own."""
    skips, lengths = runs(positions)
    bits = _choice_bits(skips.size, size - positions.size + skips.size)
    return bits + (_choice_bits(lengths.size, positions.size) if lengths.size else 0)


def _choice_bits(chosen: int, size: int) -> float:
    """Return about how many bits a choice among so many takes."""
    if not 0 < chosen < size:
        return 0.0
    share = chosen / size
    return -size * (share * log2(share) + (1 - share) * log2(1 - share))
