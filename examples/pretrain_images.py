# SPDX-License-Identifier: Apache-2.0
"""Images of `pretrain_backbone.py`: read, decoded once, and augmented in batches on the device."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from tqdm import tqdm

from sfa_peft import SFAError
from sfa_peft.dense import IMAGENET_MEAN, IMAGENET_STD, as_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
GREY = (0.299, 0.587, 0.114)


@dataclass
class ImageSet:
    """Encoded images of one split: paths or file contents, their class ids, and class names."""

    files: Sequence[Any]
    labels: np.ndarray
    names: list[str]

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise SFAError("a split holds no images")
        if self.labels.min() < 0 or self.labels.max() >= len(self.names):
            span = f"{self.labels.min()} to {self.labels.max()}"
            raise SFAError(f"class ids run from {span}, but there are {len(self.names)} names")


def load_images(folder: Path) -> dict[str, ImageSet]:
    """Return the splits `train` and `val` of a folder in one of three layouts.

    * `<split>/<class>/*.jpg|png|webp`
    * `<split>.npz` with `data` (all encoded files end to end, uint8), `offset` (N + 1 places in
      it), `label` (N class ids) and `name` (one per class)
    * `<split>*.parquet` with the columns `image` (with `bytes`) and `label`
    """
    loaded = {}
    for split, words in SPLITS.items():
        for read in (_read_npz, _read_parquet, _read_folder):
            found = next((s for word in words if (s := read(folder, word))), None)
            if found is not None:
                loaded[split] = found
                break
        else:
            raise SFAError(
                f"`{folder}`: no split {' or '.join(words)}; expected <split>/<class>/*.jpg, "
                "<split>.npz or <split>*.parquet"
            )
    if loaded["train"].names != loaded["val"].names:
        raise SFAError(f"`{folder}`: the two splits have different class names")
    return loaded


def _read_npz(folder: Path, split: str) -> ImageSet | None:
    path = folder / f"{split}.npz"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        if missing := {"data", "offset", "label", "name"} - set(arrays.files):
            raise SFAError(f"`{path}`: no {sorted(missing)} among {sorted(arrays.files)}")
        data, offset = memoryview(arrays["data"]), arrays["offset"].tolist()
        labels, names = arrays["label"].astype(np.int64), arrays["name"].tolist()
    if len(offset) != len(labels) + 1 or offset[-1] != len(data):
        raise SFAError(f"`{path}`: `offset` needs one place per label and the end of `data`")
    return ImageSet([data[a:b] for a, b in pairwise(offset)], labels, names)


def _read_parquet(folder: Path, split: str) -> ImageSet | None:
    paths = sorted(map(str, folder.glob(f"{split}*.parquet")))
    if not paths:
        return None
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=paths, split="train")
    if missing := {"image", "label"} - set(rows.column_names):
        raise SFAError(f"`{paths[0]}`: no {sorted(missing)} among {sorted(rows.column_names)}")
    files = rows.cast_column("image", ImageFeature(decode=False))["image"]
    labels = np.array(rows["label"], np.int64)
    names = getattr(rows.features["label"], "names", None)
    return ImageSet(
        [f["bytes"] or Path(f["path"]) for f in files],
        labels,
        names or [str(i) for i in range(labels.max() + 1)],
    )


def _read_folder(folder: Path, split: str) -> ImageSet | None:
    names = sorted(p.name for p in (folder / split).glob("*") if p.is_dir())
    if not names:
        return None
    files = [
        (path, i)
        for i, name in enumerate(names)
        for path in sorted((folder / split / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    return ImageSet([path for path, _ in files], np.array([i for _, i in files], np.int64), names)


def read_image(images: ImageSet, index: int) -> Image.Image:
    """Return one image in RGB."""
    file = images.files[index]
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            return as_image(image)
    except (OSError, SFAError) as error:
        where = file if isinstance(file, Path) else f"image {index}"
        raise SFAError(f"`{where}`: cannot be decoded: {error}") from error


def stored_side(images: ImageSet, image_size: int) -> int:
    """Return the side to keep images at: their own, but little more than the training crop."""
    return min(*read_image(images, 0).size, round(1.125 * image_size))


def decode(images: ImageSet, side: int, num_workers: int) -> torch.Tensor:
    """Return all images as squares, uint8 `(N, 3, side, side)`: the middle, resized if need be."""
    decoded = torch.empty(len(images.files), 3, side, side, dtype=torch.uint8)

    def put(index: int) -> None:
        rgb = read_image(images, index)
        edge = min(rgb.size)
        left, top = (rgb.width - edge) // 2, (rgb.height - edge) // 2
        if rgb.size != (side, side):
            box = (left, top, left + edge, top + edge)
            rgb = rgb.resize((side, side), Image.Resampling.BICUBIC, box, reducing_gap=2.0)
        decoded[index] = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)

    count = len(decoded)
    with ThreadPoolExecutor(num_workers) as pool:
        for _ in tqdm(pool.map(put, range(count)), "decode", total=count, mininterval=1):
            pass
    return decoded


def augment(images: torch.Tensor, size: int, min_area: float, jitter: float) -> torch.Tensor:
    """Crop, mirror and recolour at random: uint8 `(B, 3, h, w)` to floats `(B, 3, size, size)`."""
    cropped = random_crop(images.float() / 255, size, min_area)
    return normalise(colour_jitter(cropped, jitter) if jitter else cropped)


def random_crop(images: torch.Tensor, size: int, min_area: float) -> torch.Tensor:
    """Return a part of each image, mirrored or not, of `min_area` to 1 of its area."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(len(images), device=images.device).uniform_(low, high)

    area, ratio = uniform(min_area, 1), uniform(np.log(3 / 4), np.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    corners = torch.zeros(len(images), 2, 3, device=images.device)
    corners[:, 0, 0], corners[:, 0, 2] = width * mirror, uniform(-1, 1) * (1 - width)
    corners[:, 1, 1], corners[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = functional.affine_grid(corners, [len(images), 3, size, size], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def colour_jitter(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Change brightness, contrast and saturation of each image by factors around 1."""
    low, high = 1 - strength, 1 + strength
    shape = (3, len(images), 1, 1, 1)
    factors = torch.empty(shape, device=images.device).uniform_(low, high)
    weights = torch.tensor(GREY, device=images.device)[:, None, None]
    images = images * factors[0]
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = mean + (images - mean) * factors[1]
    grey = (images * weights).sum(1, keepdim=True)
    return (grey + (images - grey) * factors[2]).clamp(0, 1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Return images of 0 to 1 by ImageNet's mean and deviation, as the examples feed backbones."""
    mean, std = (torch.tensor(x, device=images.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


def mix(
    images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image with its mirror place in the batch (mixup), or paste a part (cutmix).

    Args:
        images: `(B, 3, H, W)`.
        targets: Share of each class, `(B, classes)`.
        mixup: Alpha of the Beta distribution of the blend; 0 for never.
        cutmix: Alpha for the pasted area; 0 for never. If both are on, each has every second batch.
    """
    if not mixup and not cutmix:
        return images, targets
    paste = bool(cutmix) and (not mixup or torch.rand(()) < 0.5)
    alpha = cutmix if paste else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = images.flip(0)
    if paste:
        height, width = images.shape[2:]
        rows, columns = (round(n * (1 - share) ** 0.5) for n in (height, width))
        top, left = (
            int(torch.randint(0, n - m + 1, ())) for n, m in ((height, rows), (width, columns))
        )
        part = (..., slice(top, top + rows), slice(left, left + columns))
        images = images.clone()
        images[part] = other[part]
        share = 1 - rows * columns / (height * width)
    else:
        images = torch.lerp(other, images, share)
    return images, torch.lerp(targets.flip(0), targets, share)
