# SPDX-License-Identifier: Apache-2.0
"""The task sets: which script says what they are, and how it is told to train here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Every method's rates of what it trains in the backbone are chosen from these.
BACKBONE_RATES = (6e-4, 1.5e-3, 4e-3, 1e-2, 2.5e-2)
#: And the head's from these times the task set's `head_rate`.
HEAD_FACTORS = (0.16, 0.4, 1.0, 2.5)
#: Where the search begins: places in the two lines above.
START = (2, 2)


@dataclass(frozen=True)
class TaskSet:
    """One task on one kind of data.

    Attributes:
        name: Of its results.
        title: For people.
        script: The example script whose data, model, head and metric it is.
        metric: Key of its scores.
        header: The metric for people.
        head_rate: Learning rate of the head that the search begins with.
        cpu_seconds: What a run takes, until there are results.
        options: Options of the script.
        folder: Environment variable that names the folder of the data; None for rendered scenes.
        higher_is_better: Whether a larger score is a better one.
    """

    name: str
    title: str
    script: str
    metric: str
    header: str
    head_rate: float
    cpu_seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    higher_is_better: bool = True

    @property
    def data_folder(self) -> str | None:
        """The folder of the data; None for rendered scenes, or if nobody has said."""
        return os.environ.get(self.folder) if self.folder else None

    @property
    def is_there(self) -> bool:
        """Whether its data can be read here."""
        return self.folder is None or Path(self.data_folder or "nowhere").is_dir()

    def better(self, one: float, other: float) -> bool:
        """Whether one score is better than another."""
        return one > other if self.higher_is_better else one < other


TASKS = {
    task.name: task
    for task in (
        TaskSet(
            "segmentation",
            "Semantic segmentation, rendered scenes",
            "semantic_segmentation",
            "mean_iou",
            "mIoU",
            head_rate=6e-3,
            cpu_seconds=42,
        ),
        TaskSet(
            "depth",
            "Depth, rendered scenes",
            "depth_estimation",
            "rmse",
            "RMSE (m)",
            head_rate=6e-3,
            cpu_seconds=42,
            higher_is_better=False,
        ),
        TaskSet(
            "camvid",
            "Semantic segmentation, CamVid",
            "semantic_segmentation",
            "mean_iou",
            "mIoU",
            head_rate=6e-3,
            cpu_seconds=160,
            options={
                "image_size": [96, 96],
                "eval_size": [144, 192],
                "score_size": [144, 192],
                "per_device_train_batch_size": 8,
                "max_steps": 400,
            },
            folder="TRADEOFF_CAMVID",
        ),
        TaskSet(
            "redkitchen",
            "Depth, frames of one kitchen (7-Scenes)",
            "depth_estimation",
            "rmse",
            "RMSE (m)",
            head_rate=6e-3,
            cpu_seconds=170,
            options={
                "image_size": [96, 128],
                "eval_size": [96, 128],
                "max_depth": 4.0,
                "per_device_train_batch_size": 8,
                "max_steps": 400,
            },
            folder="TRADEOFF_REDKITCHEN",
            higher_is_better=False,
        ),
        TaskSet(
            "detection",
            "Object detection, rendered scenes",
            "object_detection",
            "bbox_map",
            "box AP",
            head_rate=2e-3,
            cpu_seconds=240,
        ),
        TaskSet(
            "instances",
            "Instance segmentation, rendered scenes",
            "instance_segmentation",
            "segm_map",
            "mask AP",
            head_rate=2e-3,
            cpu_seconds=240,
        ),
    )
}
