# SPDX-License-Identifier: Apache-2.0
"""The tensors' file of an adapter folder, read in one pass; and the library's one atomic write.

`adapter_model.safetensors` holds external adapters and head under their module paths, and on the
first adapted layer the selection, packed into one tensor of bytes, `sfa_packed` (see `packing`).

Safetensors has no checksum of its own. The header's metadata takes one: `sfa_crc32`, the CRC-32
(that of zlib) over all tensors in the order of their names, each as its name, type and shape in
UTF-8 and then its bytes, as eight hexadecimal digits.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterFileError
from .adapter_config import type_name
from .packing import PackedSelection, read_packed

WEIGHTS_NAME = "adapter_model.safetensors"
#: Under this key the metadata of a safetensors file holds the checksum of its tensors.
CHECKSUM = "sfa_crc32"

_METADATA = '"__metadata__":'
#: Ends the names of files that are not finished.
_PARTIAL = ".sfa-partial"
_DAY = 24 * 60 * 60  # seconds


@dataclass(frozen=True)
class StoredAdapter:
    """What one pass over an adapter's tensors' file found; all checksums hold.

    Attributes:
        path: The file.
        metadata: Of its header.
        tensors: By key, on CPU.
        selection: Its packed selection, taken apart; None where it holds none.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    selection: PackedSelection | None


#: What was read in the present block of `reading_once`; None outside of one.
_READ: ContextVar[dict[Path, StoredAdapter] | None] = ContextVar("sfa_read", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Read each file once within the block, however often it is asked for.

    PEFT asks for a config and for tensors apart from each other; damage must be found with the
    first, before a model is touched.
    """
    if _READ.get() is not None:
        yield
        return
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def already_read(path: str | Path) -> StoredAdapter | None:
    """Return what the present block of `reading_once` read of a file; None if it did not yet."""
    return (_READ.get() or {}).get(Path(path).resolve())


def selection_of(packed: Tensor, where: str) -> PackedSelection:
    """Take a packed selection apart, unless the present block of `reading_once` has read it.

    Raises:
        AdapterFileError: As in `read_packed`.
    """
    for stored in (_READ.get() or {}).values():
        if stored.selection is not None and any(t is packed for t in stored.tensors.values()):
            return stored.selection
    return read_packed(packed, where)


def read_adapter(path: str | Path) -> StoredAdapter:
    """Read a tensors' file: opened once, its checksum verified once, its selection parsed once.

    Raises:
        AdapterFileError: If the header is damaged, the file is shorter or longer than it says, or
            its tensors are not those that were written.
    """
    path, known = Path(path).resolve(), _READ.get()
    if known is None:
        return _read(path)
    if path not in known:
        known[path] = _read(path)
    return known[path]


def _read(path: Path) -> StoredAdapter:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as error:
        size = f"; {path.stat().st_size} bytes" if path.is_file() else ""
        raise AdapterFileError(
            f"{path}: cut short or damaged ({error}{size}). Copy or save the adapter again."
        ) from error
    check_contents(path, metadata, tensors)
    packed = [key for key in tensors if key.endswith("sfa_packed")]
    if len(packed) > 1:
        raise AdapterFileError(
            f"{path}: {len(packed)} selections ({', '.join(sorted(packed))}), an adapter has one. "
            "Save the adapter again."
        )
    selection = read_packed(tensors[packed[0]], f"{path}: {packed[0]}") if packed else None
    return StoredAdapter(path, metadata, tensors, selection)


def check_complete(folder: str | Path) -> None:
    """Check that the tensors' file of a local adapter folder is whole.

    Args:
        folder: The adapter folder; nothing is checked where it has no safetensors file.

    Raises:
        AdapterFileError: As in `read_adapter`.
    """
    path = Path(folder) / WEIGHTS_NAME
    if path.is_file():
        read_adapter(path)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of tensors by key, as in the file."""
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name} {type_name(tensor.dtype)} {list(tensor.shape)}\n"
        found = zlib.crc32(head.encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def check_contents(
    where: str | Path, metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]
) -> None:
    """Check the tensors of a file against its checksum; files of other writers have none.

    Raises:
        AdapterFileError: If they are not those that were written.
    """
    wanted = (metadata or {}).get(CHECKSUM)
    if wanted is None:
        return
    found = checksum(tensors)
    if found != wanted:
        raise AdapterFileError(
            f"{where}: its tensors have the checksum {found}, but {wanted} was written: it was "
            "damaged or edited. Copy or save the adapter again."
        )


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with a checksum, atomically.

    Args:
        tensors: By key, contiguous, none sharing memory with another.
        path: The file.
        metadata: Of the header; the checksum is added.
    """
    metadata = {**metadata, CHECKSUM: checksum(tensors)}
    with replacing(path) as partial:
        save_file(dict(tensors), partial, metadata)
        _order_metadata(partial)


def _order_metadata(path: Path) -> None:
    """Put the header's metadata in the order of its keys: safetensors writes it in any order.

    So that the same adapter is the same file, byte for byte.
    """
    with path.open("rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
        start = header.index(_METADATA) + len(_METADATA)
        metadata, end = json.JSONDecoder().raw_decode(header, start)
        ordered = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        if len(ordered) == end - start:
            file.seek(8)
            file.write((header[:start] + ordered + header[end:]).encode())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; what lies there at the end takes the place of `path`.

    Whoever reads `path` sees the old file or the new one, also after a crash. An error inside, or
    a process that is killed, leaves the old one. What killed processes left in the folder is swept.

    Args:
        path: The file; its folder must exist.
    """
    path = Path(path)
    _sweep(path.parent)
    mark = f"{platform.node()}.{os.getpid()}"
    partial = path.with_name(f".{path.name}.{mark}{_PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Delete unfinished files that no process writes any more."""
    for partial in folder.glob(f".*{_PARTIAL}"):
        with suppress(OSError):  # another process was faster
            if _is_abandoned(partial):
                partial.unlink()


def _is_abandoned(partial: Path) -> bool:
    """Whether the process that made an unfinished file has ended; after a day it is taken so."""
    start, _, pid = partial.name.removesuffix(_PARTIAL).rpartition(".")
    if time() - partial.stat().st_mtime > _DAY:
        return True
    if os.name != "posix" or not pid.isdecimal() or not start.endswith(f".{platform.node()}"):
        return False
    try:
        os.kill(int(pid), 0)  # asks only
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's
        return False
    return False


def check_selection(name: str, slots: Tensor, values: Tensor, num_weights: int) -> None:
    """Check the two tensors of a selection that is not packed, as in a state dict in memory.

    Args:
        name: Where they were found, for the message.
        slots: Positions, int32 or int64, -1 only at the end.
        values: Values of the change, one per position.
        num_weights: Number of eligible weights in the model.

    Raises:
        AdapterFileError: If lengths, type, range, order or values are wrong.
    """
    if (
        slots.dtype not in (torch.int32, torch.int64)
        or slots.ndim != 1
        or values.shape != slots.shape
    ):
        raise AdapterFileError(
            f"{name}: expected two flat tensors of one length, positions integers; got "
            f"{slots.dtype} {list(slots.shape)} and {values.dtype} {list(values.shape)}."
        )
    assigned = int((slots >= 0).sum())
    used = slots[:assigned]
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= num_weights):
        raise AdapterFileError(
            f"{name}: position {int(slots.max())} (lowest {int(slots.min())}) but the model has "
            f"{num_weights} eligible weights; adapter of another model?"
        )
    if bool((used < 0).any()) or used.unique().numel() != assigned:
        raise AdapterFileError(f"{name}: positions repeat or have gaps; the file is damaged.")
    if not bool(torch.isfinite(values).all()):
        raise AdapterFileError(f"{name}: values are NaN or infinite; the file is damaged.")
