# SPDX-License-Identifier: Apache-2.0
"""Images in one folder, masks or depth of the same names in another, as most own data is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sfa_peft.dense.data.files import IMAGE_SUFFIXES
from sfa_peft.dense.data.hf_datasets import split_of
from sfa_peft.dense.data.splits import Found, PairFolder, TargetT
from sfa_peft.errors import SFAError

IMAGES = ("images", "image", "imgs", "img")
TARGETS = {
    "segmentation": ("masks", "mask", "labels", "annotations", "segmentation"),
    "depth": ("depth", "depths", "depth_maps"),
}
_TARGET_SUFFIXES = (".png", ".tif", ".tiff")


def find_pairs(folder: Path, task: str) -> dict[str, tuple[Path, Path]]:
    """Return by split the folders of images and of masks or depth; nothing where there are none.

    Known are ``images/`` beside ``masks/``, each with or without folders of splits in it, and
    ``<split>/images/`` beside ``<split>/masks/``.

    Args:
        folder: It exists.
        task: ``segmentation`` or ``depth``.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for name, place in _places(folder):
        images, targets = _first(place, IMAGES), _first(place, TARGETS[task])
        if images is None or targets is None:
            continue
        inside = {split_of(p.name): p for p in sorted(images.iterdir()) if p.is_dir()}
        for split, own in inside.items():
            if split is not None and name is None and (targets / own.name).is_dir():
                found.setdefault(split, (own, targets / own.name))
        if not found or name is not None:
            found.setdefault(name or "train", (images, targets))
    return found


def pair_folders(folder: Path, task: str, read_target: Callable[[Path], TargetT]) -> Found[TargetT]:
    """Read images and masks, or depth, that have the same names.

    Args:
        folder: See :func:`find_pairs`.
        task: ``segmentation`` or ``depth``.
        read_target: Reads a file of the target.

    Raises:
        SFAError: If there are no such folders, no images, or an image has no target.
    """
    pairs = find_pairs(folder, task)
    if not pairs:
        names = " or ".join(TARGETS[task][:2])
        raise SFAError(f"`{folder}`: no folder images beside one named {names}")
    return Found({s: PairFolder(_matched(*both), read_target) for s, both in pairs.items()})


def _places(folder: Path) -> Iterator[tuple[str | None, Path]]:
    """Yield the folder itself, and those in it that are named after a split."""
    yield None, folder
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        split = split_of(place.name)
        if split is not None:
            yield split, place


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _matched(images: Path, targets: Path) -> list[tuple[Path, Path]]:
    found = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise SFAError(f"`{images}`: no {' or '.join(IMAGE_SUFFIXES)} files")
    by_stem = {p.stem: p for p in targets.iterdir() if p.suffix.lower() in _TARGET_SUFFIXES}
    pairs, missing = [], []
    for image in found:
        # `street_mask.png` and `street.png` both belong to `street.jpg`.
        ends = ("", f"_{targets.parent.name}", "_mask", "_label", "_depth")
        target = next((by_stem[image.stem + e] for e in ends if image.stem + e in by_stem), None)
        if target is None:
            missing.append(image.name)
        else:
            pairs.append((image, target))
    if missing:
        raise SFAError(
            f"`{targets}`: {len(missing)} of {len(found)} images have no file of their name there, "
            f"first `{missing[0]}`"
        )
    return pairs
