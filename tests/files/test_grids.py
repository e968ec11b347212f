# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.files.grids import LEVELS, Grid


@st.composite
def matrices(draw):
    """Draw (positions, rows, columns): rows and columns that are selected more and less often."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    odds = np.exp(spread * (rng.normal(size=(rows, 1)) + rng.normal(size=(1, columns))))
    chosen = rng.random((rows, columns)) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])) * odds
    return np.flatnonzero(chosen), rows, columns


def slow_levels(positions, rows, columns):
    """Return the positions of all weights of each level, one weight at a time."""
    in_row = [0] * rows
    in_column = [0] * columns
    for position in positions.tolist():
        in_row[position // columns] += 1
        in_column[position % columns] += 1
    found = [[] for _ in range(LEVELS)]
    for row in range(rows):
        for column in range(columns):
            if in_row[row] and in_column[column]:
                digits = (in_row[row] ** 2).bit_length() + (in_column[column] ** 2).bit_length()
                level = max(0, min(LEVELS - 1, (positions.size**2).bit_length() + 4 - digits))
                found[level].append(row * columns + column)
    return found


@given(matrices())
def test_positions_are_dealt_out_to_levels_as_one_by_one_and_come_back(drawn):
    positions, rows, columns = drawn
    grid = Grid.of(positions, rows * columns, columns)

    places = grid.split(positions)

    levels = slow_levels(positions, rows, columns)
    assert grid.sizes.tolist() == [len(level) for level in levels]
    for own, level in zip(places, levels, strict=True):
        chosen = set(positions.tolist())
        assert own.tolist() == [i for i, position in enumerate(level) if position in chosen]
    joined = grid.join(places)
    assert joined.dtype == np.int64
    np.testing.assert_array_equal(joined, positions)


@pytest.mark.parametrize("seed", [1, 7])
def test_levels_are_apart_by_density_however_uneven_rows_and_columns_are(seed):
    rng = np.random.default_rng(seed)
    odds = np.exp(rng.normal(size=(400, 1)) + rng.normal(size=(1, 300)))
    positions = np.flatnonzero(rng.random((400, 300)) < 0.03 * odds)
    grid = Grid.of(positions, 400 * 300, 300)
    pairs = zip(grid.split(positions), grid.sizes, strict=True)
    found = [own.size / size for own, size in pairs if size > 2000 and own.size < 0.5 * size]
    assert len(found) > 5
    for denser, sparser in pairwise(found[::2]):
        assert 1.4 < denser / sparser < 2.8  # every second level is half as dense
