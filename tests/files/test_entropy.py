# SPDX-License-Identifier: Apache-2.0
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.entropy import (
    DEFLATE,
    STORED,
    Section,
    check_section,
    expand,
    squeeze,
)


def _deflate(raw):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(raw) + packer.flush()


@given(st.one_of(st.binary(max_size=300), st.builds(bytes, st.integers(0, 200_000))))
def test_bytes_come_back_and_never_grow(raw):
    section = squeeze([raw])
    check_section(section, len(raw), "part")

    assert expand(section, "part").tobytes() == raw
    assert len(section.data) <= len(raw)


def test_random_bytes_are_stored_and_skewed_ones_are_not():
    rng = np.random.default_rng(0)

    assert squeeze([rng.bytes(200_000)]).codec == STORED
    skewed = squeeze([rng.geometric(0.1, 200_000).clip(max=255).astype(np.uint8).tobytes()])
    assert skewed.codec == DEFLATE
    assert len(skewed.data) < 0.6 * 200_000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Section(2, 9, b"x" * 9), "codec 2 is not known; this version reads 0 .stored., 1 .defl"),
        (Section(STORED, 8, b"x" * 9), "expected 9 bytes from the counts, the file declares 8"),
        (Section(STORED, 9, b"x" * 8), "9 bytes cannot come out of 8"),
        (Section(STORED, 9, b"x" * 10), "9 bytes cannot come out of 10"),
        (Section(DEFLATE, 9, b""), "9 bytes cannot come out of 0"),
    ],
)
def test_impossible_lengths_are_refused(section, message):
    with pytest.raises(AdapterFileError, match=f"part: .*{message}"):
        check_section(section, 9, "part")


@pytest.mark.parametrize(
    "data",
    [
        _deflate(b"123456789")[:-1],
        _deflate(b"12345678"),
        _deflate(b"1234567890"),
        _deflate(b"123456789") + b"\0",
        _deflate(b"123456789") * 2,
        b"\xff\xff\xff",
        b"",
    ],
    ids=["cut", "short", "long", "a byte more", "twice", "garbage", "nothing"],
)
def test_a_stream_that_is_not_exactly_the_declared_bytes_is_refused(data):
    with pytest.raises(AdapterFileError, match=r"part: .*damaged"):
        expand(Section(DEFLATE, 9, data), "part")


def test_a_bomb_is_not_expanded_beyond_what_it_declares():
    bomb = _deflate(bytes(50_000_000))
    tracemalloc.start()

    with pytest.raises(AdapterFileError, match="got more"):
        expand(Section(DEFLATE, 1000, bomb), "part")

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
