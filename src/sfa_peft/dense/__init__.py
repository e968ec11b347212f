# SPDX-License-Identifier: Apache-2.0
"""What a dense-prediction run needs beside the tuner: data, augmentation, metrics and pictures."""

from __future__ import annotations

from sfa_peft.dense.coco_masks import decode_mask, encode_masks
from sfa_peft.dense.data.collate import (
    collate_detection,
    collate_instances,
    collate_semantic_masks,
)
from sfa_peft.dense.data.datasets import SegmentationData, load_segmentation, read_classes
from sfa_peft.dense.data.depth import (
    depth_to_tensors,
    kitti_benchmark_crop,
    nyu_border_crop,
    vertical_cut_depth,
)
from sfa_peft.dense.data.depth_transforms import DepthEvalTransform, DepthTrainTransform
from sfa_peft.dense.data.load import DenseData, load_dense
from sfa_peft.dense.data.object_transforms import (
    ObjectResize,
    ObjectScaleCrop,
    ObjectShortestEdge,
    objects_to_tensors,
)
from sfa_peft.dense.data.objects import Objects
from sfa_peft.dense.data.splits import SegmentationSplit, Split, SubSplit, TransformedSplit
from sfa_peft.dense.data.transforms import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    TrainTransform,
    as_image,
    colour_jitter,
    to_tensors,
)
from sfa_peft.dense.heads.deconv_depth import DeconvDepthConfig, DeconvForDepthEstimation
from sfa_peft.dense.heads.feature_norms import MapNorm, NormedFeatures
from sfa_peft.dense.heads.mask2former import (
    ClassMaps,
    EomtForSemanticSegmentation,
    Mask2FormerForSemanticSegmentation,
)
from sfa_peft.dense.heads.rcnn import RCNNConfig, RCNNForObjectDetection
from sfa_peft.dense.inference import DenseMaps, dense_maps, predict_maps, sliding_window_maps
from sfa_peft.dense.inference_augmented import multi_scale_probabilities, predict_depth
from sfa_peft.dense.inference_boxes import instances_from_boxes
from sfa_peft.dense.inference_instances import instances_from_queries
from sfa_peft.dense.losses import SILogLoss, resize_depth, silog_loss
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.metrics.depth import DepthMetrics, depth_at_labels, kb_crop
from sfa_peft.dense.metrics.detr import detr_outputs, detr_results
from sfa_peft.dense.metrics.ground_truth import true_objects
from sfa_peft.dense.metrics.mask_queries import mask_query_outputs, mask_query_results
from sfa_peft.dense.metrics.segmentation import (
    SegmentationMetrics,
    argmax_logits,
    confusion_matrix,
    segmentation_scores,
)
from sfa_peft.dense.pictures.depth import depth_sheet
from sfa_peft.dense.pictures.objects import ObjectPicture, object_sheet
from sfa_peft.dense.pictures.sheets import class_palette, contact_sheet, curve_plot
from sfa_peft.dense.prediction.output import write_predictions
from sfa_peft.dense.prediction.preprocessing import Preprocessing
from sfa_peft.dense.prediction.processors import TaskProcessor, task_processor
from sfa_peft.dense.prediction.run import predict
from sfa_peft.dense.prediction.spec import Pretrained, TaskSpec
from sfa_peft.dense.scenes.render import CLASS_NAMES, MAX_DEPTH, Scene, SceneDataset, render_scene
from sfa_peft.dense.scenes.splits import THING_NAMES, SceneSplit

__all__ = [
    "CLASS_NAMES",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_DEPTH",
    "THING_NAMES",
    "ClassMaps",
    "CocoMetrics",
    "DeconvDepthConfig",
    "DeconvForDepthEstimation",
    "DenseData",
    "DenseMaps",
    "DepthEvalTransform",
    "DepthMetrics",
    "DepthTrainTransform",
    "EomtForSemanticSegmentation",
    "EvalTransform",
    "MapNorm",
    "Mask2FormerForSemanticSegmentation",
    "NormedFeatures",
    "ObjectPicture",
    "ObjectResize",
    "ObjectScaleCrop",
    "ObjectShortestEdge",
    "Objects",
    "Preprocessing",
    "Pretrained",
    "RCNNConfig",
    "RCNNForObjectDetection",
    "SILogLoss",
    "Scene",
    "SceneDataset",
    "SceneSplit",
    "SegmentationData",
    "SegmentationMetrics",
    "SegmentationSplit",
    "Split",
    "SubSplit",
    "TaskProcessor",
    "TaskSpec",
    "TrainTransform",
    "TransformedSplit",
    "argmax_logits",
    "as_image",
    "class_palette",
    "collate_detection",
    "collate_instances",
    "collate_semantic_masks",
    "colour_jitter",
    "confusion_matrix",
    "contact_sheet",
    "curve_plot",
    "decode_mask",
    "dense_maps",
    "depth_at_labels",
    "depth_sheet",
    "depth_to_tensors",
    "detr_outputs",
    "detr_results",
    "encode_masks",
    "instances_from_boxes",
    "instances_from_queries",
    "kb_crop",
    "kitti_benchmark_crop",
    "load_dense",
    "load_segmentation",
    "mask_query_outputs",
    "mask_query_results",
    "multi_scale_probabilities",
    "nyu_border_crop",
    "object_sheet",
    "objects_to_tensors",
    "predict",
    "predict_depth",
    "predict_maps",
    "read_classes",
    "render_scene",
    "resize_depth",
    "segmentation_scores",
    "silog_loss",
    "sliding_window_maps",
    "task_processor",
    "to_tensors",
    "true_objects",
    "vertical_cut_depth",
    "write_predictions",
]
