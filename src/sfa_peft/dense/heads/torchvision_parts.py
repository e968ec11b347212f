# SPDX-License-Identifier: Apache-2.0
"""torchvision's parts of a detector, as a config wants them. What is not named is its default."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from sfa_peft.errors import SFAError

#: The backbone's maps, and the pooled one behind them.
STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors


def torchvision_detection() -> ModuleType:
    """Import torchvision's detectors, which the base installation does not bring.

    Returns:
        ``torchvision.models.detection``.

    Raises:
        SFAError: If torchvision is not installed, or does not fit torch.
    """
    try:
        # What its operators are made by is missing where it was built for another torch.
        from torchvision.models import detection  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        raise SFAError(
            "Faster R-CNN and Mask R-CNN need torchvision, of the release that was built for this "
            f"torch: pip install 'sfa-peft[torchvision]' ({type(error).__name__}: {error})"
        ) from error
    return detection


class SharedBoxPredictor(nn.Module):
    """Class scores, and one box for all classes, laid out as if each had its own.

    Args:
        in_channels: Features of a region.
        num_classes: Classes, background included.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(N, num_classes)`` and box deltas ``(N, 4 * num_classes)``."""
        return self.cls_score(features), self.bbox_pred(features).repeat(1, self.num_classes)


def make_detector(
    config: Any,
    *,
    iou: float = 0.5,
    box_weights: tuple[float, float, float, float] | None = None,
    one_box: bool = False,
    masks: bool | None = None,
) -> Any:
    """Return a Faster R-CNN or Mask R-CNN of torchvision, whose ``rpn`` and ``roi_heads`` are used.

    Args:
        config: Any, numbers of classes and anchors.
        iou: Overlap with a true box from which a proposal counts as it.
        box_weights: Scales of the box deltas; None for torchvision's own.
        one_box: Whether all classes share a box.
        masks: Whether there is a mask head; None as in the config.

    Raises:
        SFAError: If torchvision is missing.
    """
    library = torchvision_detection()
    rcnn, width = library.faster_rcnn, config.hidden_size
    features, classes = 4 * width, config.num_labels + 1  # 1024 of 256, and background
    backbone = nn.Identity()
    backbone.out_channels = width  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    sizes = tuple((config.anchor_scale * stride,) for stride in STRIDES)
    options = {
        "rpn_anchor_generator": library.anchor_utils.AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        "box_head": rcnn.TwoMLPHead(width * 7**2, features),
        "box_predictor": (SharedBoxPredictor if one_box else rcnn.FastRCNNPredictor)(
            features, classes
        ),
        "box_fg_iou_thresh": iou,
        "box_bg_iou_thresh": iou,
        "box_batch_size_per_image": config.num_samples,
        "bbox_reg_weights": box_weights,
    }
    if config.masks if masks is None else masks:
        parts = library.mask_rcnn
        options["mask_head"] = parts.MaskRCNNHeads(width, (width,) * 4, 1)
        options["mask_predictor"] = parts.MaskRCNNPredictor(width, width, classes)
        detector = library.MaskRCNN(backbone, **options)
    else:
        detector = library.FasterRCNN(backbone, **options)
    _say_strides(detector.roi_heads)
    return detector


def _say_strides(roi_heads: Any) -> None:
    """Tell the pools the strides of the maps, which they would guess from the first batch."""
    from torchvision.ops.poolers import initLevelMapper  # pyright: ignore[reportMissingImports]

    strides = STRIDES[:-1]
    for pool in (roi_heads.box_roi_pool, roi_heads.mask_roi_pool):
        if pool is not None:
            lowest = strides[0].bit_length() - 1
            pool.scales = [1 / stride for stride in strides]
            pool.map_levels = initLevelMapper(
                lowest,
                lowest + len(strides) - 1,
                canonical_scale=pool.canonical_scale,
                canonical_level=pool.canonical_level,
            )
