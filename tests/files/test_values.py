# SPDX-License-Identifier: Apache-2.0
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.entropy import squeeze
from sfa_peft.files.values import (
    BLOCK,
    ValueMode,
    decode_values,
    encode_values,
    plane_lengths,
    round_to_bfloat16,
)

EXACT = [mode for mode in ValueMode if mode is not ValueMode.INT8]
# Zeros of both signs, subnormals, one, the largest finite values and their neighbours.
EXTREMES = {
    4: [0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0xFF7FFFFF],
    2: [0, 1 << 15, 1, 0x8001, 0x0080, 0x3F80, 0x7BFF, 0xFBFF, 0x0400],
}
FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 3.4028234663852886e38, -3.4e38]),
)


def _bits_of(mode):
    """Draw bit patterns of finite floats of the mode's type."""
    width = mode.dtype.itemsize
    mask = {4: 0x7F800000, 2: 0x7C00 if mode.name.endswith("T16") else 0x7F80}[width]
    mask = 0x7F80 if mode.name.endswith("BFLOAT16") else mask
    finite = st.integers(0, 2 ** (8 * width) - 1).filter(lambda bits: bits & mask != mask)
    return st.one_of(finite, st.sampled_from(EXTREMES[width]))


def _array(bits, mode):
    return np.array(bits, dtype=f"u{mode.dtype.itemsize}").view(mode.dtype)


def _round_trip(mode, values, base=None, counts=None):
    counts = [values.size] if counts is None else counts
    planes = [b"".join(parts) for parts in encode_values(mode, values, base, counts)]
    assert [len(plane) for plane in planes] == plane_lengths(mode, counts, BLOCK)
    raw = [np.frombuffer(plane, np.uint8) for plane in planes]
    return decode_values(mode, raw, base, counts, BLOCK), planes


def _widened(codes):
    """Return the numbers that bfloat16 codes stand for, float32."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def _nbytes(planes):
    return sum(len(squeeze([plane]).data) for plane in planes)


@pytest.mark.parametrize("mode", EXACT)
@given(data=st.data())
def test_exact_modes_give_every_bit_back(mode, data):
    bits = data.draw(st.lists(_bits_of(mode), max_size=40))
    values = _array(bits, mode)
    bases = data.draw(st.lists(_bits_of(mode), min_size=len(bits), max_size=len(bits)))
    base = _array(bases, mode) if mode.needs_base else None

    found, _ = _round_trip(mode, values, base)

    assert found.dtype == mode.dtype
    assert found.tobytes() == values.tobytes()


@pytest.mark.parametrize("mode", [m for m in ValueMode if m.needs_base and m.dtype.itemsize == 2])
def test_every_16_bit_weight_comes_back_from_every_kind_of_base(mode):
    exponent = 0x7F80 if mode is ValueMode.ULPS_BFLOAT16 else 0x7C00
    finite = np.array([b for b in range(2**16) if b & exponent != exponent], dtype=np.uint16)

    for base_bits in (0, 0x8000, 1, 0x8001, int(finite[-1]), 0x3C01):
        base = np.full_like(finite, base_bits)
        found, _ = _round_trip(mode, finite, base)
        assert found.tobytes() == finite.tobytes()


def test_steps_count_units_in_the_last_place():
    base = np.array([0x3F80, 0x3F80, 0x3F80, 0x0000, 0x8000], dtype=np.uint16)
    adapted = np.array([0x3F80, 0x3F81, 0x3F7F, 0x8000, 0x0000], dtype=np.uint16)

    planes = encode_values(ValueMode.ULPS_BFLOAT16, adapted, base, [5])

    # The two zeros come first: their exponent is smallest. There a code may end.
    assert [list(part) for part in planes[0] if part] == [[1, 2], [0, 2, 1]]
    assert list(b"".join(planes[1])) == [0] * 5


@pytest.mark.parametrize("mode", list(ValueMode))
@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_neither_written_nor_read(mode, name):
    half = mode is ValueMode.ULPS_FLOAT16
    kind = torch.float32 if mode.dtype == np.float32 else torch.float16 if half else torch.bfloat16
    tensor = torch.tensor([1.0, float(name), 2.0], dtype=kind)
    bits = tensor.view(torch.int32 if kind == torch.float32 else torch.int16).numpy()
    values = bits.view(mode.dtype)
    base = _array([0, 0, 0], mode) if mode.needs_base else None
    with pytest.raises(AdapterFileError, match="1 of 3 values are NaN or infinite, the first at 1"):
        encode_values(mode, values, base, [3])

    if mode is ValueMode.INT8:
        planes = [b"\x01\x01\x01", b"\x00", b"\x00", b"\x00", b"\xff"]  # largest: infinity
    else:
        unsigned = bits.view(f"u{mode.dtype.itemsize}")
        width = 8 * mode.dtype.itemsize
        coded = unsigned << 1 | unsigned >> (width - 1)
        if mode.needs_base:  # from +0: bits steps up, or 2^width - 1 - bits down past -0
            sign = 1 << (width - 1)
            steps = [int(b) if b < sign else sign - 1 - int(b) for b in unsigned]
            coded = np.array([2 * s if s >= 0 else -2 * s - 1 for s in steps], unsigned.dtype)
        planes = [coded.view(np.uint8).reshape(3, -1)[:, i].tobytes() for i in range(width // 8)]
    raw = [np.frombuffer(plane, np.uint8) for plane in planes]
    with pytest.raises(AdapterFileError, match="are NaN or infinite"):
        decode_values(mode, raw, base, [3], 64)


@pytest.mark.parametrize(
    ("mode", "values", "base"),
    [
        (ValueMode.FLOAT32, np.zeros(2, np.float64), None),
        (ValueMode.INT8, np.zeros(2, np.uint16), None),
        (ValueMode.ULPS_FLOAT16, np.zeros(2, np.float32), np.zeros(2, np.uint16)),
        (ValueMode.ULPS_BFLOAT16, np.zeros(2, np.uint16), np.zeros(2, np.float32)),
    ],
)
def test_values_of_another_type_are_refused(mode, values, base):
    with pytest.raises(AdapterFileError, match=f"cannot be stored as {mode.name}, which takes"):
        encode_values(mode, values, base, [2])


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=FLOATS))
def test_rounding_to_bfloat16_is_pytorchs_and_within_its_bound(values):
    codes = round_to_bfloat16(values)

    as_torch = torch.from_numpy(values).to(torch.bfloat16)
    expected = as_torch.view(torch.int16).numpy().view(np.uint16)
    overflow = np.isinf(as_torch.float().numpy())
    assert codes[~overflow].tobytes() == expected[~overflow].tobytes()
    assert (codes[overflow] & 0x7FFF == 0x7F7F).all()  # the largest finite one instead

    wide = values.astype(np.float64)
    error = np.abs(_widened(codes).astype(np.float64) - wide)
    assert (error <= np.maximum(2.0**-8 * np.abs(wide), 2.0**-134)).all()


def test_float32_values_are_rounded_when_stored_as_bfloat16():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.4028235e38, -0.0], dtype=np.float32)

    found, _ = _round_trip(ValueMode.BFLOAT16, values)

    assert found.tolist() == [0x3F80, 0x3F80, 0x3F82, 0xFF7F, 0x8000]


@given(st.lists(hnp.arrays(np.float32, st.integers(0, 300), elements=FLOATS), max_size=4))
def test_int8_values_stay_within_a_253rd_of_their_blocks_largest(tensors):
    flat = np.concatenate([np.empty(0, np.float32), *tensors])

    found, _ = _round_trip(ValueMode.INT8, flat, counts=[t.size for t in tensors])

    first = 0
    for tensor in tensors:
        for a in range(0, tensor.size, BLOCK):
            part = tensor[a : a + BLOCK].astype(np.float64)
            got = found[first + a : first + a + part.size].astype(np.float64)
            largest = np.abs(part).max()
            assert (np.abs(got - part) <= largest / 253 + 2.0**-150).all()
            assert np.abs(got).max() == largest
        first += tensor.size


def test_int8_refuses_what_is_never_written():
    def read(quotient, largest):
        planes = [bytes([quotient]), *(bytes([b]) for b in struct.pack("<I", largest))]
        raw = [np.frombuffer(plane, np.uint8) for plane in planes]
        return decode_values(ValueMode.INT8, raw, None, [1], 64)

    one = 0x3F800000 << 1
    assert read(127, one).tolist() == [1.0]
    for quotient, largest in ((128, one), (127, one | 1)):
        with pytest.raises(AdapterFileError, match="never written"):
            read(quotient, largest)


def test_bits_per_value_on_a_typical_change():
    """A change of 5e-4 (Laplace) on weights of standard deviation 0.02."""
    rng = np.random.default_rng(0)
    n = 200_000
    base = rng.normal(0, 0.02, n).astype(np.float32)
    change = rng.laplace(0, 5e-4, n).astype(np.float32)
    base16 = round_to_bfloat16(base)
    adapted16 = round_to_bfloat16(_widened(base16) + change)

    def bits(mode, values, base=None):
        return 8 * _nbytes(_round_trip(mode, values, base)[1]) / n

    assert bits(ValueMode.ULPS_BFLOAT16, adapted16, base16) < 5.8
    assert bits(ValueMode.FLOAT32, change) < 27.0
    assert bits(ValueMode.BFLOAT16, change) < 11.0
    assert bits(ValueMode.INT8, change) < 7.7
