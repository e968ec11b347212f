# SPDX-License-Identifier: Apache-2.0
"""Blobs that must stay readable, and what tests of blobs share."""

import struct
import zlib

import numpy as np
import torch

from sfa_peft.files.adapter_config import SavedTensor
from sfa_peft.files.container import SelectedEntries, decode_entries, read_blob
from sfa_peft.files.packing import with_manifest
from sfa_peft.files.values import ValueMode
from tests import slow_reader


def entries(size, indices, values, base=None, dtype=np.float32):
    base = None if base is None else np.array(base, dtype)
    return SelectedEntries(size, np.array(indices, np.int64), np.array(values, dtype), base)


# Written by version 1. Never change them: every later version has to read these bytes.
GOLDEN = {
    ValueMode.FLOAT32: (
        bytes.fromhex(
            "53464144454c54410100000001090000020000000000000007000000000000001901000000000000"
            "15000000000000005400000000000000010000000500000000000000050000000000000000000000"
            "01000000000000000100000000000000000000000200000000000000020000000000000000000000"
            "00000000000000000000000000000000000000000700000000000000070000000000000000000000"
            "07000000000000000700000000000000000000000700000000000000070000000000000000000000"
            "0700000000000000070000000000000000000000e361800066341a134430416816289f09873a4606"
            "0001030532940202000001de0001000000002400000004000006000080007e7d757f008000234d77"
            "1f"
        ),
        [
            entries(12, [1, 5, 11], [0.5, -0.25, 1e-3]),
            entries(600, [100, 101, 102, 400], [1.0, -0.0, 3.0, 2.0**-140]),
        ],
    ),
    ValueMode.ULPS_BFLOAT16: (
        bytes.fromhex(
            "53464144454c5441010001000507000003000000bd9f23ce0500000000000000df00000000000000"
            "13000000000000007e00000000000000010000000500000000000000050000000000000000000000"
            "05000000000000001900000000000000010000000000000000000000000000000000000000000000"
            "00000000000000000000000000000000000000000500000000000000050000000000000000000000"
            "0500000000000000050000000000000000000000e361800066349a52c004c50c48343a9064000001"
            "0305807f6360c20100010602040100000000fed4f68a73"
        ),
        [
            entries(12, [1, 5, 11], [0x3F81, 0x8000, 0x4000], [0x3F80, 0, 0x3FFE], np.uint16),
            entries(0, [], [], [], np.uint16),
            entries(2**33, [2**32, 2**33 - 1], [0xBF80, 0x0001], [0x3F80, 0x8001], np.uint16),
        ],
    ),
    ValueMode.INT8: (
        bytes.fromhex(
            "53464144454c544101000000070a4000010000000000000046000000000000005001000000000000"
            "0c000000000000002a00000000000000010000000100000000000000010000000000000000000000"
            "00000000000000000000000000000000000000000100000000000000010000000000000000000000"
            "00000000000000000000000000000000000000004600000000000000460000000000000000000000"
            "02000000000000000200000000000000000000000200000000000000020000000000000000000000"
            "02000000000000000200000000000000000000000200000000000000020000000000000000000000"
            "4b6180003728cdc8800b000000458185888c9093979b9ea2a6a9adb1b5b8bcc0c3c7cbced2d6d9dd"
            "e1e4e8eceff3f7fafe0206090d1114181c1f23272a2e3235393d4044484b4f53575a5e6265696d70"
            "74787b7f0000000000007f7f61c5baaa"
        ),
        None,  # 70 values from -1 to 1, rounded
    ),
}
BLOB, TENSORS = GOLDEN[ValueMode.FLOAT32]
SIZES = [12, 600]
LISTED = (
    SavedTensor("a.weight", (3, 4), "float32", {"float32": "00ff"}),
    SavedTensor("b.bias", (600,)),
)
PACKED = with_manifest(torch.frombuffer(bytearray(BLOB), dtype=torch.uint8), LISTED)


def decode(blob, tensors):
    sizes = [tensor.size for tensor in tensors]
    bases = [tensor.base for tensor in tensors]
    return decode_entries(read_blob(blob), sizes, base_entries=lambda ordinal, _: bases[ordinal])


def assert_same(found, expected):
    assert len(found) == len(expected)
    for got, tensor in zip(found, expected, strict=True):
        assert got.size == tensor.size
        np.testing.assert_array_equal(got.indices, tensor.indices)
        assert got.values.dtype == tensor.values.dtype
        assert got.values.tobytes() == tensor.values.tobytes()


def assert_slow_reader_agrees(blob, found):
    mode = read_blob(blob).mode
    base = [_unsigned(t.base) for t in found] if mode.needs_base else None
    number, tensors = slow_reader.read(bytes(blob), base)
    assert number == mode
    assert tensors == [(t.size, t.indices.tolist(), _unsigned(t.values)) for t in found]


def _unsigned(values):
    return values.view(f"u{values.dtype.itemsize}").tolist()


def sealed(blob):
    """Return a blob with its length and checksum made right again."""
    body = bytearray(blob[:-4])
    body[32:40] = struct.pack("<Q", len(blob))
    return bytes(body) + struct.pack("<I", zlib.crc32(body))
