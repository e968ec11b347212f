# SPDX-License-Identifier: Apache-2.0
"""Procedural two-colour textures for the rendered scenes, as functions of surface coordinates.

A texture maps surface coordinates in metres to a mix in ``[0, 1]``. Colours are drawn apart: the
texture of a thing says what it is and its colour says nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Texture = Callable[[Floats, Floats, np.random.Generator], Floats]

_LATTICE = 32  # Cells per side of the noise lattice; coordinates wrap around it.


def value_noise(s: Floats, t: Floats, rng: np.random.Generator) -> Floats:
    """Return smooth random values with one lattice cell per unit of ``s`` and ``t``.

    Args:
        s: First surface coordinate, float32, any shape.
        t: Second surface coordinate, same shape.
        rng: Source of the lattice.

    Returns:
        Values in ``[0, 1]``, float32, the shape of ``s``.
    """
    lattice = rng.random((_LATTICE, _LATTICE), dtype=np.float32).ravel()
    column, row = np.floor(s), np.floor(t)
    ds, dt = s - column, t - row
    ds, dt = ds * ds * (3 - 2 * ds), dt * dt * (3 - 2 * dt)
    left, top = column.astype(np.int32) % _LATTICE, row.astype(np.int32) % _LATTICE * _LATTICE
    right, bottom = (left + 1) % _LATTICE, (top + _LATTICE) % (_LATTICE * _LATTICE)
    upper = lattice[top + left] * (1 - ds) + lattice[top + right] * ds
    lower = lattice[bottom + left] * (1 - ds) + lattice[bottom + right] * ds
    return (upper * (1 - dt) + lower * dt).astype(np.float32)


def leaves(s: Floats, t: Floats, rng: np.random.Generator) -> Floats:
    """Return fine noise of two octaves and high contrast."""
    fine = value_noise(s * 9.0, t * 9.0, rng)
    coarse = value_noise(s * 4.0, t * 4.0, rng)
    return np.clip((0.6 * fine + 0.4 * coarse - 0.5) * 3.0 + 0.5, 0, 1).astype(np.float32)


def stripes(s: Floats, t: Floats, rng: np.random.Generator) -> Floats:
    """Return hard bands along ``s``, 0.2 to 0.35 m wide, alternating along ``t``."""
    width = rng.uniform(0.2, 0.35)
    return (np.floor(t / width + rng.random()) % 2).astype(np.float32)


def slanted(s: Floats, t: Floats, rng: np.random.Generator) -> Floats:
    """Return stripes at a random slant of 30 to 60 degrees to either side."""
    angle = rng.uniform(0.52, 1.05) * rng.choice((-1.0, 1.0))
    return stripes(s, s * np.float32(np.sin(angle)) + t * np.float32(np.cos(angle)), rng)


def checks(s: Floats, t: Floats, rng: np.random.Generator) -> Floats:
    """Return a chequerboard with squares of 0.25 to 0.4 m."""
    side = rng.uniform(0.25, 0.4)
    return ((np.floor(s / side) + np.floor(t / side)) % 2).astype(np.float32)


def bricks(s: Floats, t: Floats, rng: np.random.Generator) -> Floats:
    """Return courses of bricks 0.5 to 0.8 m high with thin joints, every second one shifted."""
    height = rng.uniform(0.5, 0.8)
    course = np.floor(t / height)
    across = s / (2.2 * height) + 0.5 * (course % 2)
    joint = (t / height - course < 0.26) | (across - np.floor(across) < 0.14)
    return joint.astype(np.float32)


def random_colours(rng: np.random.Generator) -> Floats:
    """Return two random colours of clearly different brightness.

    Args:
        rng: Source of the colours.

    Returns:
        Float32 of shape ``(2, 3)`` in ``[0, 255]``, dark and light in random order.
    """
    dark = rng.uniform(15, 115, 3)
    light = rng.uniform(125, 245, 3)
    pair = np.stack((dark, light)).astype(np.float32)
    return pair[::-1] if rng.random() < 0.5 else pair
