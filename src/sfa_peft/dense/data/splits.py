# SPDX-License-Identifier: Apache-2.0
"""Splits of data: sequences of image and target, decoded on access.

A file that cannot be decoded is named in the error.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from sfa_peft.errors import SFAError

TargetT = TypeVar("TargetT")
TargetT_co = TypeVar("TargetT_co", covariant=True)


class Split(Protocol[TargetT_co]):
    """One split: a sequence of pairs of a PIL image and what is to be learned of it.

    The target is a mask, a PIL image whose stored numbers are class ids; or depth, floating-point
    metres ``(H, W)`` with 0 where not measured; or :class:`~sfa_peft.dense.data.objects.Objects`.
    """

    def __len__(self) -> int:
        """Return the number of pairs."""
        ...

    def __getitem__(self, index: int) -> tuple[Image.Image, TargetT_co]:
        """Return pair ``index``: the image and its target."""
        ...


SegmentationSplit = Split[Image.Image]


class TransformedSplit(Dataset[dict[str, Any]]):
    """A split with a transform over it, ready for a DataLoader or Trainer.

    The randomness of item ``i`` depends on the seed, the epoch and ``i`` only. Trainer announces
    the epoch in single-process training; elsewhere call :meth:`set_epoch`, or all epochs are
    augmented alike.

    Args:
        split: Pairs of image and target.
        transform: Called with image, target and a generator.
        seed: Seed of the augmentation, 0 or more.
    """

    def __init__(
        self,
        split: Split[TargetT],
        transform: Callable[[Image.Image, TargetT, np.random.Generator], dict[str, Any]],
        *,
        seed: int = 0,
    ) -> None:
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return what the transform makes of pair ``index``.

        Args:
            index: In ``[0, len)``.

        Returns:
            ``pixel_values`` and ``labels``.

        Raises:
            SFAError: If a file is corrupt, or image and target do not fit together.
        """
        image, target = self.split[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        try:
            return self.transform(image, target, rng)
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


class SubSplit(Generic[TargetT]):
    """Some pairs of another split.

    Args:
        split: The other split.
        indices: Which of its pairs, in this order.
    """

    def __init__(self, split: Split[TargetT], indices: Sequence[int]) -> None:
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, TargetT]:
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
