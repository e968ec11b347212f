# SPDX-License-Identifier: Apache-2.0
"""One adapter's selected entries as one blob of bytes; docs/file-format.md specifies it.

The reader trusts nothing: what a blob declares is checked against its length, its checksum, itself
and the model's sizes before memory is taken for it. A blob that does not hold is one
`AdapterFileError`, never another exception and never other values than were written.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError
from .entropy import Section, check_section, expand, squeeze
from .grids import (
    TENSOR,
    list_sizes,
    pack_positions,
    read_grids,
    read_tensors,
    unpack_positions,
)
from .indices import RECORD, Record, read_table, stream_lengths, unpack_indices
from .values import BLOCK, BLOCKS, ValueMode, decode_values, encode_values, plane_lengths

MAGIC = b"SFADELTA"
VERSION = 2

# Magic, version, flags, mode, sections, block, tensors, CRC-32 of the base entries, entries, bytes.
_HEADER = struct.Struct("<8sHHBBHIIQQ")
_SECTION = struct.Struct("<QQI")  # stored bytes, expanded bytes, codec
_CHECKSUM = struct.Struct("<I")
_LENGTH = slice(32, 40)  # of the whole blob, in its header
_WEIGHTS = 1  # flag: values are adapted weights, not changes; of the modes that need the base
_LIST_SECTIONS = ("table", "skips", "low bits of skips", "lengths", "low bits of lengths")
#: Names of the sections that hold positions, by version.
_INDEX_SECTIONS = {1: _LIST_SECTIONS, VERSION: ("tensors", "classes", *_LIST_SECTIONS)}

BaseEntries = Callable[[int, NDArray[np.int64]], NDArray[Any]]


@dataclass(frozen=True)
class SelectedEntries:
    """The selected entries of one weight tensor.

    Attributes:
        size: Number of weights in the tensor.
        indices: Flat C-order positions, int64 (count,), strictly increasing.
        values: One per position: float32, or uint16 codes of bfloat16 or float16.
        base: Base weights at the positions in the type of `values`, where the mode needs them.
        columns: Number of weights in a row, 0 where it has none: what is selected in rows and
            columns takes fewer bytes.
    """

    size: int
    indices: NDArray[np.int64]
    values: NDArray[Any]
    base: NDArray[Any] | None = None
    columns: int = 0


@dataclass(frozen=True)
class Blob:
    """A blob taken apart: whole, but its sections are not expanded yet.

    Attributes:
        mode: How values are stored.
        num_tensors: Number of weight tensors, those without a selected entry included.
        num_entries: Number of selected entries of all tensors.
        block: Values per block of `ValueMode.INT8`, otherwise 0.
        base_crc: Checksum of the base weights at the positions, 0 where the mode needs none.
        sections: Those of positions, then the planes of values.
        version: Of the format.
    """

    mode: ValueMode
    num_tensors: int
    num_entries: int
    block: int
    base_crc: int
    sections: Sequence[Section]
    version: int = VERSION

    @property
    def section_nbytes(self) -> tuple[int, ...]:
        """Stored bytes of each section."""
        return tuple(len(section.data) for section in self.sections)

    @property
    def index_nbytes(self) -> int:
        """Stored bytes of all that says where entries are."""
        return sum(self.section_nbytes[: len(_INDEX_SECTIONS[self.version])])


def encode_entries(tensors: Sequence[SelectedEntries], mode: ValueMode) -> bytes:
    """Encode the selected entries of all tensors as one blob.

    Args:
        tensors: One item per weight tensor, in an order that the reader knows.
        mode: How to store values; see `ValueMode` for what each takes and loses.

    Returns:
        The blob; the same bytes each time with one version of zlib.

    Raises:
        AdapterFileError: If positions, values or base weights are not what the mode takes, or a
            value is NaN or infinite.
    """
    _check_lengths(tensors, mode)
    counts = [t.indices.size for t in tensors]
    values = _joined([t.values for t in tensors], mode)
    bases = [t.base for t in tensors if t.base is not None]
    base = _joined(bases, mode) if mode.needs_base else None
    positions = pack_positions(
        [t.indices for t in tensors], [t.size for t in tensors], [t.columns for t in tensors]
    )
    planes = encode_values(mode, values, base, counts)
    sections = [*positions, *(squeeze(parts) for parts in planes)]
    block = BLOCK if mode is ValueMode.INT8 else 0
    return assemble(Blob(mode, len(tensors), sum(counts), block, _crc(base), sections))


def assemble(blob: Blob) -> bytes:
    """Return header, section heads, sections and checksum as one byte string."""
    sections = blob.sections
    total = _HEADER.size + len(sections) * _SECTION.size + _CHECKSUM.size
    header = _HEADER.pack(
        MAGIC,
        blob.version,
        _flags(blob.mode),
        blob.mode,
        len(sections),
        blob.block,
        blob.num_tensors,
        blob.base_crc,
        blob.num_entries,
        total + sum(blob.section_nbytes),
    )
    heads = [_SECTION.pack(len(s.data), s.nbytes, s.codec) for s in sections]
    body = b"".join([header, *heads, *(s.data for s in sections)])
    return body + _CHECKSUM.pack(zlib.crc32(body))


def declared_length(data: bytes | memoryview) -> int:
    """Return how long the blob at the start of some bytes says that it is; all of it if too short.

    Args:
        data: A blob, and what may follow it. Nothing is checked.
    """
    return int.from_bytes(data[_LENGTH], "little") if len(data) > _LENGTH.stop else len(data)


def read_blob(data: bytes | bytearray | memoryview, *, where: str = "selection") -> Blob:
    """Take a blob apart; what its sections hold is whole once this returns.

    Raises:
        AdapterFileError: If it is not a blob, of another version, cut short or damaged.
    """
    try:
        return _read_blob(memoryview(data).cast("B"))
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from error.__cause__


def decode_entries(
    blob: Blob,
    sizes: Sequence[int],
    *,
    base_entries: BaseEntries | None = None,
    where: str = "selection",
) -> list[SelectedEntries]:
    """Decode a blob after checking all that it declares.

    Args:
        blob: As `read_blob` returned it.
        sizes: Number of weights of each tensor in the model, in the order of encoding.
        base_entries: Called as `base_entries(ordinal, indices)` for each tensor when values are
            stored against the base (`ValueMode.needs_base`); returns the base weights there in
            `mode.dtype`, uint16 codes for 16-bit floats.
        where: Names the blob in messages, for example the file and the tensor in it.

    Returns:
        One item per tensor. Memory taken is about 8 bytes for an index, the width of a value, and
        once more the expanded bytes, never more than the model's sizes allow.

    Raises:
        AdapterFileError: If the blob is damaged, of another model, or was written against other
            base weights.
    """
    try:
        return _decode(blob, sizes, base_entries)
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from error.__cause__


def decode_indices(
    blob: Blob, sizes: Sequence[int], *, where: str = "selection"
) -> list[NDArray[np.int64]]:
    """Decode the positions alone, for which no base is needed; as `decode_entries` does.

    Raises:
        AdapterFileError: If the blob is damaged or of another model.
    """
    try:
        return _expand(blob, sizes).indices
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from error.__cause__


def _check_lengths(tensors: Sequence[SelectedEntries], mode: ValueMode) -> None:
    for ordinal, tensor in enumerate(tensors):
        lengths = [tensor.indices.shape, tensor.values.shape]
        if mode.needs_base:
            lengths.append((-1,) if tensor.base is None else tensor.base.shape)
        if len(set(lengths)) > 1 or tensor.indices.ndim != 1:
            raise AdapterFileError(
                f"tensor {ordinal}: expected flat positions, values"
                f"{' and base weights' if mode.needs_base else ''} of one length, got shapes "
                f"{', '.join('none' if s == (-1,) else str(list(s)) for s in lengths)}."
            )


def _joined(arrays: Sequence[NDArray[Any]], mode: ValueMode) -> NDArray[Any]:
    kinds = {array.dtype for array in arrays if array.size}
    if len(kinds) > 1:
        raise AdapterFileError(
            f"values or base weights of several types ({', '.join(sorted(map(str, kinds)))}); one "
            "blob holds one type. Encode them apart."
        )
    return np.concatenate([a for a in arrays if a.size]) if kinds else np.empty(0, mode.dtype)


def _crc(base: NDArray[Any] | None) -> int:
    if base is None:
        return 0
    return zlib.crc32(base.astype(base.dtype.newbyteorder("<"), copy=False).tobytes())


def _flags(mode: ValueMode) -> int:
    return _WEIGHTS if mode.needs_base else 0


def _read_blob(data: memoryview) -> Blob:
    if len(data) < _HEADER.size or bytes(data[:8]) != MAGIC:
        raise AdapterFileError(
            f"expected a selection of {_HEADER.size} bytes or more that starts with {MAGIC!r}, got "
            f"{len(data)} bytes that start with {bytes(data[:8])!r}. Is this an SFA adapter?"
        )
    fields = _HEADER.unpack(data[: _HEADER.size])
    version, flags, mode_number, num_sections, block = fields[1:6]
    num_tensors, base_crc, num_entries, nbytes = fields[6:]
    if version not in _INDEX_SECTIONS:
        known = ", ".join(map(str, _INDEX_SECTIONS))
        raise AdapterFileError(
            f"format version {version} is not known; this version of sfa-peft reads {known}. "
            "Upgrade sfa-peft, or save the adapter again if the file is damaged."
        )
    if nbytes != len(data):
        raise AdapterFileError(
            f"expected {nbytes} bytes, got {len(data)}; cut short or damaged. Copy or save the "
            "adapter again."
        )
    first = _HEADER.size + num_sections * _SECTION.size
    if first + _CHECKSUM.size > nbytes or _CHECKSUM.unpack(data[-4:])[0] != zlib.crc32(data[:-4]):
        raise AdapterFileError("the checksum does not match; damaged. Copy or save it again.")
    num_planes = num_sections - len(_INDEX_SECTIONS[version])
    mode = _checked_mode(mode_number, flags, block, num_planes)
    sections = _cut(data, first)
    return Blob(mode, num_tensors, num_entries, block, base_crc, sections, version)


def _checked_mode(number: int, flags: int, block: int, num_planes: int) -> ValueMode:
    try:
        mode = ValueMode(number)
    except ValueError as error:
        raise AdapterFileError(
            f"value mode {number} is not known; this version reads "
            f"{', '.join(str(int(known)) for known in ValueMode)}. Upgrade sfa-peft."
        ) from error
    is_block = block in BLOCKS if mode is ValueMode.INT8 else block == 0
    if not is_block or flags != _flags(mode) or num_planes != mode.num_planes:
        raise AdapterFileError(
            f"flags {flags}, block {block} and {num_planes} planes do not go with mode {mode.name};"
            " damaged, or written by a later version."
        )
    return mode


def _cut(data: memoryview, first: int) -> list[Section]:
    """Return the sections of a blob of which the first starts at `first`."""
    heads = [_SECTION.unpack_from(data, at) for at in range(_HEADER.size, first, _SECTION.size)]
    stored = [head[0] for head in heads]
    room = len(data) - first - _CHECKSUM.size
    if sum(stored) != room:
        raise AdapterFileError(
            f"sections of {sum(stored)} bytes in all, room for {room}; damaged. Save the adapter "
            "again."
        )
    edges = pairwise(accumulate(stored, initial=first))
    return [
        Section(codec, expanded, data[a:b])
        for (_, expanded, codec), (a, b) in zip(heads, edges, strict=True)
    ]


class _Expanded(NamedTuple):
    """What a blob holds, all checked."""

    counts: list[int]  # entries of each tensor
    columns: list[int]  # of each tensor
    planes: list[NDArray[np.uint8]]  # of values
    indices: list[NDArray[np.int64]]  # positions in each tensor


def _expand(blob: Blob, sizes: Sequence[int]) -> _Expanded:
    mode = blob.mode
    if blob.num_tensors != len(sizes):
        raise AdapterFileError(
            f"written for {blob.num_tensors} tensors, the model has {len(sizes)}. Load the adapter "
            "onto the model it was trained on."
        )
    layout = _read_layout(blob, sizes)
    counts, num_heads = layout.counts, layout.num_heads
    if sum(counts) != blob.num_entries or sum(r.entries for r in layout.records) != sum(counts):
        raise AdapterFileError(
            f"{blob.num_entries} entries in the header, {sum(counts)} of the tensors, "
            f"{sum(r.entries for r in layout.records)} in the table; damaged. Save the adapter "
            "again."
        )
    lengths = [*stream_lengths(layout.records), *plane_lengths(mode, counts, blob.block)]
    names = [*_LIST_SECTIONS[1:], *(f"plane {i}" for i in range(mode.num_planes))]
    rest = blob.sections[num_heads:]
    # All sections are checked before the first is expanded.
    for section, expected, name in zip(rest, lengths, names, strict=True):
        check_section(section, expected, name)
    raw = [expand(s, name) for s, name in zip(rest, names, strict=True)]
    return _Expanded(counts, layout.columns, raw[4:], layout.positions(raw[:4]))


def _decode(
    blob: Blob, sizes: Sequence[int], base_entries: BaseEntries | None
) -> list[SelectedEntries]:
    mode = blob.mode
    counts, columns, planes, indices = _expand(blob, sizes)
    bases = _read_bases(blob, indices, base_entries) if mode.needs_base else None
    base = None if bases is None else _joined(bases, mode)
    values = decode_values(mode, planes, base, counts, blob.block)
    edges = pairwise(accumulate(counts, initial=0))
    return [
        SelectedEntries(
            sizes[i],
            indices[i],
            values[a:b],
            None if bases is None else bases[i],
            columns[i],
        )
        for i, (a, b) in enumerate(edges)
    ]


class _Layout(NamedTuple):
    """What the first sections say of all others."""

    num_heads: int  # those sections
    counts: list[int]  # entries of each tensor
    columns: list[int]  # of each tensor
    records: list[Record]  # of the lists
    positions: Callable[[Sequence[NDArray[np.uint8]]], list[NDArray[np.int64]]]  # of the streams


def _read_layout(blob: Blob, sizes: Sequence[int]) -> _Layout:
    if blob.version == 1:  # each tensor is a list
        records = _read_table(blob.sections[0], sizes)
        counts = [record.entries for record in records]
        return _Layout(1, counts, [0] * len(sizes), records, partial(unpack_indices, records))
    heads = blob.sections
    check_section(heads[0], TENSOR.itemsize * len(sizes), "tensors")
    tensors = read_tensors(expand(heads[0], "tensors"), sizes)
    check_section(heads[1], sum(tensor.num_classes for tensor in tensors), "classes")
    grids = read_grids(tensors, expand(heads[1], "classes"))
    records = _read_table(heads[2], list_sizes(tensors, grids))
    return _Layout(
        3,
        [tensor.entries for tensor in tensors],
        [tensor.columns for tensor in tensors],
        records,
        partial(unpack_positions, tensors, grids, records),
    )


def _read_table(section: Section, sizes: Sequence[int]) -> list[Record]:
    check_section(section, RECORD.itemsize * len(sizes), "table")
    return read_table(expand(section, "table"), sizes)


def _read_bases(
    blob: Blob, indices: Sequence[NDArray[np.int64]], base_entries: BaseEntries | None
) -> list[NDArray[Any]]:
    mode = blob.mode
    if base_entries is None:
        raise AdapterFileError(
            f"values are stored against the base weights ({mode.name}); pass `base_entries`."
        )
    bases = [base_entries(ordinal, positions) for ordinal, positions in enumerate(indices)]
    for ordinal, (base, positions) in enumerate(zip(bases, indices, strict=True)):
        if base.dtype != mode.dtype or base.shape != positions.shape:
            raise AdapterFileError(
                f"tensor {ordinal}: expected {positions.size} base weights as {mode.dtype}, got "
                f"{base.dtype} {list(base.shape)}. Cast the base to the type it was trained in."
            )
    if _crc(_joined(bases, mode)) != blob.base_crc:
        raise AdapterFileError(
            "the base weights at the selected positions are not those it was written against. Load "
            "the adapter onto the model it was trained on, in the same type."
        )
    return bases
