# SPDX-License-Identifier: Apache-2.0
"""Rendered scenes as the data of four tasks, to be wrapped with that task's transform."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sfa_peft.dense.data.objects import Objects, objects_of_masks
from sfa_peft.dense.scenes.render import CLASS_NAMES, GROUND, Scene, SceneDataset, render_scene
from sfa_peft.errors import SFAError

TASKS: tuple[str, ...] = ("segmentation", "depth", "detection", "instances")
THING_NAMES: tuple[str, ...] = CLASS_NAMES[GROUND + 1 :]


class SceneSplit:
    """Rendered scenes as a split: a sequence of ``(image, target)`` that depends on the seed only.

    The target is, by task,

    * ``segmentation``: a PIL image of mode L, ids of ``CLASS_NAMES``;
    * ``depth``: metres along the camera axis, float32 ``(H, W)``, 0 on the sky, up to
      ``MAX_DEPTH``;
    * ``detection``: :class:`~sfa_peft.dense.data.objects.Objects`, classes of ``THING_NAMES``,
      boxes around what is visible;
    * ``instances``: the same with masks of what is visible.

    Two splits of different seeds share no scene. As TransformedSplit takes them::

        TransformedSplit(SceneSplit(400, "detection"), ObjectScaleCrop(64))

    Args:
        length: Number of scenes, 1 or more.
        task: One of ``TASKS``.
        size: Side of a scene in pixels.
        seed: Picks the sequence of scenes, 0 or more.
        crowded: Several things of a class, near and far, one before the other; see
            :func:`~sfa_peft.dense.scenes.render.render_scene`. By default so where objects are
            told apart.
        min_visible: Objects of which less is visible are left out, as share of the image's pixels.

    Raises:
        SFAError: If a number is out of its range or there is no such task.
    """

    def __init__(
        self,
        length: int,
        task: str = "segmentation",
        *,
        size: int = 64,
        seed: int = 0,
        crowded: bool | None = None,
        min_visible: float = 1 / 256,
    ) -> None:
        if task not in TASKS:
            raise SFAError(f"task `{task}`: expected one of {TASKS}")
        if not 0 <= min_visible < 1:
            raise SFAError(f"min_visible must be in [0, 1), got {min_visible}")
        self._scenes = SceneDataset(length, size=size, seed=seed)
        self.task = task
        self.crowded = task in ("detection", "instances") if crowded is None else crowded
        self.min_visible = min_visible

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self._scenes)

    def scene(self, index: int) -> Scene:
        """Return scene ``index`` as arrays; raises IndexError if it is out of range."""
        return render_scene(self._scenes.scene_seed(index), self._scenes.size, crowded=self.crowded)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return the image and the task's target of scene ``index``; see the class."""
        scene = self.scene(index)
        image = Image.fromarray(scene.image)
        if self.task == "segmentation":
            return image, Image.fromarray(scene.classes)
        if self.task == "depth":
            return image, scene.depth
        objects = _objects(scene, self.min_visible, index)
        if self.task == "instances":
            return image, objects
        return image, objects.without_masks()


def _objects(scene: Scene, min_visible: float, image_id: int) -> Objects:
    numbers, first, counts = np.unique(scene.instances, return_index=True, return_counts=True)
    kept = (numbers > 0) & (counts >= max(1, min_visible * scene.instances.size))
    classes = scene.classes.ravel()[first[kept]].astype(np.int64) - (GROUND + 1)
    masks = scene.instances[None] == numbers[kept, None, None]
    return objects_of_masks(masks, classes, image_id=image_id)
