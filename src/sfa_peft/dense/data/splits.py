# SPDX-License-Identifier: Apache-2.0
"""Splits of segmentation data: sequences of image and mask, decoded on access.

A file that cannot be decoded is named in the error.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from sfa_peft.dense.data.transforms import Transform
from sfa_peft.errors import SFAError


class SegmentationSplit(Protocol):
    """One split: a sequence of ``(image, mask)`` pairs of PIL images."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return pair ``index``: the image, and the mask whose stored numbers are class ids."""
        ...


class TransformedSplit(Dataset[dict[str, torch.Tensor]]):
    """A split with a transform over it, ready for a DataLoader or Trainer.

    The randomness of item ``i`` depends on the seed, the epoch and ``i`` only. Trainer announces
    the epoch in single-process training; elsewhere call :meth:`set_epoch`, or all epochs are
    augmented alike.

    Args:
        split: Pairs of image and mask.
        transform: Called with image, mask and a generator.
        seed: Seed of the augmentation, 0 or more.
    """

    def __init__(self, split: SegmentationSplit, transform: Transform, *, seed: int = 0) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose augmentation to draw."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return what the transform makes of pair ``index``.

        Args:
            index: In ``[0, len)``.

        Returns:
            ``pixel_values`` and ``labels``.

        Raises:
            SFAError: If a file is corrupt, or image and mask do not fit together.
        """
        image, mask = self.split[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        try:
            return self.transform(image, mask, rng)
        except SFAError as error:
            raise SFAError(f"pair {index}: {error}") from error


class PairFolder:
    """Pairs of image and mask files.

    Args:
        pairs: Path of the image and of the mask.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        self.pairs = tuple(pairs)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Decode pair ``index``; raises SFAError naming a file that is corrupt."""
        image, mask = self.pairs[index]
        return ImageOps.exif_transpose(_decode(image, str(image))), _decode(mask, str(mask))


class LibrarySplit:
    """A split of the ``datasets`` library.

    Args:
        rows: Dataset whose two columns are undecoded images.
        image_column: Column of the images.
        label_column: Column of the masks.
    """

    def __init__(self, rows: Any, image_column: str, label_column: str) -> None:
        self.rows = rows
        self.columns = (image_column, label_column)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Decode pair ``index``; raises SFAError naming a file that is corrupt."""
        row = self.rows[index]
        image, mask = (self._decode(row[column], column, index) for column in self.columns)
        return ImageOps.exif_transpose(image), mask

    def _decode(self, cell: Mapping[str, Any] | None, column: str, index: int) -> Image.Image:
        if cell is None:
            raise SFAError(f"row {index} has no `{column}`")
        name = f"{cell['path'] or 'embedded image'} (row {index}, column `{column}`)"
        return _decode(io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]), name)


class SubSplit:
    """Some pairs of another split.

    Args:
        split: The other split.
        indices: Which of its pairs, in this order.
    """

    def __init__(self, split: SegmentationSplit, indices: Sequence[int]) -> None:
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Decode the pair at ``indices[index]``."""
        return self.split[self.indices[index]]


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        # PIL reports broken files by any of these, and not always with the file's name.
        raise SFAError(f"`{name}`: cannot read this image: {error}") from error
