# SPDX-License-Identifier: Apache-2.0
"""Blobs that must stay readable, and what tests of blobs share."""

import struct
import zlib
from dataclasses import replace

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


_IN_GRID = [
    64 * row + column
    for row in range(128)
    for column in range(64)
    if (5 * row**2 + row) % 13 < 4
    and (7 * column**2 + 3 * column) % 11 < 3
    and (7919 * row + 104729 * column + 31 * row * column**2) % 97 < 68
]
# By version of the format. Never change them: every later version has to read these bytes.
GOLDEN = {
    (1, ValueMode.FLOAT32): (
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
    (1, ValueMode.ULPS_BFLOAT16): (
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
    (1, ValueMode.INT8): (
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
    (2, ValueMode.ULPS_BFLOAT16): (
        bytes.fromhex(
            "53464144454c5441020001000509000003000000b55120937f020000000000000202000000000000"
            "13000000000000003c00000000000000010000003300000000000000c00000000000000001000000"
            "3000000000000000fc00000000000000010000003d00000000000000dd0000000000000001000000"
            "00000000000000000000000000000000000000005a00000000000000c50000000000000001000000"
            "00000000000000000000000000000000000000000c000000000000007f0200000000000001000000"
            "09000000000000007f020000000000000100000063506000831a2608edc0801d18416966243100e3"
            "6000020e10e264002106080de3a0c80039ec101188324c3d1c5065080e8a69609a0359869d8b810b"
            "c40151dc082617d14c006360201618416966341a134840695128cd8253a51c13849ecd08a13370aa"
            "3483aad80ee547e254a98366bb282e850c0005c1010103410c04a165727553fffa1eb66eedd62e2c"
            "db00f0822a011ea402043d7401214f1cb8620480e012880408044802e027803b8404a0e1f6ff0005"
            "c1c101023110c340c9eb5c42801ffdd7ca8c88a2489014a200054660015407a800a1c400a5a8860d"
            "30904178747d6544aa3f9a7889deb37670b19181cea9a24c78e2b3024e3a64ef77392ee24becdc71"
            "166e86c2e827d7fe0163626462601845a36860100063601805a360c00000ce4735fe"
        ),
        [
            replace(
                entries(
                    8192,
                    _IN_GRID,
                    [0x3F80 + (i % 3 == 0) for i in range(len(_IN_GRID))],
                    [0x3F80] * len(_IN_GRID),
                    np.uint16,
                ),
                columns=64,
            ),
            entries(0, [], [], [], np.uint16),
            entries(50, [3, 4, 49], [1, 0x8001, 0x4001], [0, 0x8000, 0x4000], np.uint16),
        ],
    ),
}
BLOB, TENSORS = GOLDEN[1, ValueMode.FLOAT32]
#: Of the present version, with a grid.
NEW_BLOB, NEW_TENSORS = GOLDEN[2, ValueMode.ULPS_BFLOAT16]
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
