# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC's layout: an xml file of boxes for each image, and masks of class ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from sfa_peft.dense.data.coco import objects_of_entries
from sfa_peft.dense.data.files import IMAGE_SUFFIXES, read_image, read_mask
from sfa_peft.dense.data.objects import Objects
from sfa_peft.dense.data.splits import Found, PairFolder
from sfa_peft.errors import SFAError

XML, MASKS = "Annotations", "SegmentationClass"
CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
_IMAGES = ("JPEGImages", "images", ".")
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_LARGEST = 1 << 22  # bytes of an xml file


def find_voc(folder: Path) -> Path | None:
    """Return the folder with ``Annotations`` or ``SegmentationClass``: this one, or one inside.

    Raises:
        SFAError: If there are several, such as VOC2007 and VOC2012.
    """
    places = [folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/VOC*"))]
    found = [
        place for place in places if any((place / XML).glob("*.xml")) or (place / MASKS).is_dir()
    ]
    if len(found) > 1:
        raise SFAError(f"`{folder}`: {len(found)} years of VOC; name one, such as `{found[0]}`")
    return found[0] if found else None


def voc_masks(folder: Path, classes: Sequence[str] | None = None) -> Found[Image.Image]:
    """Read the masks of ``SegmentationClass``, by the lists of ``ImageSets/Segmentation``.

    Raises:
        SFAError: If a folder or a mask is missing.
    """
    root = _root(folder)
    found: Found[Image.Image] = Found({}, tuple(classes or CLASS_NAMES))
    masks = {path.stem: path for path in (root / MASKS).glob("*.png")}
    for split, names in _lists(root, "Segmentation", sorted(masks)).items():
        missing = [name for name in names if name not in masks]
        found.missing += [f"`{root / MASKS / name}.png`: there is none" for name in missing]
        pairs = [(_image(root, name), masks[name]) for name in names if name in masks]
        found.splits[split] = PairFolder(pairs, read_mask)
    return found


def voc_boxes(folder: Path, classes: Sequence[str] | None = None) -> Found[Objects]:
    """Read the boxes of ``Annotations/*.xml``, by the lists of ``ImageSets/Main``.

    Classes are those given, or the names that occur, in order. Objects marked as difficult count
    neither for nor against a prediction, as crowds of COCO.

    Raises:
        SFAError: If a folder is missing, or an xml file is damaged or names an unknown class.
    """
    root = _root(folder)
    files = {path.stem: path for path in (root / XML).glob("*.xml")}
    if classes is None:
        classes = sorted({n.text or "" for p in files.values() for n in _read(p).iter("name")})
    found: Found[Objects] = Found({}, tuple(classes))
    for split, names in _lists(root, "Main", sorted(files)).items():
        missing = [name for name in names if name not in files]
        found.missing += [f"`{root / XML / name}.xml`: there is none" for name in missing]
        found.splits[split] = VocBoxes(root, [n for n in names if n in files], found.class_names)
    return found


class VocBoxes:
    """A split of images and their boxes.

    Args:
        root: Folder with ``Annotations``.
        names: Stems of files.
        class_names: Name of class id 0, 1, ...
    """

    def __init__(self, root: Path, names: Sequence[str], class_names: Sequence[str]) -> None:
        self.root, self.names, self.class_names = root, tuple(names), tuple(class_names)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the xml file of pair ``index``."""
        return f"`{self.root / XML / self.names[index]}.xml`"

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        """Decode pair ``index``; raises SFAError naming a file that is damaged."""
        path = self.root / XML / f"{self.names[index]}.xml"
        image, entries, ids = read_image(_image(self.root, self.names[index])), [], []
        for entry in _read(path).iter("object"):
            name = entry.findtext("name", "")
            if name not in self.class_names:
                raise SFAError(f"`{path}`: class {name!r} is none of {list(self.class_names)[:8]}")
            ids.append(self.class_names.index(name))
            entries.append({"bbox": _box(entry, path), "iscrowd": _is_difficult(entry)})
        objects = objects_of_entries(
            entries, ids, image.size, with_masks=False, where=f"`{path}`", image_id=index
        )
        return image, objects


def _root(folder: Path) -> Path:
    root = find_voc(folder)
    if root is None:
        raise SFAError(f"`{folder}`: neither {XML}/*.xml nor {MASKS}/ there")
    return root


def _lists(root: Path, kind: str, everything: Iterable[str]) -> dict[str, list[str]]:
    """Return stems by split; all of them are for training where there is no list."""
    found: dict[str, list[str]] = {}
    for word, split in _SPLITS.items():
        path = root / "ImageSets" / kind / f"{word}.txt"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            found[split] = [line.split()[0] for line in lines if line.strip()]
    return found or {"train": list(everything)}


def _image(root: Path, name: str) -> Path:
    places = [root / p / f"{name}{s}" for p in _IMAGES for s in IMAGE_SUFFIXES]
    return next((place for place in places if place.is_file()), places[0])


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
        if len(data) > _LARGEST or b"<!ENTITY" in data:
            raise SFAError(f"`{path}`: no annotation of VOC")
        return ElementTree.fromstring(data)
    except (OSError, ElementTree.ParseError) as error:
        raise SFAError(f"`{path}`: cannot be read as xml ({error})") from error


def _box(entry: Any, path: Path) -> list[float]:
    """Return left, top, width, height; VOC counts pixels from 1, and the last one is inside."""
    try:
        sides = [float(entry.findtext(f"bndbox/{n}")) for n in ("xmin", "ymin", "xmax", "ymax")]
    except (TypeError, ValueError) as error:
        raise SFAError(f"`{path}`: an object without the four numbers of its bndbox") from error
    left, top, right, bottom = sides
    return [left - 1, top - 1, right - left + 1, bottom - top + 1]


def _is_difficult(entry: Any) -> int:
    return int(entry.findtext("difficult", "0").strip() == "1")
