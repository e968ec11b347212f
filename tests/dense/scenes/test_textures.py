# SPDX-License-Identifier: Apache-2.0
"""Textures: range, dtype, determinism."""

from __future__ import annotations

import numpy as np
import pytest

from sfa_peft.dense.scenes import textures

ALL = (
    textures.value_noise,
    textures.leaves,
    textures.stripes,
    textures.slanted,
    textures.checks,
    textures.bricks,
)


def _plane() -> tuple[textures.Floats, textures.Floats]:
    rows, columns = np.mgrid[-20:20, -50:50].astype(np.float32) / 10
    return columns, rows


@pytest.mark.parametrize("texture", ALL)
def test_a_texture_stays_in_range_and_in_float32_and_varies(texture: textures.Texture) -> None:
    mix = texture(*_plane(), np.random.default_rng(0))

    assert mix.dtype == np.float32
    assert mix.shape == (40, 100)
    assert mix.min() >= 0
    assert mix.max() <= 1
    assert mix.std() > 0.1


@pytest.mark.parametrize("texture", ALL)
def test_a_texture_is_a_function_of_its_generator(texture: textures.Texture) -> None:
    first, again, other = (texture(*_plane(), np.random.default_rng(i)) for i in (1, 1, 2))

    np.testing.assert_array_equal(first, again)
    # Brick sizes and such differ by the seed as well.
    assert (first != other).any()


def test_the_two_colours_always_differ_in_brightness() -> None:
    rng = np.random.default_rng(0)

    pairs = np.stack([textures.random_colours(rng) for _ in range(200)])

    assert np.abs(pairs[:, 0].mean(1) - pairs[:, 1].mean(1)).min() > 10
    assert pairs.min() >= 0
    assert pairs.max() <= 255
    # Either of the two may be the lighter one.
    assert 0.3 < (pairs[:, 0].mean(1) > pairs[:, 1].mean(1)).mean() < 0.7
