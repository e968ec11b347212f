# SPDX-License-Identifier: Apache-2.0
import time
import tracemalloc
import zlib

import pytest
import torch

from sfa_peft import AdapterFileError
from sfa_peft.files.container import read_blob
from sfa_peft.files.packing import read_packed
from tests.files.golden import BLOB, LISTED, PACKED

ALONE = PACKED[: len(BLOB)]


def test_names_and_digests_travel_with_a_blob():
    found = read_packed(PACKED, "x")
    assert (found.blob, found.manifest) == (read_blob(BLOB), LISTED)
    alone = read_packed(ALONE, "x")
    assert (alone.blob, alone.manifest) == (read_blob(BLOB), None)


def test_every_damaged_byte_of_a_manifest_is_refused():
    for place in range(len(BLOB), PACKED.numel()):
        damaged = PACKED.clone()
        damaged[place] ^= 1
        with pytest.raises(AdapterFileError, match="x: the list of tensors"):
            read_packed(damaged, "x")
    for end in range(len(BLOB) + 1, PACKED.numel()):
        with pytest.raises(AdapterFileError, match="x: the list of tensors"):
            read_packed(PACKED[:end], "x")


@pytest.mark.parametrize("text", [b"[" + b"{}," * 10**7 + b"{}]", b"[" * 10**6, b"9" * 10**5])
def test_a_forged_manifest_takes_bounded_time_and_memory(text):
    body = zlib.compress(text)
    data = BLOB + zlib.crc32(body).to_bytes(4, "little") + body
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(AdapterFileError, match="x: the list of tensors"):
        read_packed(torch.frombuffer(bytearray(data), dtype=torch.uint8), "x")
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("packed", [PACKED.int(), PACKED.view(1, -1), torch.zeros(9)])
def test_what_is_not_flat_bytes_is_refused(packed):
    with pytest.raises(AdapterFileError, match="x: expected flat bytes, got"):
        read_packed(packed, "x")


@pytest.mark.parametrize("length", range(45))
def test_a_selection_of_a_few_bytes_is_refused(length):
    with pytest.raises(AdapterFileError, match="x: "):
        read_packed(ALONE[:length], "x")
