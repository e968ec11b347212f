# SPDX-License-Identifier: Apache-2.0
"""Shapes: every kind of thing fills its box and stays inside."""

from __future__ import annotations

import numpy as np
import pytest

from sfa_peft.dense.scenes.shapes import KINDS, Surface


def _draw(name: str, seed: int, light: float = 0.5) -> tuple[Surface, np.ndarray, np.ndarray]:
    # A box of 2 m by 2 m seen with a margin of a quarter on all sides.
    rows, columns = np.mgrid[:60, :60].astype(np.float32)
    x, y = (columns - 29.5) / 20, (49.5 - rows) / 20
    surface = KINDS[name].shape(x, y, 2.0, 2.0, light, np.random.default_rng(seed))
    return surface, x, y


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_thing_lies_within_its_box_and_covers_a_good_part(name: str, seed: int) -> None:
    surface, x, y = _draw(name, seed)
    # Below the foot is ground: only the wall and the box kinds rely on the caller's crop there.
    inside = surface.mask & (y >= 0)

    assert np.abs(x[inside]).max() <= 1.05
    assert y[inside].max() <= 2.05
    assert inside.sum() >= 0.25 * 40 * 40


@pytest.mark.parametrize("name", KINDS)
def test_shade_and_relief_are_finite_and_in_range(name: str) -> None:
    surface, _, y = _draw(name, 0)
    inside = surface.mask & (y >= 0)

    assert surface.shade[inside].min() > 0.2
    assert surface.shade[inside].max() <= 1.3
    assert surface.relief[inside].min() >= 0
    assert surface.relief[inside].max() <= 1.0
    assert all(np.isfinite(a[inside]).all() for a in (surface.s, surface.t))
    assert all(a.dtype == np.float32 for a in (surface.shade, surface.s, surface.t, surface.relief))


def test_a_ball_is_lit_from_the_side_of_the_light() -> None:
    surface, x, _ = _draw("ball", 0, light=1.0)

    assert (
        surface.shade[surface.mask & (x > 0.3)].mean()
        > surface.shade[surface.mask & (x < -0.3)].mean()
    )
