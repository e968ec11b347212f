# SPDX-License-Identifier: Apache-2.0
"""What a dense-prediction run needs beside the tuner: data, augmentation, metrics and pictures."""

from __future__ import annotations

from sfa_peft.dense.data.datasets import SegmentationData, load_segmentation, read_classes
from sfa_peft.dense.data.splits import SegmentationSplit, TransformedSplit
from sfa_peft.dense.data.transforms import (
    IGNORE_INDEX,
    EvalTransform,
    TrainTransform,
    colour_jitter,
    to_tensors,
)
from sfa_peft.dense.metrics.segmentation import (
    SegmentationMetrics,
    argmax_logits,
    confusion_matrix,
    segmentation_scores,
)
from sfa_peft.dense.pictures.sheets import class_palette, contact_sheet, curve_plot
from sfa_peft.dense.scenes.render import CLASS_NAMES, Scene, SceneDataset, render_scene

__all__ = [
    "CLASS_NAMES",
    "IGNORE_INDEX",
    "EvalTransform",
    "Scene",
    "SceneDataset",
    "SegmentationData",
    "SegmentationMetrics",
    "SegmentationSplit",
    "TrainTransform",
    "TransformedSplit",
    "argmax_logits",
    "class_palette",
    "colour_jitter",
    "confusion_matrix",
    "contact_sheet",
    "curve_plot",
    "load_segmentation",
    "read_classes",
    "render_scene",
    "segmentation_scores",
    "to_tensors",
]
