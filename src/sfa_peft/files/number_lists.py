# SPDX-License-Identifier: Apache-2.0
"""Lists of non-negative numbers as bytes that Huffman codes bring close to the entropy.

The last `shift` bits of a number stand apart as they are. The rest is one byte below 255, after as
many bytes of 255 as 255 goes into it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ESCAPE = 255
Streams = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # symbols and low bits


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


def pack_numbers(numbers: NDArray[np.int64]) -> NumberList:
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


def unpack_sums(sizes: ListSizes, streams: Streams) -> NDArray[np.int64] | None:
    """Return the running sums of packed numbers, int64; None if the symbols are of other sizes.

    Args:
        sizes: Checked with `can_sum_to` some total far inside int64.
        streams: Symbols and low bits of these sizes.
    """
    symbols, low_bits = streams
    sums = np.cumsum(symbols, dtype=np.int64)
    if sizes.escapes or (symbols.size and int(symbols.max()) == ESCAPE):
        ends = symbols != ESCAPE
        if not ends[-1] or int(np.count_nonzero(ends)) != sizes.numbers:
            return None
        sums = sums[ends]
    if sizes.shift:
        sums <<= sizes.shift
        low = np.zeros(sizes.numbers, dtype=np.int64)
        for bit, plane in enumerate(low_bits.reshape(sizes.shift, -1)):
            bits = np.unpackbits(plane, count=sizes.numbers, bitorder="little")
            low |= bits.astype(np.int64) << bit
        sums += np.cumsum(low)
    return sums
