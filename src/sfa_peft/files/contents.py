# SPDX-License-Identifier: Apache-2.0
"""A checksum over an adapter's tensors, written with them and compared when they are read.

Safetensors has no checksum of its own. The header's metadata takes one: `sfa_crc32`, the CRC-32
(that of zlib) over all tensors in the order of their names, each as its name, type and shape in
UTF-8 and then its bytes, as eight hexadecimal digits.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterFileError

#: Under this key the metadata of a safetensors file holds the checksum of its tensors.
CHECKSUM = "sfa_crc32"

_METADATA = '"__metadata__":'


def checksum(names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """Return the CRC-32 of tensors, as in the file.

    Args:
        names: Their keys, in any order.
        tensor_of: Returns the tensor of a key; only one at a time is kept.
    """
    found = 0
    for name in sorted(names):
        tensor = tensor_of(name).detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        found = zlib.crc32(f"{name} {kind} {list(tensor.shape)}\n".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]
) -> None:
    """Write a safetensors file with a checksum; whoever reads sees the old file or the new one.

    Args:
        tensors: By key, contiguous, none sharing memory with another.
        path: The file; it is replaced when the new one lies whole beside it.
        metadata: Of the header; the checksum is added.
    """
    path = Path(path)
    metadata = {**metadata, CHECKSUM: checksum(tensors, tensors.__getitem__)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        partial = Path(folder) / path.name
        save_file(dict(tensors), partial, metadata)
        _order_metadata(partial)
        partial.replace(path)


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
        os.fsync(file.fileno())  # a rename may reach the disk before the bytes do


def check_contents(
    where: str | Path,
    metadata: Mapping[str, str] | None,
    names: Iterable[str],
    tensor_of: Callable[[str], Tensor],
) -> None:
    """Check the tensors of a file against its checksum; files of other writers have none.

    Raises:
        AdapterFileError: If they are not those that were written.
    """
    wanted = (metadata or {}).get(CHECKSUM)
    if wanted is None:
        return
    found = checksum(names, tensor_of)
    if found != wanted:
        raise AdapterFileError(
            f"{where}: its tensors have the checksum {found}, but {wanted} was written: it was "
            "damaged or edited. Copy or save the adapter again."
        )
