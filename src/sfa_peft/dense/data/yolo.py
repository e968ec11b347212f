# SPDX-License-Identifier: Apache-2.0
"""The layout of ultralytics: `data.yaml`, and a text file of boxes or polygons for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sfa_peft.dense.data.coco import objects_of_entries
from sfa_peft.dense.data.files import IMAGE_SUFFIXES, read_image
from sfa_peft.dense.data.objects import Objects
from sfa_peft.dense.data.splits import Found
from sfa_peft.errors import SFAError

FILES = ("data.yaml", "data.yml", "dataset.yaml")
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def yolo(folder: Path, *, with_masks: bool) -> Found[Objects]:
    """Read ``data.yaml``: class names, and where the images of each split are.

    The labels of ``images/train/a.jpg`` are in ``labels/train/a.txt``, one object a line: its class
    and, in shares of the image, centre, width and height, or the corners of its outline. An image
    without such a file has no objects.

    Args:
        folder: With one of ``FILES`` in it.
        with_masks: Whether masks are wanted beside the boxes; then each line is an outline.

    Returns:
        The splits and the class names.

    Raises:
        SFAError: If the file is none of its kind, or a folder of images is missing.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    content = _read(path)
    names = content.get("names")
    if isinstance(names, Mapping) and all(isinstance(key, int) for key in names):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise SFAError(f"`{path}`: expected names, a list or {{0: name, ...}}, got {names!r:.60}")
    found: Found[Objects] = Found({}, tuple(names))
    for word, split in _SPLITS.items():
        if content.get(word):
            images = _images(folder, content, str(content[word]), path)
            found.splits[split] = YoloObjects(images, found.class_names, with_masks=with_masks)
    return found


class YoloObjects:
    """A split of images and the objects of their text files.

    Args:
        images: Image files.
        class_names: Name of class id 0, 1, ...
        with_masks: Whether masks are wanted.
    """

    def __init__(
        self, images: Sequence[Path], class_names: Sequence[str], *, with_masks: bool
    ) -> None:
        self.images, self.class_names = tuple(images), tuple(class_names)
        self.with_masks = with_masks

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the text file of pair ``index``."""
        return f"`{labels_of(self.images[index])}`"

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        """Decode pair ``index``; raises SFAError naming file and line of what is wrong."""
        path, image = labels_of(self.images[index]), read_image(self.images[index])
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        ids, entries = [], []
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"`{path}`, line {number}"
                label, numbers = _numbers(line, where, len(self.class_names))
                ids.append(label)
                entries.append(_entry(numbers, image.size, where, self.with_masks))
        objects = objects_of_entries(
            entries, ids, image.size, with_masks=self.with_masks, where=f"`{path}`", image_id=index
        )
        return image, objects


def labels_of(image: Path) -> Path:
    """Return the text file of an image: the last folder ``images`` in its path is ``labels``."""
    parts = list(image.with_suffix(".txt").parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _numbers(line: str, where: str, num_classes: int) -> tuple[int, list[float]]:
    try:
        first, *rest = (float(word) for word in line.split())
    except ValueError as error:
        raise SFAError(f"{where}: expected numbers, got {line[:60]!r}") from error
    if not 0 <= first < num_classes or first != int(first):
        raise SFAError(f"{where}: class {first:g}, but there are {num_classes} classes")
    if any(not -0.01 <= share <= 1.01 for share in rest):
        raise SFAError(f"{where}: expected shares of the image from 0 to 1, got {line[:60]!r}")
    return int(first), rest


def _entry(
    numbers: Sequence[float], size: tuple[int, int], where: str, with_masks: bool
) -> dict[str, Any]:
    """Return a line as COCO would write it."""
    width, height = size
    if len(numbers) == 4 and not with_masks:
        x, y, w, h = numbers
        return {"bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    if len(numbers) < 6 or len(numbers) % 2:
        wanted = "x y of three corners or more" + ("" if with_masks else ", or centre and size")
        raise SFAError(f"{where}: expected {wanted} after the class, got {len(numbers)} numbers")
    xs, ys = [x * width for x in numbers[::2]], [y * height for y in numbers[1::2]]
    outline = [side for corner in zip(xs, ys, strict=True) for side in corner]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    turned = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    area = abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in turned)) / 2
    return {"bbox": box, "segmentation": [outline], "area": area}


def _images(folder: Path, content: Mapping[str, Any], stated: str, path: Path) -> list[Path]:
    """Return the images of a split: of a folder, or a text file that lists them."""
    root = Path(str(content.get("path") or "."))
    # As ultralytics writes it, paths are of the machine that made the file; its own folder counts.
    places = [folder / stated, folder / root / stated, root / stated]
    places += [folder / Path(*Path(stated).parts[1:])] if stated.startswith("..") else []
    place = next((p for p in places if p.exists()), None)
    if place is None:
        raise SFAError(f"`{path}`: {stated!r} is neither in `{folder}` nor in `{root}`")
    if place.is_file():
        lines = place.read_text(encoding="utf-8").split("\n")
        return [(place.parent / line.strip()).resolve() for line in lines if line.strip()]
    found = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise SFAError(f"`{place}`: no {' or '.join(IMAGE_SUFFIXES)} files")
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise SFAError(f"`{path}`: needs pyyaml: pip install 'sfa-peft[examples]'") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SFAError(f"`{path}`: cannot be read ({error})") from error
    if not isinstance(content, Mapping):
        raise SFAError(f"`{path}`: expected names, train and val, got {content!r:.60}")
    return content
