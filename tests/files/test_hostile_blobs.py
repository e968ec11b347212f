# SPDX-License-Identifier: Apache-2.0
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.container import decode_entries, read_info
from sfa_peft.files.entropy import DEFLATE, STORED, Section, squeeze
from sfa_peft.files.header import Parts, assemble
from sfa_peft.files.indices import RECORD
from sfa_peft.files.values import ValueMode
from tests.files.golden import (
    BLOB,
    GOLDEN,
    SIZES,
    assert_slow_reader_agrees,
    decode,
    entries,
    sealed,
)


def test_a_blob_cut_at_any_byte_is_one_error():
    for end in range(len(BLOB)):
        with pytest.raises(AdapterFileError, match="here: "):
            decode_entries(BLOB[:end], SIZES, where="here")
    with pytest.raises(AdapterFileError, match="expected 281 bytes, got 282"):
        decode_entries(BLOB + b"\0", SIZES)


def test_any_flipped_bit_is_one_error():
    for at in range(len(BLOB)):
        for bit in range(8):
            damaged = bytearray(BLOB)
            damaged[at] ^= 1 << bit
            with pytest.raises(AdapterFileError, match="here: "):
                decode_entries(damaged, SIZES, where="here")


@given(st.binary(max_size=400))
def test_garbage_is_one_error(garbage):
    for blob in (garbage, BLOB[:8] + garbage, sealed(BLOB[:40] + garbage + b"1234")):
        with pytest.raises(AdapterFileError):
            decode_entries(blob, SIZES)


@pytest.mark.parametrize("mode", GOLDEN)
@given(data=st.data())
def test_a_forged_blob_is_an_error_or_holds_what_a_second_reader_finds(mode, data):
    """Damage with the checksum made right: checks other than the checksum have to hold."""
    golden, tensors = GOLDEN[mode]
    blob = bytearray(golden)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, len(blob) - 5))
        blob[at] = data.draw(st.sampled_from([0, 1, 2, 127, 128, 255, blob[at] ^ 1, blob[at] ^ 16]))
    blob = sealed(blob)
    tensors = tensors or [entries(100, [], [])]
    try:
        found = decode(blob, tensors)
    except AdapterFileError:
        return

    for tensor in found:
        assert (np.diff(tensor.indices, prepend=-1, append=tensor.size) > 0).all()
    assert_slow_reader_agrees(blob, found)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"X", "starts with b'SFADELTA', got 281 bytes that start with b'XFADELTA'"),
        (8, b"\x02\x00", "format version 2 is not known; this version of sfa-peft reads 1"),
        (10, b"\x02\x00", "flags 2, block 0 and 9 sections do not go with mode FLOAT32"),
        (12, b"\x09", "value mode 9 is not known; this version reads 1 to 7"),
        (12, b"\x02", "9 sections do not go with mode BFLOAT16"),
        (13, b"\xff", "the checksum does not match"),
        (14, b"\x40", "block 64 and 9 sections do not go with mode FLOAT32"),
        (16, b"\x03", "written for 3 tensors, the model has 2"),
        (24, b"\x08", "8 entries in the header, 7 in the table"),
        (40, b"\x16", "sections of 58 bytes in all, room for 57"),
        (48, b"\x55", "table: expected 84 bytes from the counts, the file declares 85"),
        (56, b"\x02", "table: codec 2 is not known"),
    ],
)
def test_each_wrong_field_has_its_own_message(at, value, message):
    blob = sealed(BLOB[:at] + value + BLOB[at + len(value) :])

    with pytest.raises(AdapterFileError, match=re.escape(message)):
        decode_entries(blob, SIZES)


def test_another_model_is_named_as_the_cause():
    with pytest.raises(AdapterFileError, match="written for 2 tensors, the model has 1"):
        decode_entries(BLOB, [12])
    with pytest.raises(AdapterFileError, match="tensor 1: the file's has 600 weights, the model's"):
        decode_entries(BLOB, [12, 601])


def test_values_against_a_base_need_that_base():
    blob, tensors = GOLDEN[ValueMode.ULPS_BFLOAT16]
    sizes = [tensor.size for tensor in tensors]
    with pytest.raises(AdapterFileError, match=r"ULPS_BFLOAT16.; pass `base_entries`"):
        decode_entries(blob, sizes)

    other = [replace(tensor, base=tensor.base ^ 1) for tensor in tensors]
    with pytest.raises(AdapterFileError, match="not those it was written against"):
        decode(blob, other)

    wide = [replace(tensor, base=tensor.base.astype(np.float32)) for tensor in tensors]
    with pytest.raises(AdapterFileError, match="tensor 0: expected 3 base weights as uint16"):
        decode(blob, wide)


def _forged(sections, entries):
    """Return a FLOAT32 blob of one tensor with these sections and a right checksum."""
    return assemble(
        Parts(replace(read_info(BLOB), num_tensors=1, num_entries=entries), 0, sections)
    )


def _table(size, entries, runs, *rest):
    record = (size, entries, runs, *rest, *[0] * (4 - len(rest)))
    return squeeze(np.array([record], RECORD).tobytes())


@pytest.mark.parametrize("claimed", [2**20, 2**31, 2**40, 2**47])
@pytest.mark.parametrize("size", [4096, None])
@pytest.mark.parametrize("codec", [STORED, DEFLATE])
def test_huge_declared_sizes_take_no_memory(claimed, size, codec):
    """One run of `claimed` positions needs few bytes; its values do not."""
    size = size or claimed
    tiny = squeeze(bytes(100)).data
    sections = [
        _table(size, claimed, 1, 0, 0, 0, claimed.bit_length() - 1),
        *(Section(STORED, n, bytes(n)) for n in (1, 0, 1, claimed.bit_length() - 1)),
        *(Section(codec, claimed, tiny) for _ in range(4)),
    ]
    blob = _forged(sections, claimed)
    tracemalloc.start()

    with pytest.raises(AdapterFileError, match=r"contradicts itself|cannot come out of"):
        decode_entries(blob, [size])

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_sections_are_all_checked_before_one_is_expanded():
    bomb = squeeze(bytes(10_000_000))
    sections = [_table(10**7, 10**7, 10**7), bomb, *(Section(STORED, 0, b"") for _ in range(3))]
    blob = _forged([*sections, bomb, bomb, bomb, Section(STORED, 9, bytes(9))], 10**7)
    tracemalloc.start()

    with pytest.raises(AdapterFileError, match="plane 3: expected 10000000 bytes"):
        decode_entries(blob, [10**7])

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
