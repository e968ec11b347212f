# SPDX-License-Identifier: Apache-2.0
"""Predictions as files: ids and depth as PNG, objects as COCO's json, and pictures to look at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfa_peft.dense.coco_masks import encode_masks
from sfa_peft.dense.pictures.overlays import class_overlay, depth_picture, object_overlay
from sfa_peft.dense.prediction.preprocessing import as_picture
from sfa_peft.dense.prediction.run import load, predict
from sfa_peft.dense.prediction.spec import TaskSpec, spec_of
from sfa_peft.errors import SFAError

JSON_NAME = "predictions.json"
#: Stored units per metre, the finest that 16 bits have room for: NYUv2's, KITTI's.
DEPTH_SCALES = (1000, 256)


def write_predictions(
    task: Any,
    files: Sequence[str | Path],
    out: str | Path,
    *,
    batch_size: int = 8,
    threshold: float = 0.5,
    overlays: bool = True,
    tell: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Predict for picture files and write what was found into a folder.

    For each picture ``NAME_overlay.png`` to look at; of segmentation ``NAME.png`` with class ids (8
    bits, or 16 where there are more than 256 classes); of depth ``NAME.png`` with 16 bits, 0 where
    there is none, in units of 1/``depth_scale`` metre. ``predictions.json`` says what is where; of
    objects it is a data set of COCO's form with a score for each annotation.

    Args:
        task: As for :func:`~sfa_peft.dense.predict`.
        files: Picture files; no two with one name.
        out: Folder; made if there is none.
        batch_size: Pictures in a batch at most.
        threshold: Of objects: those of a lower score are left out.
        overlays: Whether to write pictures to look at.
        tell: Called with each file that is done.

    Returns:
        What ``predictions.json`` holds.

    Raises:
        SFAError: If two files have one name, and as :func:`~sfa_peft.dense.predict`.
    """
    model = load(task) if isinstance(task, (str, Path)) else task
    spec, folder = spec_of(model), Path(out)
    paths = [Path(file) for file in files]
    _check_names(paths)
    folder.mkdir(parents=True, exist_ok=True)
    write = _WRITERS[spec.task]
    entries = []
    for first in range(0, len(paths), batch_size):  # so that many pictures need no memory
        chosen = paths[first : first + batch_size]
        pictures = [as_picture(path) for path in chosen]
        results = predict(model, pictures, batch_size=batch_size, threshold=threshold)
        for path, picture, result in zip(chosen, pictures, results, strict=True):
            painted, entry = write(spec, folder / f"{path.stem}.png", picture, result)
            if overlays:
                painted.save(folder / f"{path.stem}_overlay.png")
            size = {"width": picture.width, "height": picture.height}
            entries.append({"file_name": str(path), **size, **entry})
            if tell is not None:
                tell(str(path))
    content = _coco(spec, entries) if spec.task in _OBJECTS else _listed(spec, entries)
    (folder / JSON_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _check_names(paths: Sequence[Path]) -> None:
    counts = Counter(path.stem for path in paths)
    if not paths:
        raise SFAError("no pictures given")
    twice = [str(path) for path in paths if counts[path.stem] > 1]
    if twice:
        raise SFAError(
            f"{', '.join(twice[:4])}: results are named by their pictures, and these have one "
            "name. Predict for them one folder at a time"
        )


def _write_classes(
    spec: TaskSpec, path: Path, picture: Image.Image, ids: NDArray[Any]
) -> tuple[Image.Image, dict[str, Any]]:
    many = len(spec.class_names) > 256
    Image.fromarray(ids.astype(np.uint16 if many else np.uint8)).save(path)
    found, counts = np.unique(ids, return_counts=True)
    shares = {
        spec.class_names[i]: c / ids.size for i, c in zip(found, counts.tolist(), strict=True)
    }
    painted = class_overlay(picture, ids, len(spec.class_names))
    return painted, {"classes": path.name, "shares": shares}


def _write_depth(
    spec: TaskSpec, path: Path, picture: Image.Image, metres: NDArray[Any]
) -> tuple[Image.Image, dict[str, Any]]:
    farthest = float(metres.max())
    scale = next((s for s in DEPTH_SCALES if farthest * s < 65535), None)
    if scale is None:
        raise SFAError(f"{path.stem}: {farthest:g} m do not fit into 16 bits")
    Image.fromarray(np.round(metres * scale).astype(np.uint16)).save(path)
    known = metres[metres > 0]
    ends = [float(known.min()), float(known.max())] if known.size else None
    return depth_picture(metres), {"depth": path.name, "depth_scale": scale, "metres": ends}


def _write_objects(
    spec: TaskSpec, path: Path, picture: Image.Image, objects: Mapping[str, Any]
) -> tuple[Image.Image, dict[str, Any]]:
    annotations = []
    limits = (picture.width, picture.height, picture.width, picture.height)
    runs = encode_masks(objects["masks"]) if "masks" in objects else []
    for i, label in enumerate(objects["labels"].tolist()):
        left, top, right, bottom = np.clip(objects["boxes"][i], 0, limits).tolist()
        entry = {
            "category_id": label + 1,  # COCO's ids begin with 1
            "bbox": [left, top, right - left, bottom - top],
            "score": float(objects["scores"][i]),
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
        }
        if runs:
            entry["segmentation"] = {"size": runs[i]["size"], "counts": _text(runs[i]["counts"])}
            entry["area"] = int(objects["masks"][i].sum())
        annotations.append(entry)
    return object_overlay(picture, objects, spec.class_names), {"annotations": annotations}


def _text(counts: bytes | str) -> str:
    return counts if isinstance(counts, str) else counts.decode("ascii")


def _listed(spec: TaskSpec, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": spec.task, "classes": list(spec.class_names), "images": entries}


def _coco(spec: TaskSpec, entries: list[dict[str, Any]]) -> dict[str, Any]:
    images, annotations = [], []
    for number, entry in enumerate(entries, 1):
        images.append({"id": number, **{k: v for k, v in entry.items() if k != "annotations"}})
        for own in entry["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **own})
    categories = [{"id": i, "name": name} for i, name in enumerate(spec.class_names, 1)]
    return {
        "info": {"task": spec.task},
        "images": images,
        "categories": categories,
        "annotations": annotations,
    }


_OBJECTS = ("object_detection", "instance_segmentation")
_WRITERS: dict[str, Callable[..., tuple[Image.Image, dict[str, Any]]]] = {
    "semantic_segmentation": _write_classes,
    "depth_estimation": _write_depth,
    **dict.fromkeys(_OBJECTS, _write_objects),
}
