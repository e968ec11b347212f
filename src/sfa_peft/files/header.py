# SPDX-License-Identifier: Apache-2.0
"""Header, section heads and checksum of a blob of selected entries.

A blob is taken apart only if its length and checksum are those it declares.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import AdapterFileError
from .entropy import Section
from .values import ValueMode

MAGIC = b"SFADELTA"
VERSION = 1
BLOCKS = range(64, 257)  # allowed values per INT8 block

# Magic, version, flags, mode, sections, block, tensors, CRC-32 of the base entries, entries, bytes.
_HEADER = struct.Struct("<8sHHBBHIIQQ")
_SECTION = struct.Struct("<QQI")  # stored bytes, expanded bytes, codec
_CHECKSUM = struct.Struct("<I")
_WEIGHTS = 1  # flag: values are adapted weights, not changes
INDEX_SECTIONS = ("table", "skips", "low bits of skips", "lengths", "low bits of lengths")


@dataclass(frozen=True)
class BlobInfo:
    """What a blob says of itself.

    Attributes:
        mode: How values are stored.
        are_weights: Whether values are adapted weights; otherwise they are changes.
        num_tensors: Number of weight tensors, those without a selected entry included.
        num_entries: Number of selected entries of all tensors.
        block: Values per block of `ValueMode.INT8`, otherwise 0.
        section_nbytes: Stored bytes: table, four streams of positions, the planes of values.
    """

    mode: ValueMode
    are_weights: bool
    num_tensors: int
    num_entries: int
    block: int
    section_nbytes: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """A blob taken apart."""

    info: BlobInfo
    base_crc: int
    sections: list[Section]


def assemble(parts: Parts) -> bytes:
    """Return header, section heads, sections and checksum as one byte string."""
    info, sections = parts.info, parts.sections
    total = _HEADER.size + len(sections) * _SECTION.size + _CHECKSUM.size
    total += sum(len(section.data) for section in sections)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        _WEIGHTS if info.are_weights else 0,
        info.mode,
        len(sections),
        info.block,
        info.num_tensors,
        parts.base_crc,
        info.num_entries,
        total,
    )
    heads = [_SECTION.pack(len(s.data), s.nbytes, s.codec) for s in sections]
    body = b"".join([header, *heads, *(s.data for s in sections)])
    return body + _CHECKSUM.pack(zlib.crc32(body))


def parse(blob: memoryview) -> Parts:
    """Read header and section heads; what they point at is whole once this returns.

    Raises:
        AdapterFileError: If it is not a blob, of another version, cut short or damaged.
    """
    if len(blob) < _HEADER.size or bytes(blob[:8]) != MAGIC:
        raise AdapterFileError(
            f"expected a selection of {_HEADER.size} bytes or more that starts with {MAGIC!r}, got "
            f"{len(blob)} bytes that start with {bytes(blob[:8])!r}. Is this an SFA adapter?"
        )
    fields = _HEADER.unpack(blob[: _HEADER.size])
    version, flags, mode_number, num_sections, block = fields[1:6]
    num_tensors, base_crc, num_entries, nbytes = fields[6:]
    if version != VERSION:
        raise AdapterFileError(
            f"format version {version} is not known; this version of sfa-peft reads {VERSION}. "
            "Upgrade sfa-peft, or save the adapter again if the file is damaged."
        )
    if nbytes != len(blob):
        raise AdapterFileError(
            f"expected {nbytes} bytes, got {len(blob)}; cut short or damaged. Copy or save the "
            "adapter again."
        )
    first = _HEADER.size + num_sections * _SECTION.size
    if first + _CHECKSUM.size > nbytes or _CHECKSUM.unpack(blob[-4:])[0] != zlib.crc32(blob[:-4]):
        raise AdapterFileError("the checksum does not match; damaged. Copy or save it again.")
    mode = _checked_mode(mode_number, flags, block, num_sections)
    heads = [
        _SECTION.unpack_from(blob, offset) for offset in range(_HEADER.size, first, _SECTION.size)
    ]
    stored = [head[0] for head in heads]
    if sum(stored) != nbytes - first - _CHECKSUM.size:
        raise AdapterFileError(
            f"sections of {sum(stored)} bytes in all, room for {nbytes - first - _CHECKSUM.size}; "
            "damaged. Save the adapter again."
        )
    edges = pairwise(accumulate(stored, initial=first))
    sections = [
        Section(codec, expanded, blob[a:b])
        for (_, expanded, codec), (a, b) in zip(heads, edges, strict=True)
    ]
    info = BlobInfo(mode, bool(flags), num_tensors, num_entries, block, tuple(stored))
    return Parts(info, base_crc, sections)


def _checked_mode(number: int, flags: int, block: int, num_sections: int) -> ValueMode:
    try:
        mode = ValueMode(number)
    except ValueError as error:
        raise AdapterFileError(
            f"value mode {number} is not known; this version reads 1 to {max(ValueMode)}. Upgrade "
            "sfa-peft."
        ) from error
    is_block = block in BLOCKS if mode is ValueMode.INT8 else block == 0
    known_flags = flags == _WEIGHTS or (flags == 0 and not mode.needs_base)
    if not is_block or not known_flags or num_sections != len(INDEX_SECTIONS) + mode.num_planes:
        raise AdapterFileError(
            f"flags {flags}, block {block} and {num_sections} sections do not go with mode "
            f"{mode.name}; damaged, or written by a later version."
        )
    return mode
