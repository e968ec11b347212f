# SPDX-License-Identifier: Apache-2.0
"""Which things stand where in a rendered scene, in metres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfa_peft.dense.scenes.shapes import KINDS

FOCAL = 0.9  # In image sides: a field of view of 58 degrees.

_OBJECTS = ("crate", "ball", "bush", "cone", "pine")


@dataclass(frozen=True)
class Thing:
    """One thing on the ground.

    Attributes:
        name: Its class.
        x: Metres to the right of the camera axis.
        z: Metres in front of the camera.
        w: Width in metres.
        h: Height in metres.
    """

    name: str
    x: float
    z: float
    w: float
    h: float


def place_things(rng: np.random.Generator, *, crowded: bool = False) -> list[Thing]:
    """Draw the things of one scene.

    Args:
        rng: Source of all randomness.
        crowded: By default no class but the wall comes twice and things stand apart, 3 to 7 of
            them; else 5 to 11 of any class stand wherever they fall, near and far.

    Returns:
        The things, in no order.
    """
    walls = int(rng.choice((0, 1, 2), p=(0.3, 0.5, 0.2)))
    things = [
        _place(rng, "wall", z=rng.uniform(9, 14), across=rng.uniform(-0.5, 0.5))
        for _ in range(walls)
    ]
    return things + (_crowd(rng) if crowded else _one_each(rng))


def _one_each(rng: np.random.Generator) -> list[Thing]:
    count = int(rng.integers(3, len(_OBJECTS) + 1))
    # No class comes twice, and side slots keep things from piling up.
    names = rng.permutation(_OBJECTS)[:count]
    slots = (rng.permutation(count) + rng.uniform(0.1, 0.9, count)) / count - 0.5
    # One thing near the camera: a patch of 4 pixels sees nothing of small things.
    near = rng.uniform(2.4, 3.4)
    return [
        _place(
            rng,
            str(name),
            z=near if rank == 0 else rng.uniform(2.8, 5.5),
            across=float(slots[rank]),
        )
        for rank, name in enumerate(names)
    ]


def _crowd(rng: np.random.Generator) -> list[Thing]:
    names = rng.choice(_OBJECTS, int(rng.integers(5, 10)))
    # Even in the logarithm: sizes on the picture spread over a factor of three.
    z = np.exp(rng.uniform(np.log(2.6), np.log(8.0), names.size))
    z[0] = rng.uniform(2.4, 3.2)
    across = rng.uniform(-0.5, 0.5, names.size)
    return [
        _place(rng, str(name), z=float(far), across=float(side))
        for name, far, side in zip(names, z, across, strict=True)
    ]


def _place(rng: np.random.Generator, name: str, *, z: float, across: float) -> Thing:
    kind = KINDS[name]
    width = rng.uniform(*kind.widths)
    return Thing(name, across * z / FOCAL, z, width, width * rng.uniform(*kind.aspect))
