# SPDX-License-Identifier: Apache-2.0
"""Selected positions of weight tensors as few bytes, within 0.1 bit per position of the entropy.

A tensor's positions are runs of neighbours. Each run is two numbers, the unselected weights
skipped before it and its length less one; where most runs are of one position, each position is a
run and lengths are left out. The last `shift` bits of a number stand apart as they are, the rest as
bytes: 255 means "add 255 and go on", so that Huffman codes come close to the entropy of any
density. Whatever is read ends as strictly increasing positions inside the tensor, or as an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError

Indices = NDArray[np.int64]
Streams = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # symbols and low bits of a list

RECORD = np.dtype(
    [
        ("size", "<u8"),
        ("entries", "<u8"),
        ("runs", "<u8"),
        ("skip_escapes", "<u8"),
        ("length_escapes", "<u8"),
        ("skip_shift", "u1"),
        ("length_shift", "u1"),
    ]
)

MAX_SIZE = 1 << 48  # weights in one tensor; keeps every sum below inside int64
ESCAPE = 255  # as a symbol: add it and go on


class ListSizes(NamedTuple):
    """How long a packed list is."""

    numbers: int
    escapes: int  # bytes of 255
    shift: int  # bits of each number that stand apart

    @property
    def num_symbols(self) -> int:
        """Bytes of symbols."""
        return self.numbers + self.escapes

    @property
    def num_low_bytes(self) -> int:
        """Bytes of low bits: one bit plane after the other, each in whole bytes."""
        return self.shift * ((self.numbers + 7) // 8)

    def can_sum_to(self, total: int) -> bool:
        """Whether the numbers may sum to `total` or less, so that no sum passes int64."""
        if self.numbers == 0:
            return self.escapes == 0 and self.shift == 0
        least = max(self.numbers, ESCAPE * self.escapes)
        return self.shift < 64 and least << self.shift <= total


class NumberList(NamedTuple):
    """A packed list."""

    symbols: bytes
    low_bits: bytes
    escapes: int
    shift: int


class Record(NamedTuple):
    """What the table says of one tensor; the fields of RECORD as Python integers."""

    size: int  # weights of the tensor
    entries: int  # selected ones
    runs: int  # equal to entries where lengths are left out
    skip_escapes: int  # bytes of value 255 among the symbols of the skips
    length_escapes: int
    skip_shift: int  # bits of each skip that stand apart
    length_shift: int

    @property
    def skips(self) -> ListSizes:
        """The list of skips."""
        return ListSizes(self.runs, self.skip_escapes, self.skip_shift)

    @property
    def lengths(self) -> ListSizes:
        """The list of lengths, empty where every run is one position."""
        numbers = self.runs if self.runs < self.entries else 0
        return ListSizes(numbers, self.length_escapes, self.length_shift)


class PackedIndices(NamedTuple):
    """Positions of all tensors, ready for the entropy stage, each in parts: of one tensor each."""

    table: list[bytes]  # one RECORD per tensor
    skips: list[bytes]  # symbols; tensors with many runs per weight first
    skip_bits: list[bytes]  # bit planes in the same order
    lengths: list[bytes]
    length_bits: list[bytes]


def pack_indices(indices: Sequence[Indices], sizes: Sequence[int]) -> PackedIndices:
    """Pack the selected positions of each tensor.

    Args:
        indices: Per tensor int64 (count,): flat C-order positions, strictly increasing.
        sizes: Per tensor its number of weights, below 2^48.

    Returns:
        Table and streams.

    Raises:
        AdapterFileError: If positions are not flat int64, repeat, decrease or leave the tensor.
    """
    records: list[Record] = []
    skips: list[NumberList] = []
    lengths: list[NumberList] = []
    for ordinal, (positions, size) in enumerate(zip(indices, sizes, strict=True)):
        check_positions(ordinal, positions, size)
        tensor_skips, tensor_lengths = runs(positions)
        skips.append(_pack_numbers(tensor_skips))
        lengths.append(_pack_numbers(tensor_lengths))
        head = (size, positions.size, tensor_skips.size)
        records.append(
            Record(
                *head, skips[-1].escapes, lengths[-1].escapes, skips[-1].shift, lengths[-1].shift
            )
        )
    order = _stream_order(records)
    return PackedIndices(
        [np.array(records, dtype=RECORD).tobytes()],
        [skips[i].symbols for i in order],
        [skips[i].low_bits for i in order],
        [lengths[i].symbols for i in order],
        [lengths[i].low_bits for i in order],
    )


def check_size(ordinal: int, found: int, size: int) -> None:
    """Refuse a tensor (by ordinal) of which a file says another number of weights than a model."""
    if found != size or size >= MAX_SIZE:
        raise AdapterFileError(
            f"tensor {ordinal}: the file's has {found} weights, the model's {size}. Load "
            "the adapter onto the model it was trained on."
        )


def read_table(table: NDArray[np.uint8], sizes: Sequence[int]) -> list[Record]:
    """Read the table and check it against itself and the model.

    Args:
        table: The bytes, uint8 (42 * tensors,).
        sizes: Per tensor its number of weights in the model.

    Raises:
        AdapterFileError: Naming the first tensor whose record is impossible.
    """
    records = [Record(*row) for row in np.frombuffer(table, dtype=RECORD).tolist()]
    for ordinal, (record, size) in enumerate(zip(records, sizes, strict=True)):
        check_size(ordinal, record.size, size)
        if not _is_possible(record):
            raise AdapterFileError(
                f"tensor {ordinal}: its record contradicts itself ({_told(record)}); the file is "
                "damaged. Save the adapter again."
            )
    return records


def stream_lengths(records: Sequence[Record]) -> tuple[int, int, int, int]:
    """Return how many bytes the table asks for in each stream after it."""
    skips, lengths = [r.skips for r in records], [r.lengths for r in records]
    return (
        sum(numbers.num_symbols for numbers in skips),
        sum(numbers.num_low_bytes for numbers in skips),
        sum(numbers.num_symbols for numbers in lengths),
        sum(numbers.num_low_bytes for numbers in lengths),
    )


def unpack_indices(
    records: Sequence[Record], streams: Sequence[NDArray[np.uint8]]
) -> list[Indices]:
    """Return the positions of each tensor, int64 (entries,), strictly increasing.

    Args:
        records: The checked table.
        streams: The four streams after it, of the lengths that `stream_lengths` tells.

    Raises:
        AdapterFileError: Naming the first tensor whose streams do not fit its record.
    """
    order = _stream_order(records)
    skips = _cut([records[i].skips for i in order], streams[0], streams[1])
    lengths = _cut([records[i].lengths for i in order], streams[2], streams[3])
    found: list[Indices] = [np.empty(0, dtype=np.int64)] * len(records)
    for rank, ordinal in enumerate(order):
        found[ordinal] = _unpack_tensor(ordinal, records[ordinal], skips[rank], lengths[rank])
    return found


def _cut(
    lists: Sequence[ListSizes], symbols: NDArray[np.uint8], low_bits: NDArray[np.uint8]
) -> list[Streams]:
    """Cut the streams of all tensors into each one's."""
    symbol_edges = pairwise(accumulate((numbers.num_symbols for numbers in lists), initial=0))
    low_edges = pairwise(accumulate((numbers.num_low_bytes for numbers in lists), initial=0))
    cuts = zip(symbol_edges, low_edges, strict=True)
    return [(symbols[a:b], low_bits[c:d]) for (a, b), (c, d) in cuts]


def _unpack_tensor(ordinal: int, record: Record, skips: Streams, lengths: Streams) -> Indices:
    skipped = _sums(ordinal, record.skips, skips)
    if record.runs and int(skipped[-1]) + record.entries > record.size:
        raise AdapterFileError(
            f"tensor {ordinal}: position {int(skipped[-1]) + record.entries - 1} but it has "
            f"{record.size} weights; the file is damaged. Save the adapter again."
        )
    if record.runs < record.entries:
        ends = _sums(ordinal, record.lengths, lengths)
        ends += np.arange(1, record.runs + 1)
        if int(ends[-1]) != record.entries:
            raise AdapterFileError(
                f"tensor {ordinal}: runs of {int(ends[-1])} positions, the table says "
                f"{record.entries}; the file is damaged. Save the adapter again."
            )
        skipped = np.repeat(skipped, np.diff(ends, prepend=0))
    skipped += np.arange(record.entries)
    return skipped


def check_positions(ordinal: int, positions: Indices, size: int) -> None:
    """Raise an AdapterFileError if positions are not flat int64, or cannot be in a tensor."""
    if positions.ndim != 1 or positions.dtype != np.int64 or not 0 <= size < MAX_SIZE:
        raise AdapterFileError(
            f"tensor {ordinal}: expected flat int64 positions in a tensor of less than 2^48 "
            f"weights, got {positions.dtype} {list(positions.shape)} in {size}."
        )
    if not positions.size:
        return
    if int(positions[0]) < 0 or int(positions[-1]) >= size:
        raise AdapterFileError(
            f"tensor {ordinal}: positions {int(positions[0])} to {int(positions[-1])} but it has "
            f"{size} weights; positions of another tensor?"
        )
    if not bool((positions[1:] > positions[:-1]).all()):
        raise AdapterFileError(
            f"tensor {ordinal}: positions repeat or decrease; give them strictly increasing."
        )


def runs(positions: Indices) -> tuple[Indices, Indices]:
    """Return skips and lengths less one; no lengths where runs would not pay."""
    steps = np.diff(positions, prepend=-1) - 1  # unselected weights before each position
    first = steps > 0
    first[:1] = True
    num_runs = int(np.count_nonzero(first))
    if 2 * num_runs > positions.size:
        return steps, steps[:0]
    starts = np.flatnonzero(first)
    return steps[starts], np.diff(starts, append=positions.size) - 1


def _stream_order(records: Sequence[Record]) -> list[int]:
    """Return ordinals by runs per weight, most first, so that neighbours share a Huffman table."""
    return sorted(
        range(len(records)),
        key=lambda i: -((records[i].runs << 32) // max(records[i].size, 1)),
    )


def _is_possible(record: Record) -> bool:
    """Whether counts, escapes and shifts fit the tensor, so that no sum or stream is too large."""
    size, entries, runs = record.size, record.entries, record.runs
    return (
        runs <= entries <= size
        and (runs > 0) == (entries > 0)
        and record.skips.can_sum_to(size)
        and record.lengths.can_sum_to(entries)
    )


def _told(record: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in record._asdict().items())


def _pack_numbers(numbers: Indices) -> NumberList:
    """Pack numbers of 0 or more, int64 (n,); the shift follows from their mean."""
    if not numbers.size:
        return NumberList(b"", b"", 0, 0)
    # High parts below 128 on average: few escapes, and low bits that are as good as random.
    shift = max(0, (int(numbers.sum()) // numbers.size).bit_length() - 7)
    high = numbers >> shift
    planes = [np.packbits((numbers >> bit & 1) != 0, bitorder="little") for bit in range(shift)]
    low_bits = b"".join(plane.tobytes() for plane in planes)
    if int(high.max()) < ESCAPE:
        return NumberList(high.astype(np.uint8).tobytes(), low_bits, 0, shift)
    escapes = high // ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    symbols = np.full(int(ends[-1]) + 1, ESCAPE, dtype=np.uint8)
    symbols[ends] = high - ESCAPE * escapes
    return NumberList(symbols.tobytes(), low_bits, symbols.size - numbers.size, shift)


def _sums(ordinal: int, sizes: ListSizes, streams: Streams) -> Indices:
    """Return the running sums of packed numbers.

    Args:
        ordinal: The tensor, for the message.
        sizes: Checked with `can_sum_to` some total far inside int64.
        streams: Symbols and low bits of these sizes.
    """
    symbols, low_bits = streams
    sums = np.cumsum(symbols, dtype=np.int64)
    if sizes.escapes or (symbols.size and int(symbols.max()) == ESCAPE):
        ends = symbols != ESCAPE
        if not ends[-1] or int(np.count_nonzero(ends)) != sizes.numbers:
            raise AdapterFileError(
                f"tensor {ordinal}: its streams do not hold the {sizes.numbers} numbers of the "
                "table; the file is damaged. Save the adapter again."
            )
        sums = sums[ends]
    if sizes.shift:
        sums <<= sizes.shift
        low = np.zeros(sizes.numbers, dtype=np.int64)
        for bit, plane in enumerate(low_bits.reshape(sizes.shift, -1)):
            bits = np.unpackbits(plane, count=sizes.numbers, bitorder="little")
            low |= bits.astype(np.int64) << bit
        sums += np.cumsum(low)
    return sums
