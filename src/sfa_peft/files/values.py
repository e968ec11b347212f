# SPDX-License-Identifier: Apache-2.0
"""Values of selected weights as byte planes: lossless modes, and two lossy ones with a bound.

Values of 16 bits are held as uint16 codes, as numpy knows no bfloat16. Planes are made so that one
of them holds the exponents alone, or so that the upper ones are nearly zero, and the entropy stage
does the rest. Only finite values are written or read.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError

Array = NDArray[Any]

BLOCK = 128  # values in a block of INT8, as written
BLOCKS = range(64, 257)  # as read


class ValueMode(IntEnum):
    """How values are stored; the numbers are those of the file.

    `FLOAT32`, `BFLOAT16`: the values' own bits, lossless. float32 values written as `BFLOAT16` are
    rounded to nearest even: relative error at most 2^-8 (absolute 2^-134 below 2^-126).

    `ULPS_BFLOAT16`, `ULPS_FLOAT16`: adapted weights as their distance from the base weights in
    units in the last place, lossless; reading needs the base weights.

    `INT8`: float32 values in blocks, each value a multiple of 1/127 of the largest in its block:
    absolute error at most 1/253 of the block's largest absolute value, plus 2^-150.
    """

    FLOAT32 = 1
    BFLOAT16 = 2
    ULPS_BFLOAT16 = 5
    ULPS_FLOAT16 = 6
    INT8 = 7

    @property
    def needs_base(self) -> bool:
        """Whether values are coded against the base weights at the same positions."""
        return self in (self.ULPS_BFLOAT16, self.ULPS_FLOAT16)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of decoded values: float32, or uint16 for the codes of 16-bit floats."""
        wide = self in (self.FLOAT32, self.INT8)
        return np.dtype(np.float32 if wide else np.uint16)

    @property
    def num_planes(self) -> int:
        """Number of byte planes that values are split into."""
        return 5 if self is self.INT8 else self.dtype.itemsize


def encode_values(
    mode: ValueMode, values: Array, base: Array | None, counts: Sequence[int]
) -> list[list[bytes]]:
    """Split values into byte planes.

    Args:
        mode: How to store them.
        values: (n,) of `mode.dtype`, all tensors in turn; for `BFLOAT16` float32 is rounded.
        base: (n,) of `mode.dtype`: the base weights, for modes that need them.
        counts: Values of each tensor; blocks of `INT8` end with the tensor.

    Returns:
        `mode.num_planes` byte strings, each cut where the values' frequencies may change.

    Raises:
        AdapterFileError: If a value is NaN or infinite, or the type is not the mode's.
    """
    if mode is ValueMode.BFLOAT16 and values.dtype == np.float32:
        check_finite(values, ValueMode.FLOAT32)
        values = round_to_bfloat16(values)
    if values.dtype != mode.dtype or (base is not None and base.dtype != mode.dtype):
        raise AdapterFileError(
            f"values of {values.dtype}, base weights of {None if base is None else base.dtype}: "
            f"cannot be stored as {mode.name}, which takes {mode.dtype}."
        )
    check_finite(values, mode)
    if mode is ValueMode.INT8:
        quotients, largest = _quantise(values, _block_lengths(counts, BLOCK))
        return [[quotients.tobytes()], *_split(_rotate_left(_bits(largest)))]
    if mode.needs_base:
        base_bits = _bits(cast(Array, base))
        order, ends = _by_exponent(base_bits, mode)
        return _split(_ulps(base_bits, _bits(values))[order], ends)
    return _split(_rotate_left(_bits(values)))


def plane_lengths(mode: ValueMode, counts: Sequence[int], block: int) -> list[int]:
    """Return the number of bytes in each plane."""
    n = sum(counts)
    if mode is ValueMode.INT8:
        return [n] + 4 * [sum(-(-count // block) for count in counts)]
    return mode.num_planes * [n]


def decode_values(
    mode: ValueMode,
    planes: Sequence[NDArray[np.uint8]],
    base: Array | None,
    counts: Sequence[int],
    block: int,
) -> Array:
    """Join byte planes into values, (n,) of `mode.dtype`.

    Args:
        mode: As when they were split.
        planes: Of the lengths that `plane_lengths` tells.
        base: (n,) of `mode.dtype`, for modes that need it.
        counts: Values of each tensor.
        block: Values in one block of `INT8`.

    Raises:
        AdapterFileError: If a value is NaN, infinite or not one that is ever written.
    """
    if mode is ValueMode.INT8:
        largest = _rotate_right(_join(planes[1:])).view(np.float32)
        check_finite(largest, ValueMode.FLOAT32)
        values = _dequantise(planes[0].view(np.int8), largest, _block_lengths(counts, block))
    elif mode.needs_base:
        base_bits = _bits(cast(Array, base))
        distances = np.empty_like(base_bits)
        distances[_by_exponent(base_bits, mode)[0]] = _join(planes)
        values = _add_ulps(base_bits, distances).view(mode.dtype)
    else:
        values = _rotate_right(_join(planes)).view(mode.dtype)
    check_finite(values, mode)
    return values


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 values to the nearest bfloat16, ties to even; returns the codes.

    What would round to infinity becomes the largest finite bfloat16, so that the relative error
    stays within 2^-8.
    """
    bits = _bits(values)
    codes = (
        bits + (0x7FFF + (bits >> 16 & 1))
    ) >> 16  # cannot wrap: finite values end at 0xFF7F...
    codes -= (codes & 0x7FFF) == 0x7F80
    return codes.astype(np.uint16)


def check_finite(values: Array, mode: ValueMode) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        AdapterFileError: With the number of such values and the first one's position.
    """
    exponent = _exponent_mask(mode)
    bad = (_bits(values) & exponent) == exponent
    if bad.any():
        raise AdapterFileError(
            f"{int(np.count_nonzero(bad))} of {values.size} values are NaN or infinite, the first "
            f"at {int(bad.argmax())}; only finite values are stored. Did training diverge, or is "
            "the file damaged?"
        )


def _exponent_mask(mode: ValueMode) -> Any:
    if mode is ValueMode.ULPS_FLOAT16:
        return np.uint16(0x7C00)
    return np.uint16(0x7F80) if mode.dtype == np.uint16 else np.uint32(0x7F800000)


def _bits(values: Array) -> Array:
    """Return values as unsigned integers of their width, without a copy where they are flat."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _split(codes: Array, ends: Sequence[int] = ()) -> list[list[bytes]]:
    """Return byte planes of unsigned integers, lowest byte first, each cut at some places."""
    width = codes.dtype.itemsize
    octets = codes.astype(f"<u{width}", copy=False).view(np.uint8).reshape(-1, width)
    return [[part.tobytes() for part in np.split(octets[:, i], ends)] for i in range(width)]


def _join(planes: Sequence[NDArray[np.uint8]]) -> Array:
    width = len(planes)
    octets = np.empty((planes[0].size, width), dtype=np.uint8)
    for i, plane in enumerate(planes):
        octets[:, i] = plane
    return octets.reshape(-1).view(f"<u{width}").astype(f"u{width}", copy=False)


def _rotate_left(codes: Array) -> Array:
    """Move the sign to the lowest bit, so that the exponent fills the highest byte."""
    return codes << 1 | codes >> _sign_shift(codes)


def _rotate_right(codes: Array) -> Array:
    return codes >> 1 | codes << _sign_shift(codes)


def _sign_shift(codes: Array) -> int:
    return 8 * codes.dtype.itemsize - 1


def _sign_bit(codes: Array) -> Any:
    return codes.dtype.type(1 << _sign_shift(codes))


def _ordered(bits: Array) -> Array:
    """Return integers that order like the floats: -0 and +0 are neighbours."""
    return bits ^ (_all_if(bits >> _sign_shift(bits)) | _sign_bit(bits))


def _ulps(base: Array, adapted: Array) -> Array:
    """Return steps from base to adapted, modulo 2^width, zigzag: 0, -1, 1, -2 as 0, 1, 2, 3."""
    steps = _ordered(adapted) - _ordered(base)
    return steps << 1 ^ _all_if(steps >> _sign_shift(steps))


def _add_ulps(base: Array, zigzag: Array) -> Array:
    ordered = _ordered(base) + (zigzag >> 1 ^ _all_if(zigzag & 1))
    return ordered ^ ((ordered >> _sign_shift(ordered)) - _one(ordered) | _sign_bit(ordered))


def _all_if(bit: Array) -> Array:
    """Return all bits where a number is 1, none where it is 0 (which is faster than a choice)."""
    return ~bit + _one(bit)


def _one(codes: Array) -> Any:
    return codes.dtype.type(1)


def _by_exponent(base: Array, mode: ValueMode) -> tuple[NDArray[np.intp], list[int]]:
    """Return the order in which distances are stored, and where another exponent begins in it.

    By the base weight's exponent, stable. A change of a given size is more units the smaller the
    base weight is; kept together, distances of one scale share a Huffman table.
    """
    shift = 10 if mode is ValueMode.ULPS_FLOAT16 else 7
    exponents = ((base & _exponent_mask(mode)) >> shift).astype(np.uint8)
    ends = np.cumsum(np.bincount(exponents, minlength=1))[:-1]
    return np.argsort(exponents, kind="stable"), ends.tolist()


def _block_lengths(counts: Sequence[int], block: int) -> NDArray[np.int64]:
    """Return the number of values in each block: full ones and what is left, tensor by tensor."""
    per_tensor = np.array([-(-count // block) for count in counts], dtype=np.int64)
    lengths = np.full(int(per_tensor.sum()), block, dtype=np.int64)
    filled = per_tensor > 0
    left = np.array(counts, dtype=np.int64)[filled] - block * (per_tensor[filled] - 1)
    lengths[np.cumsum(per_tensor)[filled] - 1] = left
    return lengths


def _quantise(
    values: NDArray[np.float32], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    starts = np.cumsum(lengths) - lengths
    absolute = np.abs(values)
    largest = np.maximum.reduceat(absolute, starts) if starts.size else absolute
    divisors = np.where(largest > 0, largest, 1).astype(np.float64)
    quotients = np.rint(values.astype(np.float64) * 127.0 / np.repeat(divisors, lengths))
    return quotients.astype(np.int8), largest


def _dequantise(
    quotients: NDArray[np.int8], largest: NDArray[np.float32], lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    if (quotients == -128).any() or np.signbit(largest).any():
        raise AdapterFileError(
            "a quotient of -128 or a negative largest value, which are never written; the file is "
            "damaged. Save the adapter again."
        )
    # Exact product, one rounding to float64 and one to float32: the same on every machine.
    return (quotients * np.repeat(largest.astype(np.float64), lengths) / 127.0).astype(np.float32)
