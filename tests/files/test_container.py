# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.container import SelectedEntries, decode_entries, encode_entries, read_info
from sfa_peft.files.values import ValueMode
from tests.files.golden import (
    BLOB,
    GOLDEN,
    SIZES,
    assert_same,
    assert_slow_reader_agrees,
    decode,
    entries,
)

EXACT = [mode for mode in ValueMode if mode is not ValueMode.INT8]
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "file-format.md"


@st.composite
def adapters(draw, mode):
    """Draw the entries of a few tensors, with finite values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors = []
    for _ in range(draw(st.integers(0, 4))):
        size = draw(st.integers(0, 900))
        chosen = rng.random(size) < draw(st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]))
        indices = np.flatnonzero(chosen)
        values, base = (rng.normal(size=indices.size).astype(np.float32) for _ in range(2))
        if mode.dtype == np.uint16:  # as bfloat16 or float16: all of these are finite in both
            values, base = ((v.view(np.uint32) >> 18).astype(np.uint16) for v in (values, base))
        tensors.append(SelectedEntries(size, indices, values, base))
    return tensors


@pytest.mark.parametrize("mode", EXACT)
@given(data=st.data())
def test_what_is_encoded_comes_back_and_a_second_reader_agrees(mode, data):
    tensors = data.draw(adapters(mode))

    blob = encode_entries(tensors, mode)
    found = decode(blob, tensors)

    assert_same(found, tensors)
    assert_slow_reader_agrees(blob, found)
    assert blob == encode_entries(tensors, mode)


@given(adapters(ValueMode.INT8), st.integers(64, 256))
def test_int8_decodes_to_the_same_floats_in_a_second_reader(tensors, block):
    blob = encode_entries(tensors, ValueMode.INT8, block=block)

    assert_slow_reader_agrees(blob, decode(blob, tensors))


@pytest.mark.parametrize("mode", GOLDEN)
def test_golden_blobs_stay_readable(mode):
    blob, tensors = GOLDEN[mode]
    if tensors is None:
        (found,) = decode_entries(blob, [100])
        np.testing.assert_array_equal(found.indices, np.arange(70))
        np.testing.assert_allclose(found.values, np.linspace(-1, 1, 70), atol=1 / 253)
    else:
        found = decode(blob, tensors)
        assert_same(found, tensors)
        assert_slow_reader_agrees(blob, found)
        assert_same(decode(encode_entries(tensors, mode), tensors), tensors)


def test_the_worked_example_of_the_format_page_is_the_golden_blob():
    lines = re.findall(r"^[0-9a-f]{3}  ((?:[0-9a-f]{2} ?)+)$", FORMAT_PAGE.read_text(), re.M)

    assert bytes.fromhex("".join(lines)) == BLOB


def test_info_tells_what_is_inside_without_decoding():
    info = read_info(BLOB)

    assert (info.mode, info.are_weights, info.block) == (ValueMode.FLOAT32, False, 0)
    assert (info.num_tensors, info.num_entries) == (2, 7)
    assert info.section_nbytes == (21, 5, 1, 2, 0, 7, 7, 7, 7)
    assert read_info(encode_entries([], ValueMode.FLOAT32, are_weights=True)).are_weights


def test_bytes_per_entry_reach_the_targets():
    """2.5 and 10 % of 2 M weights, base of deviation 0.02, change 5e-4 (Laplace)."""
    rng = np.random.default_rng(0)
    for density, bf16, fp32 in ((0.025, 1.7, 3.9), (0.1, 1.4, 3.9)):
        indices = np.flatnonzero(rng.random(2_000_000) < density)
        base = rng.normal(0, 0.02, indices.size).astype(np.float32)
        adapted = base + rng.laplace(0, 5e-4, indices.size).astype(np.float32)
        short = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (adapted, base)]
        wide = [SelectedEntries(2_000_000, indices, adapted, base)]
        small = [SelectedEntries(2_000_000, indices, *short)]
        assert len(encode_entries(small, ValueMode.ULPS_BFLOAT16)) <= bf16 * indices.size
        assert len(encode_entries(wide, ValueMode.ULPS_FLOAT32)) <= fp32 * indices.size


@pytest.mark.parametrize(
    ("tensors", "mode", "message"),
    [
        ([entries(9, [1, 2], [1.0])], "FLOAT32", r"tensor 0: .*of one length, got shapes \[2\]"),
        ([entries(9, [1], [1.0])], "ULPS_FLOAT32", "tensor 0: .*base weights .* none"),
        ([entries(9, [1], [1.0], [1.0, 2.0])], "ULPS_FLOAT32", r"shapes \[1\], \[1\], \[2\]"),
        ([entries(9, [1], [np.nan])], "FLOAT32", "NaN"),
        ([entries(9, [9], [1.0])], "FLOAT32", "tensor 0: positions 9 to 9 but it has 9"),
        ([entries(9, [1], [1], dtype=np.uint16)], "FLOAT32", "values of uint16"),
        (
            [entries(9, [1], [1.0]), entries(9, [1], [1], dtype=np.uint16)],
            "BFLOAT16",
            "several types .float32, uint16.",
        ),
    ],
)
def test_entries_that_do_not_fit_the_mode_are_refused(tensors, mode, message):
    with pytest.raises(AdapterFileError, match=message):
        encode_entries(tensors, ValueMode[mode])


@pytest.mark.parametrize("block", [0, 63, 257])
def test_other_block_lengths_are_refused(block):
    with pytest.raises(AdapterFileError, match=f"block {block}: INT8 takes 64 to 256"):
        encode_entries([], ValueMode.INT8, block=block)


def test_a_blob_may_lie_in_any_buffer():
    expected = decode_entries(BLOB, SIZES)

    for buffer in (bytearray(BLOB), memoryview(BLOB), np.frombuffer(BLOB, np.uint8).data):
        assert_same(decode_entries(buffer, SIZES), expected)
