# SPDX-License-Identifier: Apache-2.0
import re
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.container import (
    SelectedEntries,
    assemble,
    decode_entries,
    encode_entries,
    read_blob,
)
from sfa_peft.files.entropy import DEFLATE, STORED, Section, expand, squeeze
from sfa_peft.files.indices import RECORD
from sfa_peft.files.values import ValueMode
from tests.files.golden import (
    BLOB,
    GOLDEN,
    NEW_BLOB,
    NEW_TENSORS,
    SIZES,
    assert_same,
    assert_slow_reader_agrees,
    decode,
    entries,
    sealed,
)

EXACT = [mode for mode in ValueMode if mode is not ValueMode.INT8]
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "file-format.md"


@st.composite
def adapters(draw, mode):
    """Draw the entries of a few tensors, with finite values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors = []
    for _ in range(draw(st.integers(0, 4))):
        columns = draw(st.sampled_from([0, 1, 16, 30]))
        size = draw(st.integers(0, 30)) * (columns or 30)
        chosen = rng.random(size) < draw(st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]))
        if columns:  # some rows and columns only, so that a grid is smaller
            chosen &= np.repeat(rng.random(size // columns) < 0.5, columns)
            chosen &= np.tile(rng.random(columns) < 0.3, size // columns)
        indices = np.flatnonzero(chosen)
        values, base = (rng.normal(size=indices.size).astype(np.float32) for _ in range(2))
        if mode.dtype == np.uint16:  # as bfloat16 or float16: all of these are finite in both
            values, base = ((v.view(np.uint32) >> 18).astype(np.uint16) for v in (values, base))
        tensors.append(SelectedEntries(size, indices, values, base, columns))
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


@given(adapters(ValueMode.INT8))
def test_int8_decodes_to_the_same_floats_in_a_second_reader(tensors):
    blob = encode_entries(tensors, ValueMode.INT8)

    assert_slow_reader_agrees(blob, decode(blob, tensors))


@pytest.mark.parametrize(("version", "mode"), GOLDEN)
def test_golden_blobs_stay_readable(version, mode):
    blob, tensors = GOLDEN[version, mode]
    assert read_blob(blob).version == version
    if tensors is None:
        (found,) = decode_entries(read_blob(blob), [100])
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


def test_a_blob_tells_what_is_inside_without_decoding():
    blob = read_blob(BLOB)

    assert (blob.mode, blob.block, blob.base_crc) == (ValueMode.FLOAT32, 0, 0)
    assert (blob.num_tensors, blob.num_entries) == (2, 7)
    assert blob.section_nbytes == (21, 5, 1, 2, 0, 7, 7, 7, 7)
    assert blob.index_nbytes == 29


def test_bytes_per_entry_reach_the_targets():
    """2.5 and 10 % of 2 M weights, base of deviation 0.02, change 5e-4 (Laplace)."""
    rng = np.random.default_rng(0)
    for density, bytes_each in ((0.025, 1.7), (0.1, 1.4)):
        indices = np.flatnonzero(rng.random(2_000_000) < density)
        base = rng.normal(0, 0.02, indices.size).astype(np.float32)
        adapted = base + rng.laplace(0, 5e-4, indices.size).astype(np.float32)
        short = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (adapted, base)]
        blob = encode_entries(
            [SelectedEntries(2_000_000, indices, *short)], ValueMode.ULPS_BFLOAT16
        )
        assert len(blob) <= bytes_each * indices.size


@pytest.mark.parametrize(
    ("tensors", "mode", "message"),
    [
        ([entries(9, [1, 2], [1.0])], "FLOAT32", r"tensor 0: .*of one length, got shapes \[2\]"),
        ([entries(9, [1], [1])], "ULPS_FLOAT16", "tensor 0: .*base weights .* none"),
        ([entries(9, [1], [1], [1, 2])], "ULPS_FLOAT16", r"shapes \[1\], \[1\], \[2\]"),
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


def test_a_blob_may_lie_in_any_buffer():
    expected = decode_entries(read_blob(BLOB), SIZES)

    for buffer in (bytearray(BLOB), memoryview(BLOB), np.frombuffer(BLOB, np.uint8).data):
        assert_same(decode_entries(read_blob(buffer), SIZES), expected)


@pytest.mark.parametrize("blob", [BLOB, NEW_BLOB], ids=["version 1", "version 2"])
def test_a_blob_cut_at_any_byte_is_one_error(blob):
    for end in range(len(blob)):
        with pytest.raises(AdapterFileError, match="here: "):
            read_blob(blob[:end], where="here")
    with pytest.raises(AdapterFileError, match=f"expected {len(blob)} bytes, got {len(blob) + 1}"):
        read_blob(blob + b"\0")


@pytest.mark.parametrize("blob", [BLOB, NEW_BLOB], ids=["version 1", "version 2"])
def test_any_flipped_bit_is_one_error(blob):
    for at in range(len(blob)):
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[at] ^= 1 << bit
            with pytest.raises(AdapterFileError, match="here: "):
                read_blob(damaged, where="here")


@given(st.binary(max_size=400))
def test_garbage_is_one_error(garbage):
    for blob in (garbage, BLOB[:8] + garbage, sealed(BLOB[:40] + garbage + b"1234")):
        with pytest.raises(AdapterFileError):
            decode_entries(read_blob(blob), SIZES)


@pytest.mark.parametrize(("version", "mode"), GOLDEN)
@given(data=st.data())
def test_a_forged_blob_is_an_error_or_holds_what_a_second_reader_finds(version, mode, data):
    """Damage with the checksum made right: checks other than the checksum have to hold."""
    golden, tensors = GOLDEN[version, mode]
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
        (8, b"\x03\x00", "format version 3 is not known; this version of sfa-peft reads 1, 2"),
        (10, b"\x02\x00", "flags 2, block 0 and 4 planes do not go with mode FLOAT32"),
        (10, b"\x01\x00", "flags 1, block 0 and 4 planes do not go with mode FLOAT32"),
        (12, b"\x09", "value mode 9 is not known; this version reads 1, 2, 5, 6, 7"),
        (12, b"\x02", "4 planes do not go with mode BFLOAT16"),
        (13, b"\xff", "the checksum does not match"),
        (14, b"\x40", "block 64 and 4 planes do not go with mode FLOAT32"),
        (16, b"\x03", "written for 3 tensors, the model has 2"),
        (24, b"\x08", "8 entries in the header, 7 of the tensors, 7 in the table"),
        (40, b"\x16", "sections of 58 bytes in all, room for 57"),
        (48, b"\x55", "table: expected 84 bytes from the counts, the file declares 85"),
        (56, b"\x02", "table: codec 2 is not known"),
    ],
)
def test_each_wrong_field_has_its_own_message(at, value, message):
    blob = sealed(BLOB[:at] + value + BLOB[at + len(value) :])

    with pytest.raises(AdapterFileError, match=re.escape(message)):
        decode_entries(read_blob(blob), SIZES)


def _reforged(number, change):
    """Return the blob with a grid, one of its sections (expanded) changed."""
    blob = read_blob(NEW_BLOB)
    sections = [*blob.sections]
    raw = bytearray(expand(sections[number], "part").tobytes())
    sections[number] = squeeze([bytes(change(raw) or raw)])
    return assemble(replace(blob, sections=sections))


def _set(at, value, form="<Q"):
    return lambda raw: struct.pack_into(form, raw, at, value)


def test_a_grid_tells_what_is_inside_without_decoding():
    (tensors, classes, *_) = read_blob(NEW_BLOB).sections

    assert struct.unpack_from("<QQI", expand(tensors, "t")) == (8192, len(_rows()), 64)
    columns = [position % 64 for position in _own()]
    assert expand(classes, "c").tolist() == _classes(_rows(), 128) + _classes(columns, 64)


def _own():
    return NEW_TENSORS[0].indices.tolist()


def _rows():
    return [position // 64 for position in _own()]


def _classes(places, number):
    return [(places.count(i) ** 2).bit_length() for i in range(number)]


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, _set(0, 8191), "tensor 0: the file's has 8191 weights, the model's 8192"),
        (0, _set(8, 8193), "8193 entries in rows of 64 cannot be in 8192 weights"),
        (0, _set(8, 2**63), "cannot be in 8192 weights"),
        (0, _set(16, 63, "<I"), "in rows of 63 cannot be in 8192"),
        (0, _set(16, 4, "<I"), "in rows of 4 cannot be in 8192"),  # more classes than allowed
        (0, _set(16, 1, "<I"), "in rows of 1 cannot be in 8192"),
        (0, _set(16, 32, "<I"), "classes: expected 288 bytes from the counts, the file declares"),
        (0, _set(56, 5, "<I"), "in rows of 5 cannot be in 50"),
        (0, _set(8, 7), "tensor 0: its rows or columns do not have 7 entries"),
        (0, _set(8, 8000), "tensor 0: its rows or columns do not have 8000 entries"),
        (1, _set(3, 255, "<B"), "tensor 0: its rows or columns do not have"),
        (1, _set(130, 26, "<B"), "tensor 0: its rows or columns do not have"),
        (1, lambda _raw: bytes(192), "tensor 0: its rows or columns do not have"),
        (1, _set(1, 1, "<B"), "table: expected 336 bytes"),  # a class makes levels of its own
        (1, lambda raw: raw + b"\0", "classes: expected 192 bytes"),
        (2, lambda raw: raw[:-42], "table: expected"),
        (2, _set(0, 1), "the file's has 1 weights, the model's 0"),
    ],
)
def test_each_contradiction_of_a_grid_has_its_own_message(number, change, message):
    sizes = [tensor.size for tensor in NEW_TENSORS]
    bases = [tensor.base for tensor in NEW_TENSORS]
    with pytest.raises(AdapterFileError, match=re.escape(message)):
        decode_entries(
            read_blob(_reforged(number, change)), sizes, base_entries=lambda i, _: bases[i]
        )


def test_entries_that_move_from_one_tensor_to_another_are_noticed():
    """Levels hold the weights of all tensors: one more here and one less there fits the lists."""
    rng = np.random.default_rng(0)
    odds = rng.random((64, 1)) ** 3 * rng.random((1, 64)) ** 3
    parts = [np.flatnonzero(rng.random((64, 64)) < odds) for _ in range(2)]
    tensors = [SelectedEntries(4096, p, np.ones(p.size, "f4"), columns=64) for p in parts]
    blob = read_blob(encode_entries(tensors, ValueMode.FLOAT32))
    raw = bytearray(expand(blob.sections[0], "tensors").tobytes())
    first, second = (struct.unpack_from("<Q", raw, at)[0] for at in (8, 28))
    struct.pack_into("<Q", raw, 8, first + 1)
    struct.pack_into("<Q", raw, 28, second - 1)
    sections = [squeeze([bytes(raw)]), *blob.sections[1:]]

    with pytest.raises(AdapterFileError, match=r"damaged|the file's has"):
        decode_entries(read_blob(assemble(replace(blob, sections=sections))), [4096, 4096])


def test_a_grid_takes_fewer_bytes_where_rows_and_columns_are_selected_unevenly():
    """As in trained adapters: half of all entries in a tenth of the rows."""
    rng = np.random.default_rng(0)
    odds = np.exp(1.5 * rng.normal(size=(512, 1)) + 1.5 * rng.normal(size=(1, 512)))
    indices = np.flatnonzero(rng.random((512, 512)) < 0.02 * odds)
    values = np.ones(indices.size, "f4")
    plain, grid = (
        read_blob(encode_entries([SelectedEntries(2**18, indices, values, columns=c)], mode))
        for c, mode in ((0, ValueMode.FLOAT32), (512, ValueMode.FLOAT32))
    )
    assert grid.index_nbytes < 0.85 * plain.index_nbytes


def test_blocks_of_neighbours_take_a_fraction_of_a_bit_for_each():
    rng = np.random.default_rng(0)
    blocks = np.flatnonzero(rng.random(2**14) < 0.05)
    indices = (16 * blocks[:, None] + np.arange(16)).ravel()
    entries = SelectedEntries(2**18, indices, np.ones(indices.size, "f4"), columns=512)
    blob = read_blob(encode_entries([entries], ValueMode.FLOAT32))
    assert 8 * blob.index_nbytes < 0.5 * indices.size


def test_another_model_is_named_as_the_cause():
    with pytest.raises(AdapterFileError, match="written for 2 tensors, the model has 1"):
        decode_entries(read_blob(BLOB), [12])
    with pytest.raises(AdapterFileError, match="tensor 1: the file's has 600 weights, the model's"):
        decode_entries(read_blob(BLOB), [12, 601])


def test_values_against_a_base_need_that_base():
    blob, tensors = GOLDEN[1, ValueMode.ULPS_BFLOAT16]
    sizes = [tensor.size for tensor in tensors]
    with pytest.raises(AdapterFileError, match=r"ULPS_BFLOAT16.; pass `base_entries`"):
        decode_entries(read_blob(blob), sizes)

    other = [replace(tensor, base=tensor.base ^ 1) for tensor in tensors]
    with pytest.raises(AdapterFileError, match="not those it was written against"):
        decode(blob, other)

    wide = [replace(tensor, base=tensor.base.astype(np.float32)) for tensor in tensors]
    with pytest.raises(AdapterFileError, match="tensor 0: expected 3 base weights as uint16"):
        decode(blob, wide)


def _forged(sections, entries):
    """Return a FLOAT32 blob of one tensor with these sections and a right checksum."""
    return assemble(replace(read_blob(BLOB), num_tensors=1, num_entries=entries, sections=sections))


def _table(size, entries, runs, *rest):
    record = (size, entries, runs, *rest, *[0] * (4 - len(rest)))
    return squeeze([np.array([record], RECORD).tobytes()])


@pytest.mark.parametrize("claimed", [2**20, 2**31, 2**40, 2**47])
@pytest.mark.parametrize("size", [4096, None])
@pytest.mark.parametrize("codec", [STORED, DEFLATE])
def test_huge_declared_sizes_take_no_memory(claimed, size, codec):
    """One run of `claimed` positions needs few bytes; its values do not."""
    size = size or claimed
    tiny = squeeze([bytes(100)]).data
    sections = [
        _table(size, claimed, 1, 0, 0, 0, claimed.bit_length() - 1),
        *(Section(STORED, n, bytes(n)) for n in (1, 0, 1, claimed.bit_length() - 1)),
        *(Section(codec, claimed, tiny) for _ in range(4)),
    ]
    blob = _forged(sections, claimed)
    tracemalloc.start()

    with pytest.raises(AdapterFileError, match=r"contradicts itself|cannot come out of"):
        decode_entries(read_blob(blob), [size])

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_sections_are_all_checked_before_one_is_expanded():
    bomb = squeeze([bytes(10_000_000)])
    sections = [_table(10**7, 10**7, 10**7), bomb, *(Section(STORED, 0, b"") for _ in range(3))]
    blob = _forged([*sections, bomb, bomb, bomb, Section(STORED, 9, bytes(9))], 10**7)
    tracemalloc.start()

    with pytest.raises(AdapterFileError, match="plane 3: expected 10000000 bytes"):
        decode_entries(read_blob(blob), [10**7])

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
