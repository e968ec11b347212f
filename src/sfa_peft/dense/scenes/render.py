# SPDX-License-Identifier: Apache-2.0
"""Rendered outdoor scenes with exact class, depth and instance maps, made on the fly from a seed.

Every random number comes from a generator seeded by the caller: a scene is a pure function of its
seed and size, and no global random state is read or changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sfa_peft.dense.data.transforms import Transform, to_tensors
from sfa_peft.dense.scenes.layout import FOCAL, Thing, place_things
from sfa_peft.dense.scenes.shapes import KINDS, Kind
from sfa_peft.dense.scenes.textures import (
    Floats,
    checks,
    leaves,
    random_colours,
    slanted,
    value_noise,
)
from sfa_peft.errors import SFAError

CLASS_NAMES: tuple[str, ...] = ("sky", "ground", *KINDS)
SKY, GROUND = 0, 1
MIN_SIZE = 16
MAX_DEPTH = 40.0  # Metres; the ground is cut here, just below the horizon.

_CAMERA_HEIGHT = 1.5  # Metres above the ground.
_SCENES_PER_SEED = 2**32


@dataclass(frozen=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: RGB, uint8 ``(H, W, 3)``.
        classes: Index into ``CLASS_NAMES``, uint8 ``(H, W)``.
        depth: Distance along the camera axis in metres, float32 ``(H, W)``, up to ``MAX_DEPTH``;
            0 where there is none (sky).
        instances: 1, 2, ... per thing, uint16 ``(H, W)``; 0 on sky and ground.
    """

    image: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    depth: NDArray[np.float32]
    instances: NDArray[np.uint16]


@dataclass
class _Canvas:
    # The scene while it is painted; horizon is a row, focal is in pixels, light in [-1, 1].
    image: Floats
    classes: NDArray[np.uint8]
    depth: Floats
    instances: NDArray[np.uint16]
    horizon: float
    focal: float
    light: float

    @property
    def size(self) -> int:
        return self.image.shape[0]


def render_scene(seed: int, size: int = 64, *, crowded: bool = False) -> Scene:
    """Render one square scene: sky, a ground plane in perspective, and things that stand on it.

    Colours are random everywhere. Crates, balls and cones share their textures, so do bushes and
    pines; each of those is shaped like one of the other group.

    Args:
        seed: Seed of the scene, 0 or more.
        size: Side in pixels, ``MIN_SIZE`` or more.
        crowded: By default no class but the wall comes twice and things stand apart, 3 to 7 of
            them; else 5 to 11 of any class stand wherever they fall, near and far.

    Returns:
        The scene; the same for the same arguments.

    Raises:
        SFAError: If the seed is negative or the size too small.
    """
    if seed < 0:
        raise SFAError(f"a scene needs a seed of 0 or more, got {seed}")
    if size < MIN_SIZE:
        raise SFAError(f"a scene needs a size of at least {MIN_SIZE} pixels, got {size}")
    rng = np.random.default_rng(seed)
    canvas = _Canvas(
        image=np.empty((size, size, 3), np.float32),
        classes=np.zeros((size, size), np.uint8),
        depth=np.zeros((size, size), np.float32),
        instances=np.zeros((size, size), np.uint16),
        horizon=size * rng.uniform(0.28, 0.45),
        focal=size * FOCAL,
        light=rng.uniform(-1, 1),
    )
    _paint_sky(canvas, rng)
    _paint_ground(canvas, rng)
    things = place_things(rng, crowded=crowded)
    for thing in things:
        _paint_shadow(canvas, thing)
    for number, thing in enumerate(sorted(things, key=lambda thing: -thing.z), start=1):
        _paint_thing(canvas, thing, number, rng)
    return Scene(_expose(canvas, rng), canvas.classes, canvas.depth, canvas.instances)


def _paint_sky(canvas: _Canvas, rng: np.random.Generator) -> None:
    rows, columns = np.mgrid[: canvas.size, : canvas.size].astype(np.float32) / canvas.size
    clouds = value_noise(columns * 4, rows * 9, rng) * rng.uniform(0, 1)
    mix = (0.4 * clouds + 0.6 * rows)[..., None]
    first, second = random_colours(rng)
    canvas.image[:] = first * mix + second * (1 - mix)


def _paint_ground(canvas: _Canvas, rng: np.random.Generator) -> None:
    nearest_row = canvas.horizon + canvas.focal * _CAMERA_HEIGHT / MAX_DEPTH
    first_row = int(np.ceil(nearest_row - 0.5))
    rows, columns = np.mgrid[first_row : canvas.size, : canvas.size].astype(np.float32) + 0.5
    z = (canvas.focal * _CAMERA_HEIGHT / (rows - canvas.horizon)).astype(np.float32)
    x = (columns - canvas.size / 2) * z / np.float32(canvas.focal)
    texture = (checks, leaves, slanted)[rng.integers(3)]
    mix = texture(x * 0.5, z * 0.5, rng)
    # Far texture is finer than a pixel: fade it to its mean instead of drawing aliases.
    mix = (0.5 + (mix - 0.5) * np.exp(-z / 8) * rng.uniform(0.5, 1))[..., None]
    first, second = random_colours(rng)
    canvas.image[first_row:] = first * mix + second * (1 - mix)
    canvas.classes[first_row:] = GROUND
    canvas.depth[first_row:] = z


def _paint_shadow(canvas: _Canvas, thing: Thing) -> None:
    # An ellipse on the ground at the foot, drawn out away from the light.
    scale = canvas.focal / thing.z
    row = canvas.horizon + scale * _CAMERA_HEIGHT
    column = canvas.size / 2 + scale * (thing.x - 0.5 * canvas.light * thing.w)
    wide, high = 0.75 * thing.w * scale, 0.22 * min(thing.w, 2.0) * scale
    rows = (np.arange(canvas.size, dtype=np.float32)[:, None] + 0.5 - row) / high
    columns = (np.arange(canvas.size, dtype=np.float32)[None] + 0.5 - column) / wide
    shadow = (rows * rows + columns * columns < 1) & (canvas.classes == GROUND)
    canvas.image[shadow] *= 0.5


def _paint_thing(canvas: _Canvas, thing: Thing, number: int, rng: np.random.Generator) -> None:
    kind: Kind = KINDS[thing.name]
    scale = canvas.focal / thing.z
    foot = canvas.horizon + scale * _CAMERA_HEIGHT
    middle = canvas.size / 2 + scale * thing.x
    top, bottom = _clip(foot - scale * thing.h, foot, canvas.size)
    left, right = _clip(middle - scale * thing.w / 2, middle + scale * thing.w / 2, canvas.size)
    texture = kind.textures[rng.integers(len(kind.textures))]
    colours = random_colours(rng)
    if top >= bottom or left >= right:
        return
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
    x, y = (columns - middle) / scale, (foot - rows) / scale
    surface = kind.shape(
        x.astype(np.float32), y.astype(np.float32), thing.w, thing.h, canvas.light, rng
    )
    mix = texture(surface.s, surface.t, rng)[..., None]
    colour = (colours[0] * mix + colours[1] * (1 - mix)) * surface.shade[..., None]
    box = (slice(top, bottom), slice(left, right))
    mask = surface.mask
    canvas.image[box][mask] = colour[mask]
    canvas.classes[box][mask] = CLASS_NAMES.index(thing.name)
    canvas.instances[box][mask] = number
    canvas.depth[box][mask] = (thing.z - surface.relief)[mask]


def _clip(low: float, high: float, size: int) -> tuple[int, int]:
    return max(int(np.floor(low)), 0), min(int(np.ceil(high)), size)


def _expose(canvas: _Canvas, rng: np.random.Generator) -> NDArray[np.uint8]:
    # Haze, a lighting gradient across the picture, then sensor noise.
    haze = 1 - np.exp(-canvas.depth * rng.uniform(0, 0.06))
    image = (
        canvas.image + (rng.uniform(90, 220, 3).astype(np.float32) - canvas.image) * haze[..., None]
    )
    rows, columns = np.mgrid[: canvas.size, : canvas.size].astype(np.float32) / canvas.size - 0.5
    slope = rng.uniform(-0.6, 0.6, 2)
    image *= (rng.uniform(0.85, 1.25) + slope[0] * rows + slope[1] * columns)[..., None]
    # As of a camera at night: a backbone that was trained on clean photographs has to adapt.
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + noise * rng.uniform(12, 32), 0, 255).astype(np.uint8)


class SceneDataset(Dataset[dict[str, torch.Tensor]]):
    """Rendered scenes as a dataset; item ``i`` depends on the seed and ``i`` only.

    Two datasets of different seeds share no scene, so seed 0 can be for training and seed 1 for
    validation. Items hold ``pixel_values``, float32 ``(3, H, W)``, ImageNet-normalised, ``labels``,
    int64 ``(H, W)`` in ``[0, len(CLASS_NAMES))``, and, if asked for, ``depth``, metres,
    float32 ``(H, W)``.

    Args:
        length: Number of scenes, 1 or more.
        size: Side of a scene in pixels.
        seed: Picks the sequence of scenes, 0 or more.
        transform: Joint augmentation of image and labels; by default none, only normalisation.
        with_depth: Add ``depth`` to the items; not with a transform, which would not move it along.

    Raises:
        SFAError: If the length is below 1, the seed is negative, or both a transform and depth are
            asked for.
    """

    def __init__(
        self,
        length: int,
        *,
        size: int = 64,
        seed: int = 0,
        transform: Transform | None = None,
        with_depth: bool = False,
    ) -> None:
        if not 1 <= length <= _SCENES_PER_SEED or seed < 0:
            raise SFAError(f"need length >= 1 and seed >= 0, got length={length}, seed={seed}")
        if transform is not None and with_depth:
            raise SFAError(
                "with_depth=True and a transform: a transform moves image and labels only"
            )
        self.length = length
        self.size = size
        self.seed = seed
        self.transform = transform
        self.with_depth = with_depth

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.length

    def scene(self, index: int) -> Scene:
        """Return scene ``index`` as arrays.

        Args:
            index: In ``[0, length)``.

        Returns:
            The scene.

        Raises:
            IndexError: If the index is out of range.
        """
        return render_scene(self.scene_seed(index), self.size)

    def scene_seed(self, index: int) -> int:
        """Return the seed that :func:`render_scene` makes scene ``index`` of; raises IndexError."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of a dataset of {self.length}")
        return self.seed * _SCENES_PER_SEED + index

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return scene ``index`` as tensors; see the class for keys, shapes and dtypes."""
        scene = self.scene(index)
        if self.transform is not None:
            # A stream of its own: the transform must not repeat the draws the scene was made of.
            rng = np.random.default_rng((self.seed, index, 1))
            return self.transform(scene.image, scene.classes, rng)
        item = to_tensors(scene.image, scene.classes)
        if self.with_depth:
            item["depth"] = torch.from_numpy(scene.depth)
        return item
