# SPDX-License-Identifier: Apache-2.0
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.entropy import check_section, expand, squeeze
from sfa_peft.files.indices import (
    RECORD,
    pack_indices,
    read_table,
    stream_lengths,
    unpack_indices,
)

EMPTY = np.empty(0, dtype=np.int64)


def _round_trip(indices, sizes):
    """Return the decoded indices and the number of bytes they took."""
    sections = [squeeze(raw) for raw in pack_indices(indices, sizes)]
    check_section(sections[0], RECORD.itemsize * len(sizes), "table")
    records = read_table(expand(sections[0], "table"), sizes)
    for section, expected in zip(sections[1:], stream_lengths(records), strict=True):
        check_section(section, expected, "stream")
    found = unpack_indices(records, [expand(s, "stream") for s in sections[1:]])
    return found, sum(len(s.data) for s in sections)


def _entropy(entries, size):
    """Return the entropy in bits per selected entry."""
    p = entries / size
    return (-p * log2(p) - (1 - p) * log2(1 - p)) / p


def _bernoulli(size, density, seed=0):
    return np.flatnonzero(np.random.default_rng(seed).random(size) < density)


@st.composite
def tensors(draw):
    """Draw (positions, size): scattered positions and runs in tensors of 0 to 2^40 weights."""
    size = draw(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.integers(2**31, 2**40)))
    if size == 0:
        return EMPTY, 0
    kind = draw(st.sampled_from(["scattered", "runs", "random", "ends"]))
    if kind == "scattered":
        chosen = draw(st.sets(st.integers(0, size - 1), max_size=30))
    elif kind == "ends":
        chosen = draw(st.sets(st.sampled_from([0, size // 2, size - 2, size - 1])))
    elif kind == "runs":
        starts = draw(st.lists(st.integers(0, size - 1), max_size=4))
        chosen = {i for s in starts for i in range(s, s + draw(st.integers(1, 300))) if i < size}
    else:
        density = draw(st.floats(0, 1))
        chosen = set(_bernoulli(min(size, 3000), density, draw(st.integers(0, 99))).tolist())
    return np.array(sorted(i for i in chosen if i >= 0), dtype=np.int64), size


@given(st.lists(tensors(), max_size=6))
def test_positions_come_back(drawn):
    indices, sizes = [positions for positions, _ in drawn], [size for _, size in drawn]

    found, _ = _round_trip(indices, sizes)

    assert len(found) == len(indices)
    for got, expected in zip(found, indices, strict=True):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("positions", "size"),
    [
        ([], 0),
        ([], 7),
        ([0], 1),
        (range(1000), 1000),
        ([2**31 + 5], 2**31 + 6),
        ([0, 2**47], 2**48 - 1),
        ([254, 255 + 255, 3 * 255 + 2, 10**6], 2**20),
        (range(0, 4096, 2), 4096),
        ([*range(254), *range(255, 600), *range(5000, 5255)], 2**33),
    ],
)
def test_edge_cases_come_back(positions, size):
    expected = np.array(positions, dtype=np.int64)

    (found,), _ = _round_trip([expected], [size])

    np.testing.assert_array_equal(found, expected)


DENSITIES = [
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.9,
]


@pytest.mark.parametrize("density", DENSITIES)
def test_random_positions_take_at_most_a_tenth_of_a_bit_more_than_their_entropy(density):
    positions = np.cumsum(np.random.default_rng(0).geometric(density, 100_000)) - 1
    size = int(positions[-1]) + 1

    (found,), nbytes = _round_trip([positions], [size])

    np.testing.assert_array_equal(found, positions)
    assert 8 * nbytes / positions.size < _entropy(positions.size, size) + 0.1


def test_tensors_of_several_densities_take_at_most_a_tenth_of_a_bit_more():
    """Big and tiny ones mixed, in an order that mixes densities: each profits from its own."""
    rng = np.random.default_rng(1)
    sizes = [16_384 * int(4 ** rng.integers(0, 4)) for _ in range(120)]
    densities = rng.choice([0.002, 0.01, 0.03, 0.1, 0.3], size=len(sizes))
    indices = [_bernoulli(s, d, i) for i, (s, d) in enumerate(zip(sizes, densities, strict=True))]
    total = sum(p.size for p in indices)

    found, nbytes = _round_trip(indices, sizes)

    ideal = sum(p.size * _entropy(p.size, s) for p, s in zip(indices, sizes, strict=True) if p.size)
    for got, expected in zip(found, indices, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert 8 * nbytes / total < ideal / total + 0.1
    assert 8 * nbytes / total < _entropy(total, sum(sizes)) - 0.5  # one density for all


def test_whole_rows_cost_almost_nothing():
    rows = np.sort(np.random.default_rng(0).choice(4096, 100, replace=False))
    positions = (rows[:, None] * 1024 + np.arange(1024)).reshape(-1)

    (found,), nbytes = _round_trip([positions], [4096 * 1024])

    np.testing.assert_array_equal(found, positions)
    assert nbytes < 300  # 102,400 positions


def test_a_full_tensor_costs_a_record():
    _, nbytes = _round_trip([np.arange(10**6)], [10**6])

    assert nbytes < 100


@pytest.mark.parametrize(
    ("positions", "size", "message"),
    [
        (np.array([3, 3]), 9, "repeat or decrease"),
        (np.array([3, 2]), 9, "repeat or decrease"),
        (np.array([-1, 2]), 9, "positions -1 to 2 but it has 9 weights"),
        (np.array([1, 9]), 9, "positions 1 to 9 but it has 9 weights"),
        (np.array([1, 2], dtype=np.int32), 9, "got int32"),
        (np.array([[1, 2]]), 9, r"got int64 \[1, 2\]"),
        (EMPTY, 2**48, "less than 2.48 weights"),
    ],
)
def test_positions_that_cannot_be_are_not_packed(positions, size, message):
    with pytest.raises(AdapterFileError, match=message):
        pack_indices([EMPTY, positions], [4, size])


def _table(**fields):
    record = dict.fromkeys(RECORD.names, 0) | {"size": 100, "entries": 10, "runs": 10} | fields
    return np.frombuffer(np.array([tuple(record.values())], RECORD).tobytes(), np.uint8)


@pytest.mark.parametrize(
    "fields",
    [
        {"entries": 101, "runs": 101},
        {"runs": 11},
        {"runs": 0},
        {"entries": 0},
        {"skip_escapes": 1},  # 255 weights skipped in a tensor of 100
        {"skip_shift": 4},  # ten numbers below 16 may pass 100
        {"skip_shift": 255},
        {"length_escapes": 1},  # but every run is one position
        {"length_shift": 1},
        {"runs": 2, "length_shift": 3},
        {"entries": 2**63, "runs": 2**63},
        {"skip_escapes": 2**64 - 1},
    ],
)
def test_an_impossible_record_is_refused_before_anything_is_read(fields):
    with pytest.raises(AdapterFileError, match="tensor 0: its record contradicts itself"):
        read_table(_table(**fields), [100])


def test_a_tensor_of_another_size_is_refused():
    with pytest.raises(AdapterFileError, match="tensor 0: the file's has 100 weights, the model's"):
        read_table(_table(), [99])


@pytest.mark.parametrize(
    ("fields", "skips", "lengths", "message"),
    [
        ({"entries": 2, "runs": 2}, [50, 49], [], "position 100 but it has 100 weights"),
        ({"entries": 2, "runs": 2}, [255, 3], [], "do not hold the 2 numbers"),
        ({"entries": 2, "runs": 2}, [3, 255], [], "do not hold the 2 numbers"),
        ({"size": 999, "entries": 2, "runs": 2, "skip_escapes": 1}, [3, 4, 5], [], "do not hold"),
        ({"entries": 9, "runs": 2}, [3, 4], [5, 5], "runs of 12 positions, the table says 9"),
        ({"entries": 9, "runs": 2}, [3, 90], [3, 4], "position 101 but"),
        ({"entries": 9, "runs": 2}, [3, 4], [255, 1], "do not hold the 2 numbers"),
    ],
)
def test_streams_that_do_not_fit_their_record_are_refused(fields, skips, lengths, message):
    records = read_table(_table(**fields), [fields.get("size", 100)])
    assert stream_lengths(records) == (len(skips), 0, len(lengths), 0)

    with pytest.raises(AdapterFileError, match=f"tensor 0: .*{message}"):
        unpack_indices(records, [np.array(raw, np.uint8) for raw in (skips, [], lengths, [])])
