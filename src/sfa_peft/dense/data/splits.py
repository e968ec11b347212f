# SPDX-License-Identifier: Apache-2.0
"""Splits of data: sequences of image and target, decoded on access.

A file that cannot be decoded is named in the error.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from sfa_peft.dense.data.files import decode, read_image, read_mask, upright
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


def name_of(split: Split[Any], index: int) -> str:
    """Return what errors call a pair: the file of its target where the split knows it."""
    named = getattr(split, "name", None)
    return f"pair {index}" if named is None else named(index)


@dataclass
class Found(Generic[TargetT]):
    """What the reader of one layout found.

    Attributes:
        splits: By name, ``train``, ``validation`` or ``test``.
        class_names: Name of class id 0, 1, ...; none for depth.
        missing: What is not there or not usable though it should be, one line each.
        notes: What the data set itself leaves out, one line each.
    """

    splits: dict[str, Split[TargetT]]
    class_names: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
            raise SFAError(f"{name_of(self.split, index)}: {error}") from error


class PairFolder(Generic[TargetT]):
    """Pairs of an image file and a file of its target.

    Args:
        pairs: Path of the image and of the target.
        read_target: Reads the target; by default a mask, ids as they are stored.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        read_target: Callable[[Path], TargetT] = read_mask,
    ) -> None:
        self.pairs = tuple(pairs)
        self.read_target = read_target

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return the file of the target of pair ``index``."""
        return f"`{self.pairs[index][1]}`"

    def __getitem__(self, index: int) -> tuple[Image.Image, TargetT]:
        """Decode pair ``index``; raises SFAError naming a file that is corrupt or does not fit."""
        image_file, target_file = self.pairs[index]
        image, target = read_image(image_file), self.read_target(target_file)
        size = target.size if isinstance(target, Image.Image) else np.asarray(target).shape[::-1]
        if size != image.size:
            raise SFAError(
                f"`{target_file}` is {size[0]}x{size[1]}, but its image `{image_file}` "
                f"{image.width}x{image.height} (width x height); they must have one size"
            )
        return image, target


def as_stored(image: Image.Image, name: str) -> Image.Image:
    """Return a decoded mask as it is: what :class:`LibrarySplit` does with it by default."""
    return image


class LibrarySplit(Generic[TargetT]):
    """A split of the ``datasets`` library.

    Args:
        rows: Dataset whose two columns are undecoded images.
        image_column: Column of the images.
        label_column: Column of the masks or of the depth.
        as_target: Makes the target of what is stored there, given what to call it in an error.
    """

    def __init__(
        self,
        rows: Any,
        image_column: str,
        label_column: str,
        as_target: Callable[[Image.Image, str], TargetT] = as_stored,
    ) -> None:
        self.rows = rows
        self.columns = (image_column, label_column)
        self.as_target = as_target

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return file, row and column of the target of pair ``index``."""
        column = self.columns[1]
        return f"`{cell_name(self.rows[index][column], column, index)}`"

    def __getitem__(self, index: int) -> tuple[Image.Image, TargetT]:
        """Decode pair ``index``; raises SFAError naming a file that is corrupt."""
        row = self.rows[index]
        image, stored = (decode_cell(row[column], column, index) for column in self.columns)
        names = [cell_name(row[column], column, index) for column in self.columns]
        return upright(image, names[0]), self.as_target(stored, names[1])


def cell_name(cell: Mapping[str, Any], column: str, index: int) -> str:
    """Return what errors call an undecoded image of the ``datasets`` library."""
    return f"{cell['path'] or 'embedded image'} (row {index}, column `{column}`)"


def decode_cell(cell: Mapping[str, Any] | None, column: str, index: int) -> Image.Image:
    """Decode an undecoded image of the ``datasets`` library; raises SFAError naming it."""
    if cell is None:
        raise SFAError(f"row {index} has no `{column}`")
    source = io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"])
    return decode(source, cell_name(cell, column, index))


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

    def name(self, index: int) -> str:
        """Return what the other split calls the pair at ``indices[index]``."""
        return name_of(self.split, self.indices[index])

    def __getitem__(self, index: int) -> tuple[Image.Image, TargetT]:
        """Decode the pair at ``indices[index]``."""
        return self.split[self.indices[index]]
