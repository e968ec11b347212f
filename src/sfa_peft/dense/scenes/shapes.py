# SPDX-License-Identifier: Apache-2.0
"""Outlines and surfaces of the things that stand in a rendered scene.

Shapes come in pairs of like outline (wall and crate, ball and bush, cone and pine) and textures are
shared across pairs, so neither outline, texture nor colour alone tells the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.scenes.textures import (
    Floats,
    Texture,
    bricks,
    checks,
    leaves,
    stripes,
    value_noise,
)


@dataclass(frozen=True)
class Surface:
    """What one thing shows to the camera, on the pixels of its bounding box.

    Attributes:
        mask: Covered pixels, bool ``(h, w)``.
        shade: Brightness factor from the light, float32 ``(h, w)``, about 0.3 to 1.2.
        s: First texture coordinate in metres, float32 ``(h, w)``.
        t: Second texture coordinate in metres, float32 ``(h, w)``.
        relief: How much nearer than its foot the surface is, metres, float32 ``(h, w)``.
    """

    mask: NDArray[np.bool_]
    shade: Floats
    s: Floats
    t: Floats
    relief: Floats


Shape = Callable[[Floats, Floats, float, float, float, np.random.Generator], Surface]


@dataclass(frozen=True)
class Kind:
    """How one class of things is drawn: its outline, textures and size in metres.

    Attributes:
        shape: Draws the outline and surface.
        textures: One of these is picked per thing.
        widths: Smallest and largest width in metres.
        aspect: Smallest and largest height divided by width.
    """

    shape: Shape
    textures: tuple[Texture, ...]
    widths: tuple[float, float]
    aspect: tuple[float, float]


def _flat(
    x: Floats, y: Floats, w: float, h: float, light: float, rng: np.random.Generator
) -> Surface:
    mask = (np.abs(x) <= w / 2) & (y <= h)
    shade = np.full(x.shape, 0.8 + 0.2 * light * rng.choice((-1.0, 1.0)), np.float32)
    return Surface(mask, shade, x, y, np.zeros_like(x))


def _cuboid(
    x: Floats, y: Floats, w: float, h: float, light: float, rng: np.random.Generator
) -> Surface:
    # The box is its front face pushed along (run, rise): front, top and one side are visible.
    turned = rng.choice((-1.0, 1.0))
    x = (x * turned).astype(np.float32)
    run, rise = w * rng.uniform(0.2, 0.35), h * rng.uniform(0.12, 0.22)
    right, top = w / 2 - run, h - rise
    along, up = x - right, y - top
    front = (np.abs(x + run / 2) <= (w - run) / 2) & (y <= top)
    side = (along > 0) & (along <= run) & (np.abs(y - along * rise / run - top / 2) <= top / 2)
    shifted = x - up * run / rise
    lid = (up > 0) & (up <= rise) & (np.abs(shifted + run / 2) <= (w - run) / 2)
    shade = np.where(side, 0.65 + 0.25 * light * turned, np.where(lid, 1.15, 0.85))
    s = np.where(side, along * 2, np.where(lid, shifted, x))
    t = np.where(side, y - along * rise / run, np.where(lid, top + up * 2, y))
    relief = np.where(front, np.float32(run), np.float32(0))
    return Surface(
        front | side | lid,
        shade.astype(np.float32),
        *(a.astype(np.float32) for a in (s, t, relief)),
    )


def _round(x: Floats, y: Floats, w: float, h: float, light: float) -> tuple[Floats, Floats, Floats]:
    # Outward normals of the ellipsoid that fills the box; depth component 0 on the outline.
    across, up = x / (w / 2), y / (h / 2) - 1
    out = np.sqrt(np.clip(1 - across * across - up * up, 0, 1))
    return across, up, out


def _sphere(
    x: Floats, y: Floats, w: float, h: float, light: float, rng: np.random.Generator
) -> Surface:
    across, up, out = _round(x, y, w, h, light)
    shade = np.clip(0.45 + 0.35 * (across * light + up * 0.8 + out * 0.6), 0.25, 1.2)
    roll = rng.uniform(-0.9, 0.9)
    cos, sin = np.float32(np.cos(roll)), np.float32(np.sin(roll))
    s = np.arctan2(across * cos - up * sin, out + 1e-6) * (w / 2)
    t = np.arcsin(np.clip(across * sin + up * cos, -1, 1)) * (h / 2)
    mask = across * across + up * up <= 1
    return Surface(mask, *(a.astype(np.float32) for a in (shade, s, t, out * (w / 2))))


def _blob(
    x: Floats, y: Floats, w: float, h: float, light: float, rng: np.random.Generator
) -> Surface:
    across, up, out = _round(x, y, w, h, light)
    angle = np.arctan2(up, across).astype(np.float32)
    ragged = value_noise(angle * 2.5 + 8, np.zeros_like(angle), rng)
    mask = across * across + up * up <= (0.72 + 0.28 * ragged) ** 2
    shade = np.clip(0.6 + 0.25 * (across * light + up * 0.8 + out * 0.4), 0.3, 1.2)
    return Surface(mask, shade.astype(np.float32), x, y, (out * (w / 4)).astype(np.float32))


def _cone(
    x: Floats, y: Floats, w: float, h: float, light: float, rng: np.random.Generator
) -> Surface:
    half = np.maximum(w / 2 * (1 - y / h), 1e-3).astype(np.float32)
    across = np.clip(x / half, -1, 1)
    out = np.sqrt(1 - across * across)
    shade = np.clip(0.6 + 0.35 * across * light + 0.25 * out, 0.3, 1.2)
    # A camera above the rim sees the rings of a cone sag towards the middle.
    t = y + 0.12 * half * out
    mask = (np.abs(x) <= half) & (y <= h)
    return Surface(
        mask, *(a.astype(np.float32) for a in (shade, np.arcsin(across) * half, t, out * half))
    )


def _tiers(
    x: Floats, y: Floats, w: float, h: float, light: float, rng: np.random.Generator
) -> Surface:
    trunk = 0.14
    crown = (y / h - trunk) / (1 - trunk)
    saw = (1 - crown) * rng.integers(3, 5)
    half = w / 2 * ((1 - crown) * 0.45 + (saw - np.floor(saw)) * 0.5 * (1 - crown * 0.7))
    mask = np.where(crown > 0, np.abs(x) <= half, np.abs(x) <= 0.07 * w) & (y <= h)
    shade = np.clip(0.75 + 0.4 * light * x / w - 0.25 * (saw - np.floor(saw)), 0.3, 1.2)
    return Surface(mask, shade.astype(np.float32), x, y, np.zeros_like(x))


# By class name. Crate, ball and cone share their textures, and so do bush and pine.
KINDS: dict[str, Kind] = {
    "wall": Kind(_flat, (bricks,), (4.0, 8.0), (0.4, 0.7)),
    "crate": Kind(_cuboid, (stripes, checks), (1.2, 1.9), (0.75, 1.1)),
    "ball": Kind(_sphere, (stripes, checks), (1.2, 1.8), (1.0, 1.0)),
    "bush": Kind(_blob, (leaves,), (1.3, 2.0), (0.8, 1.05)),
    "cone": Kind(_cone, (stripes, checks), (1.2, 1.7), (1.1, 1.6)),
    "pine": Kind(_tiers, (leaves,), (1.3, 2.0), (1.2, 1.7)),
}
