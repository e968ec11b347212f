# SPDX-License-Identifier: Apache-2.0
"""A small classification data set in each layout that `pretrain_backbone.py` reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["dark", "light"]
COUNTS = {"train": 32, "val": 8}


def make_image(split: str, index: int) -> tuple[Image.Image, int]:
    """Return an image of random colours around its class's brightness, and the class id."""
    rng = np.random.default_rng((len(split), index))
    pixels = rng.integers(0, 120, (24, 24 + 4 * (index % 2), 3)) + 120 * (index % 2)
    return Image.fromarray(pixels.astype(np.uint8)), index % 2


def encoded(image: Image.Image, kind: str = "WEBP") -> bytes:
    file = io.BytesIO()
    image.save(file, kind, lossless=True)
    return file.getvalue()


def make_npz(root: Path) -> Path:
    root.mkdir()
    for split, count in COUNTS.items():
        pairs = [make_image(split, i) for i in range(count)]
        files = [encoded(image) for image, _ in pairs]
        np.savez(
            root / f"{split}.npz",
            data=np.frombuffer(b"".join(files), np.uint8),
            offset=np.cumsum([0, *map(len, files)]),
            label=np.array([label for _, label in pairs], np.int16),
            wnid=np.array(["n1", "n2"]),
            name=np.array(NAMES),
        )
    return root


def make_folder(root: Path) -> Path:
    for split, count in COUNTS.items():
        for i in range(count):
            image, label = make_image(split, i)
            path = root / {"val": "validation"}.get(split, split) / NAMES[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def make_parquet(root: Path) -> Path:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    root.mkdir()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    for split, count in COUNTS.items():
        pictures, labels = zip(*(make_image(split, i) for i in range(count)), strict=True)
        rows = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows.to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    return root
