# SPDX-License-Identifier: Apache-2.0
"""One adapter's selected entries as one blob of bytes; docs/file-format.md specifies it.

The reader trusts nothing: what a blob declares is checked against its length, its checksum, itself
and the model's sizes before memory is taken for it. A blob that does not hold is one
`AdapterFileError`, never another exception and never other values than were written.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError
from .entropy import check_section, expand, squeeze
from .header import BLOCKS, INDEX_SECTIONS, BlobInfo, Parts, assemble, parse
from .indices import RECORD, pack_indices, read_table, stream_lengths, unpack_indices
from .values import ValueMode, decode_values, encode_values, plane_lengths

BaseEntries = Callable[[int, NDArray[np.int64]], NDArray[Any]]


@dataclass(frozen=True)
class SelectedEntries:
    """The selected entries of one weight tensor.

    Attributes:
        size: Number of weights in the tensor.
        indices: Flat C-order positions, int64 (count,), strictly increasing.
        values: One per position: float32, or uint16 codes of bfloat16 or float16.
        base: Base weights at the positions in the type of `values`, where the mode needs them.
    """

    size: int
    indices: NDArray[np.int64]
    values: NDArray[Any]
    base: NDArray[Any] | None = None


def encode_entries(
    tensors: Sequence[SelectedEntries],
    mode: ValueMode,
    *,
    are_weights: bool = False,
    block: int = 128,
) -> bytes:
    """Encode the selected entries of all tensors as one blob.

    Args:
        tensors: One item per weight tensor, in an order that the reader knows.
        mode: How to store values; see `ValueMode` for what each takes and loses.
        are_weights: Whether values are adapted weights (always so in modes that need the base).
        block: Values in one block of `ValueMode.INT8`, 64 to 256; other modes have no blocks.

    Returns:
        The blob; the same bytes each time with one version of zlib.

    Raises:
        AdapterFileError: If positions, values or base weights are not what the mode takes, or a
            value is NaN or infinite.
    """
    if mode is ValueMode.INT8 and block not in BLOCKS:
        raise AdapterFileError(f"block {block}: INT8 takes 64 to 256 values in a block.")
    _check_lengths(tensors, mode)
    counts = [t.indices.size for t in tensors]
    values = _joined([t.values for t in tensors], mode)
    bases = [t.base for t in tensors if t.base is not None]
    base = _joined(bases, mode) if mode.needs_base else None
    packed = pack_indices([t.indices for t in tensors], [t.size for t in tensors])
    planes = encode_values(mode, values, base, counts, block)
    sections = [squeeze(raw) for raw in (*packed, *planes)]
    info = BlobInfo(
        mode=mode,
        are_weights=are_weights or mode.needs_base,
        num_tensors=len(tensors),
        num_entries=sum(counts),
        block=block if mode is ValueMode.INT8 else 0,
        section_nbytes=tuple(len(s.data) for s in sections),
    )
    return assemble(Parts(info, _crc(base), sections))


def read_info(blob: bytes | bytearray | memoryview, *, where: str = "selection") -> BlobInfo:
    """Check a blob's header, length and checksum, and return what it says of itself.

    Raises:
        AdapterFileError: If it is not a blob, of another version, cut short or damaged.
    """
    try:
        return parse(memoryview(blob).cast("B")).info
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from error.__cause__


def decode_entries(
    blob: bytes | bytearray | memoryview,
    sizes: Sequence[int],
    *,
    base_entries: BaseEntries | None = None,
    where: str = "selection",
) -> list[SelectedEntries]:
    """Decode a blob after checking all that it declares.

    Args:
        blob: As `encode_entries` returned it.
        sizes: Number of weights of each tensor in the model, in the order of encoding.
        base_entries: Called as `base_entries(ordinal, indices)` for each tensor when values are
            stored against the base (`ValueMode.needs_base`); returns the base weights there in
            `mode.dtype`, uint16 codes for 16-bit floats.
        where: Names the blob in messages, for example the file and the tensor in it.

    Returns:
        One item per tensor. Memory taken is about 8 bytes for an index, the width of a value, and
        once more the expanded bytes, never more than the model's sizes allow.

    Raises:
        AdapterFileError: If the blob is damaged, of another version, of another model, or was
            written against other base weights.
    """
    try:
        return _decode(parse(memoryview(blob).cast("B")), sizes, base_entries)
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


def _decode(
    parts: Parts, sizes: Sequence[int], base_entries: BaseEntries | None
) -> list[SelectedEntries]:
    info, sections = parts.info, parts.sections
    mode = info.mode
    if info.num_tensors != len(sizes):
        raise AdapterFileError(
            f"written for {info.num_tensors} tensors, the model has {len(sizes)}. Load the adapter "
            "onto the model it was trained on."
        )
    check_section(sections[0], RECORD.itemsize * len(sizes), "table")
    records = read_table(expand(sections[0], "table"), sizes)
    counts = [record.entries for record in records]
    if sum(counts) != info.num_entries:
        raise AdapterFileError(
            f"{info.num_entries} entries in the header, {sum(counts)} in the table; damaged. Save "
            "the adapter again."
        )
    lengths = [*stream_lengths(records), *plane_lengths(mode, counts, info.block)]
    names = [*INDEX_SECTIONS[1:], *(f"plane {i}" for i in range(mode.num_planes))]
    # All sections are checked before the first is expanded.
    for section, expected, name in zip(sections[1:], lengths, names, strict=True):
        check_section(section, expected, name)
    raw = [expand(s, name) for s, name in zip(sections[1:], names, strict=True)]
    indices = unpack_indices(records, raw[:4])
    bases = _read_bases(parts, indices, base_entries) if mode.needs_base else None
    base = None if bases is None else _joined(bases, mode)
    values = decode_values(mode, raw[4:], base, counts, info.block)
    edges = pairwise(accumulate(counts, initial=0))
    return [
        SelectedEntries(sizes[i], indices[i], values[a:b], None if bases is None else bases[i])
        for i, (a, b) in enumerate(edges)
    ]


def _read_bases(
    parts: Parts, indices: Sequence[NDArray[np.int64]], base_entries: BaseEntries | None
) -> list[NDArray[Any]]:
    mode = parts.info.mode
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
    if _crc(_joined(bases, mode)) != parts.base_crc:
        raise AdapterFileError(
            "the base weights at the selected positions are not those it was written against. Load "
            "the adapter onto the model it was trained on, in the same type."
        )
    return bases
