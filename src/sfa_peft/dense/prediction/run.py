# SPDX-License-Identifier: Apache-2.0
"""`predict`: from pictures of any size to results at their own size, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfa_peft.dense.data.transforms import ImageLike
from sfa_peft.dense.prediction.preprocessing import Size, as_picture
from sfa_peft.dense.prediction.processors import TaskProcessor, task_processor
from sfa_peft.dense.prediction.spec import spec_of
from sfa_peft.errors import SFAError

Picture = str | Path | ImageLike


def predict(
    task: Any,
    images: Picture | Iterable[Picture],
    *,
    batch_size: int = 8,
    threshold: float = 0.5,
    device: str | torch.device | None = None,
) -> list[Any]:
    """Return what a task's model says of pictures, each at its own size.

    Pictures go through the preprocessing that the evaluation of the training had. Those that come
    to one size make a batch.

    Args:
        task: Folder of a task, or what ``sfa_peft.load_task`` returned.
        images: One picture or several: files, PIL images, or uint8 ``(H, W, 3)``. Files are
            turned upright as their EXIF orientation says, and so are PIL images.
        batch_size: Pictures in a batch at most.
        threshold: Of objects: those of a lower score are left out.
        device: Where to compute; by default where the model is.

    Returns:
        One result for each picture. Semantic segmentation: class ids, int64 ``(H, W)``. Depth:
        metres, float32 ``(H, W)``; 0 where nothing is said (outside of KITTI's crop). Detection: a
        dict of ``scores`` ``(N,)``, ``labels`` ``(N,)`` and ``boxes`` ``(N, 4)``, left, top, right
        and bottom in pixels, by falling score. Instances: the same with ``masks``, bool
        ``(N, H, W)``.

    Raises:
        SFAError: If the folder holds no task, the model does not know its task or is in training
            mode, or a picture cannot be used.
    """
    model = load(task) if isinstance(task, (str, Path)) else task
    if model.training:
        raise SFAError("the model is in training mode; call model.eval() first")
    if batch_size < 1:
        raise SFAError(f"batch_size: expected 1 or more, got {batch_size}")
    if device is not None:
        model.to(device)
    processor = task_processor(spec_of(model))
    single = isinstance(images, (str, Path, Image.Image, np.ndarray))
    pictures = [images] if single else images
    found: dict[int, Any] = {}
    for batch in _batches(processor, pictures, batch_size):
        results = _run(model, processor, [picture for _, picture in batch], threshold)
        found |= dict(zip([index for index, _ in batch], results, strict=True))
    return [found[index] for index in range(len(found))]


def load(folder: str | Path) -> Any:
    """Return the model of a task's folder, by ``sfa_peft.load_task``."""
    import sfa_peft  # which knows adapters; nothing else here does

    return sfa_peft.load_task(folder)


@torch.no_grad()
def _run(
    model: Any, processor: TaskProcessor, pictures: list[Image.Image], threshold: float
) -> list[Any]:
    first = next(model.parameters())
    pixels = processor(pictures)["pixel_values"].to(first.device, first.dtype)
    outputs = model(pixel_values=pixels)
    sizes = [(picture.height, picture.width) for picture in pictures]
    return processor.results(outputs, sizes, threshold)


def _batches(
    processor: TaskProcessor, images: Iterable[Any], batch_size: int
) -> Iterator[list[tuple[int, Image.Image]]]:
    """Yield pictures of one input size with their ordinals; decoded as they are come to."""
    waiting: dict[Size, list[tuple[int, Image.Image]]] = {}
    for index, image in enumerate(images):
        picture = as_picture(image)
        size = processor.preprocessing.frame((picture.height, picture.width)).padded
        batch = waiting.setdefault(size, [])
        batch.append((index, picture))
        if len(batch) == batch_size:
            yield waiting.pop(size)
    yield from waiting.values()
