# SPDX-License-Identifier: Apache-2.0
"""Between a selection in torch tensors and what a file holds of it under `sfa_packed`.

That is a blob (see `container`) and, behind it, its manifest: names and digests of its tensors. A
blob has no names. A loader that does not read `adapter_config.json` again (loading under a name
that exists, resuming, a state dict handed over) would put changes into other tensors of equal size,
or onto another base, without noticing.

"exact" keeps every bit of the adapted weights. A float32 base gets the change with as few digits as
lead to the same adapted weight; a 16-bit base gets the distance in units in the last place, which
needs the same base to read. What is lost of a float32 master of a 16-bit weight is what lies below
the weight's own resolution; checkpoints of the training state keep it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterFileError
from ..sparse.delta import Delta, adapt, change_to
from .adapter_config import LARGEST_JSON, SavedTensor, parse_json
from .container import (
    Blob,
    SelectedEntries,
    declared_length,
    decode_entries,
    decode_indices,
    encode_entries,
    read_blob,
)
from .values import ValueMode

#: `SFAConfig.saved_values`.
SAVED_VALUES = ("exact", "bfloat16", "int8")

_ULPS = {torch.bfloat16: ValueMode.ULPS_BFLOAT16, torch.float16: ValueMode.ULPS_FLOAT16}
_DTYPE_OF = {mode: dtype for dtype, mode in _ULPS.items()}

#: Bytes of the checksum between a blob and its manifest.
_CRC = 4


@dataclass(frozen=True)
class Entries:
    """Selected entries of one tensor.

    Attributes:
        size: Number of weights in the tensor.
        indices: Flat positions, int64, strictly increasing.
        change: Change of each, in the type it is trained in (float32 by default).
        base: Pretrained weight of each, in the base's type.
        columns: Number of weights in a row of the tensor, 0 where it has none.
    """

    size: int
    indices: Tensor
    change: Tensor
    base: Tensor
    columns: int = 0


def pack(tensors: Sequence[Entries], saved_values: str = "exact") -> Tensor:
    """Return the entries of all tensors as one blob, uint8 (nbytes,).

    Args:
        tensors: One per tensor that positions count.
        saved_values: One of `SAVED_VALUES`.

    Raises:
        AdapterFileError: If a value is NaN or infinite.
    """
    if saved_values == "exact" and any(t.change.dtype != torch.float32 for t in tensors):
        # Values trained in 16 bits are short as they are, and must fit into 16 bits again.
        blob = _pack_changes([t.change for t in tensors], tensors, ValueMode.FLOAT32)
    elif saved_values == "exact":
        blob = _pack_ulps(tensors)
        if blob is None:
            blob = _pack_changes([_shortened(t) for t in tensors], tensors, ValueMode.FLOAT32)
    else:
        mode = ValueMode.BFLOAT16 if saved_values == "bfloat16" else ValueMode.INT8
        blob = _pack_changes([t.change for t in tensors], tensors, mode)
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def with_manifest(packed: Tensor, tensors: Sequence[SavedTensor]) -> Tensor:
    """Return a packed selection followed by its manifest: CRC-32 (4 bytes), then JSON (zlib)."""
    text = json.dumps([t.to_dict() for t in tensors], separators=(",", ":"))
    body = zlib.compress(text.encode(), 9)
    data = _numpy(packed).tobytes() + zlib.crc32(body).to_bytes(_CRC, "little") + body
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _pack_changes(changes: Sequence[Tensor], tensors: Sequence[Entries], mode: ValueMode) -> bytes:
    return encode_entries(
        [
            SelectedEntries(t.size, _numpy(t.indices), _numpy(change.float()), columns=t.columns)
            for t, change in zip(tensors, changes, strict=True)
        ],
        mode,
    )


def _pack_ulps(tensors: Sequence[Entries]) -> bytes | None:
    """Return the blob against a 16-bit base; None where there is none or it would lose bits."""
    types = {t.base.dtype for t in tensors if t.indices.numel()}
    if len(types) != 1 or not types <= set(_ULPS):
        return None
    dtype = types.pop()
    adapted = [adapt(t.base, t.change) for t in tensors]
    for entries, weight in zip(tensors, adapted, strict=True):
        if not torch.equal(adapt(entries.base, change_to(entries.base, weight)), weight):
            return None
    return encode_entries(
        [
            SelectedEntries(
                t.size,
                _numpy(t.indices),
                _codes(weight, dtype),
                _codes(t.base, dtype),
                t.columns,
            )
            for t, weight in zip(tensors, adapted, strict=True)
        ],
        _ULPS[dtype],
    )


def _shortened(entries: Entries) -> Tensor:
    """Return changes that lead to the same adapted weights, most with fewer digits."""
    if entries.base.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return entries.change
    weight = adapt(entries.base, entries.change)
    short = weight.float() - entries.base.float()
    same = adapt(entries.base, short) == weight
    return torch.where(same, short, entries.change.float())


@dataclass(frozen=True)
class PackedSelection:
    """A packed selection after one pass over its bytes: both checksums hold.

    Attributes:
        blob: Its blob, taken apart.
        manifest: The tensors that its positions count; None where no manifest follows the blob.
        where: Names it in messages.
    """

    blob: Blob
    manifest: tuple[SavedTensor, ...] | None
    where: str

    def unpack(self, sizes: Sequence[int], base_at: Callable[[int, Tensor], Tensor]) -> list[Delta]:
        """Return the change of each tensor, on CPU.

        Args:
            sizes: Number of weights of each tensor in the model.
            base_at: Returns the pretrained weights of a tensor (by ordinal) at positions.

        Raises:
            AdapterFileError: If the selection contradicts itself or the sizes, or was written
                against other weights.
        """
        mode = self.blob.mode
        dtype = _DTYPE_OF.get(mode, torch.float32)

        def base_codes(ordinal: int, indices: np.ndarray) -> np.ndarray:
            return _codes(base_at(ordinal, torch.from_numpy(indices)), dtype)

        found = decode_entries(self.blob, sizes, base_entries=base_codes, where=self.where)
        return [Delta(torch.from_numpy(e.indices), _change(e, mode, dtype)) for e in found]

    def positions(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return the flat positions in each tensor, int64, for which no base is needed.

        Args:
            sizes: Number of weights of each tensor in the model.

        Raises:
            AdapterFileError: If the selection contradicts itself or the sizes.
        """
        found = decode_indices(self.blob, sizes, where=self.where)
        return [torch.from_numpy(indices) for indices in found]


def read_packed(packed: Tensor, where: str) -> PackedSelection:
    """Take a packed selection apart; what is decoded of it later is whole.

    Args:
        packed: uint8 (nbytes,), as `pack` or `with_manifest` returned it; not to be changed as
            long as the result is used.
        where: Names it in messages, for example the file and its key in it.

    Raises:
        AdapterFileError: If it is damaged or of another version.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise AdapterFileError(
            f"{where}: expected flat bytes, got {packed.dtype} {list(packed.shape)}. Save the "
            "adapter again."
        )
    data = _numpy(packed).data
    length = declared_length(data)
    manifest = _read_manifest(data[length:], where) if length < len(data) else None
    return PackedSelection(read_blob(data[:length], where=where), manifest, where)


def _read_manifest(data: memoryview, where: str) -> tuple[SavedTensor, ...]:
    damaged = AdapterFileError(
        f"{where}: the list of tensors behind the selection is damaged. Copy or save the adapter "
        "again."
    )
    body = data[_CRC:]
    if zlib.crc32(body) != int.from_bytes(data[:_CRC], "little"):
        raise damaged
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(body, LARGEST_JSON)
        if not reader.eof or reader.unused_data:
            raise damaged
        return tuple(SavedTensor.from_dict(t) for t in parse_json(text))
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged from error


def _change(entries: SelectedEntries, mode: ValueMode, dtype: torch.dtype) -> Tensor:
    if mode is ValueMode.BFLOAT16:
        return _floats(entries.values, torch.bfloat16).float()
    if not mode.needs_base or entries.base is None:
        return torch.from_numpy(np.ascontiguousarray(entries.values)).float()
    return change_to(_floats(entries.base, dtype), _floats(entries.values, dtype))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _codes(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return 16-bit floats as uint16 codes, float32 as it is."""
    tensor = tensor.detach().cpu().to(dtype).contiguous()
    if dtype == torch.float32:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


def _floats(codes: np.ndarray, dtype: torch.dtype) -> Tensor:
    codes = np.ascontiguousarray(codes)
    if codes.dtype != np.uint16:
        return torch.from_numpy(codes)
    return torch.from_numpy(codes.view(np.int16)).view(dtype)
