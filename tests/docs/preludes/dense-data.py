# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

from sfa_peft.dense import SceneSplit

for split in ("train", "val"):
    folder = Path("path/to/coco") / f"{split}2017"
    folder.mkdir(parents=True)
    SceneSplit(1, "detection")[0][0].save(folder / "1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 20, 20],
                         "area": 400, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    annotations = Path("path/to/coco/annotations") / f"instances_{split}2017.json"
    annotations.parent.mkdir(exist_ok=True)
    annotations.write_text(json.dumps(content))
