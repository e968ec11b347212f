# SPDX-License-Identifier: Apache-2.0
"""The entropy stage: a byte string as stored or as raw deflate, whichever is smaller.

What is read is bounded: no more bytes are made than were declared, and no more are declared than
the stored bytes can hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError

STORED = 0
DEFLATE = 1  # RFC 1951, no zlib or gzip wrapper
CODECS = {STORED: "stored", DEFLATE: "deflate"}
MAX_RATIO = 1032  # deflate's shortest code for 258 bytes is two bits

#: About what a Huffman code takes in a file: on the whole, and for each symbol.
_CODE_BITS, _LENGTH_BITS = 240, 4.5
_SMALL = 1 << 16  # bytes up to which a search for matches costs nothing worth saving


class Section(NamedTuple):
    """A byte string as it stands in a file."""

    codec: int  # one of CODECS
    nbytes: int  # length once expanded
    data: bytes | memoryview  # as stored


def squeeze(parts: Sequence[bytes]) -> Section:
    """Return the smallest form of a byte string.

    Args:
        parts: It, cut where its symbols may begin to come with other frequencies: there, or every
            32,768 symbols, a Huffman code ends. Runs and small strings are searched for matches
            too.

    Returns:
        The section; the same bytes in give the same bytes out with one version of zlib.
    """
    raw = b"".join(parts)
    best = Section(STORED, len(raw), raw)
    strategies = _strategies(np.frombuffer(raw, dtype=np.uint8))
    pieces = _pieces(parts) if strategies else []
    for strategy in strategies:
        packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        ends = [zlib.Z_BLOCK] * (len(pieces) - 1) + [zlib.Z_FINISH]
        done = [packer.compress(p) + packer.flush(e) for p, e in zip(pieces, ends, strict=True)]
        data = b"".join(done)
        if len(data) < len(best.data):
            best = Section(DEFLATE, len(raw), data)
    return best


def entropy(counts: NDArray[np.int64]) -> float:
    """Return the bits that symbols take which come so often, in all."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def check_section(section: Section, expected: int, what: str) -> None:
    """Check a section's codec and lengths before anything is expanded.

    Args:
        section: As found in the file.
        expected: Length in bytes that it must have once expanded.
        what: The section's name, for the message.

    Raises:
        AdapterFileError: If the codec is unknown, the length is not the expected one, or more than
            the stored bytes can hold.
    """
    codec, nbytes, stored = section.codec, section.nbytes, len(section.data)
    if codec not in CODECS:
        raise AdapterFileError(
            f"{what}: codec {codec} is not known; this version reads "
            f"{', '.join(f'{i} ({name})' for i, name in CODECS.items())}. Upgrade sfa-peft."
        )
    if nbytes != expected:
        raise AdapterFileError(
            f"{what}: expected {expected} bytes from the counts, the file declares {nbytes}; "
            "it is damaged. Save the adapter again."
        )
    if nbytes > stored * MAX_RATIO or (codec == STORED and nbytes != stored):
        raise AdapterFileError(
            f"{what}: {nbytes} bytes cannot come out of {stored} ({CODECS[codec]}); the file is "
            "damaged. Save the adapter again."
        )


def expand(section: Section, what: str) -> NDArray[np.uint8]:
    """Return the bytes of a checked section, uint8 (nbytes,).

    Raises:
        AdapterFileError: If the stored bytes are not one whole deflate stream of that length.
    """
    if section.codec == STORED:
        return np.frombuffer(section.data, dtype=np.uint8)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = unpacker.decompress(section.data, section.nbytes) if section.nbytes else b""
        # The end mark may still be unread; one more byte here would be one too many.
        excess = unpacker.decompress(unpacker.unconsumed_tail, 1) if not unpacker.eof else b""
    except zlib.error as error:
        raise AdapterFileError(
            f"{what}: the stored bytes do not expand ({error}); the file is damaged. Save the "
            "adapter again."
        ) from error
    if len(raw) != section.nbytes or excess or not unpacker.eof or unpacker.unused_data:
        raise AdapterFileError(
            f"{what}: expected a stream of {section.nbytes} bytes, got "
            f"{'more' if excess or unpacker.unused_data else len(raw)}; the file is damaged. Save "
            "the adapter again."
        )
    return np.frombuffer(raw, dtype=np.uint8)


def _strategies(raw: NDArray[np.uint8]) -> list[int]:
    """Return the zlib strategies worth trying, none where bytes are as good as random."""
    if raw.size <= _SMALL:
        return [zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY] if raw.size else []
    repeats = np.count_nonzero(raw[1:] == raw[:-1])
    if repeats > raw.size // 4:
        return [zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY]
    return [zlib.Z_HUFFMAN_ONLY] if _entropy(raw) < 7.98 else []


def _entropy(raw: NDArray[np.uint8]) -> float:
    """Return bits per byte, taken over parts, as each block of a stream has its own table."""
    parts = (raw[first : first + _SMALL] for first in range(0, raw.size, _SMALL))
    return sum(entropy(np.bincount(part)) for part in parts) / raw.size


def _pieces(parts: Sequence[bytes]) -> list[bytes]:
    """Join neighbours that are smaller with one Huffman code than with one each."""
    found: list[list[bytes]] = []
    counts = np.zeros(256, dtype=np.int64)
    for part in parts:
        own = np.bincount(np.frombuffer(part, dtype=np.uint8), minlength=256)
        if found and _with_code(counts + own) <= _with_code(counts) + _with_code(own):
            found[-1].append(part)
            counts += own
        elif part:
            found.append([part])
            counts = own
    return [b"".join(group) for group in found]


def _with_code(counts: NDArray[np.int64]) -> float:
    """Estimate the bits of symbols that come so often, with the code itself."""
    return entropy(counts) + _CODE_BITS + _LENGTH_BITS * np.count_nonzero(counts)
