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
from sfa_peft.dense.inference import DenseMaps, predict_maps, sliding_window_maps
from sfa_peft.dense.inference_augmented import multi_scale_probabilities, predict_depth
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.metrics.depth import DepthMetrics, depth_at_labels, kb_crop
from sfa_peft.dense.metrics.detr import detr_outputs, detr_results
from sfa_peft.dense.metrics.instances import instances_from_segmentation
from sfa_peft.dense.metrics.mask_queries import mask_query_outputs, mask_query_results
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
    "CocoMetrics",
    "DenseMaps",
    "DepthMetrics",
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
    "depth_at_labels",
    "detr_outputs",
    "detr_results",
    "instances_from_segmentation",
    "kb_crop",
    "load_segmentation",
    "mask_query_outputs",
    "mask_query_results",
    "multi_scale_probabilities",
    "predict_depth",
    "predict_maps",
    "read_classes",
    "render_scene",
    "segmentation_scores",
    "sliding_window_maps",
    "to_tensors",
]
