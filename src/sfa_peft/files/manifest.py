# SPDX-License-Identifier: Apache-2.0
"""What follows a packed selection: names and digests of its tensors, so that they travel with it.

A blob has no names. A loader that does not read `adapter_config.json` again (loading under a name
that exists, resuming, a state dict handed over) would put changes into other tensors of equal size,
or onto another base, without noticing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

from ..errors import AdapterFileError
from .record import SavedTensor, tensor_from_dict, tensor_to_dict

#: Offset of the blob's own length in its header (see `header`).
_LENGTH = slice(32, 40)
_CHECKSUM_BYTES = 4
#: More than any model's names take; a damaged manifest cannot ask for more.
_LARGEST = 1 << 26


def append_manifest(blob: bytes, tensors: Sequence[SavedTensor]) -> bytes:
    """Return a blob followed by its manifest: CRC-32 (4 bytes), then JSON through zlib."""
    text = json.dumps([tensor_to_dict(t) for t in tensors], separators=(",", ":"))
    body = zlib.compress(text.encode(), 9)
    return blob + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") + body


def split_manifest(data: bytes, where: str) -> tuple[bytes, tuple[SavedTensor, ...] | None]:
    """Return a blob and what its manifest lists; None where none follows it.

    Raises:
        AdapterFileError: If the manifest is damaged.
    """
    length = int.from_bytes(data[_LENGTH], "little")
    if len(data) <= _LENGTH.stop or length >= len(data):
        return data, None  # the blob's reader says what is wrong, if anything is
    rest = data[length:]
    body = rest[_CHECKSUM_BYTES:]
    damaged = AdapterFileError(
        f"{where}: the list of tensors behind the selection is damaged. Copy or save the adapter "
        "again."
    )
    if zlib.crc32(body) != int.from_bytes(rest[:_CHECKSUM_BYTES], "little"):
        raise damaged
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(body, _LARGEST)
        if not reader.eof or reader.unused_data:
            raise damaged
        return data[:length], tuple(tensor_from_dict(t) for t in json.loads(text))
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged from error
