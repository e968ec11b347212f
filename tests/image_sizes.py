# SPDX-License-Identifier: Apache-2.0
"""A small imagefolder whose pairs have masks, depth, and sizes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(40, 61), (64, 48), (33, 33), (40, 61), (90, 37)]  # height, width


def write_folder(root: Path) -> Path:
    """Write splits `train` and `validation`, one image of each size in both; return the folder."""
    for split in ("train", "validation"):
        (root / split).mkdir(parents=True)
        rows = []
        for number, (height, width) in enumerate(SIZES):
            rng = np.random.default_rng((number, len(split)))
            ids = np.repeat(rng.integers(0, 3, (height, 1)), width, 1).astype(np.uint8)
            image = 80 * ids[..., None] + rng.integers(0, 30, (height, width, 3)).astype(np.uint8)
            ids[:3] = 255
            depth = (1000 + 500.0 * ids + rng.integers(0, 99, ids.shape)).astype(np.uint16)
            depth[ids == 255] = 0
            arrays = {"image": image, "label": ids, "depth": depth}
            for kind, array in arrays.items():
                Image.fromarray(array).save(root / split / f"{number}_{kind}.png")
            rows.append({f"{kind}_file_name": f"{number}_{kind}.png" for kind in arrays})
        (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "classes.json").write_text('["sky", "road", "car"]')
    return root
