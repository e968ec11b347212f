# SPDX-License-Identifier: Apache-2.0
"""Mask2Former and EoMT for semantic segmentation, with class maps in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import EomtForUniversalSegmentation, Mask2FormerForUniversalSegmentation
from transformers.modeling_outputs import SemanticSegmenterOutput

from sfa_peft.dense.data.transforms import IGNORE_INDEX
from sfa_peft.dense.inference import dense_maps


@dataclass
class MasksAndClasses(SemanticSegmenterOutput):
    """Class maps, and the queries that they are made of, for tests with several runs an image."""

    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None


class ClassMaps:
    """Makes a model of transformers that answers with masks of queries take and give class maps.

    For one that is not here, name it first: ``class Mine(ClassMaps, EomtDinov3For...): ...``.
    """

    training: bool

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> MasksAndClasses:
        """Return the loss, where there are labels, and logarithms of class scores.

        Args:
            pixel_values: Images, float ``(B, 3, H, W)``.
            labels: Class ids, or ``IGNORE_INDEX``, int64 ``(B, H, W)``.
            kwargs: Not used; Trainer may give ``return_dict`` and the like.

        Returns:
            ``loss``, a scalar or None, and ``logits``, ``(B, num_labels, H, W)``; their argmax is
            the class whose masks cover a pixel best (the paper's semantic inference). With them the
            queries' ``class_queries_logits`` and ``masks_queries_logits``. In training the loss
            alone.
        """
        masks, classes = (None, None) if labels is None else _as_masks(labels)
        outputs = super().forward(  # pyright: ignore[reportAttributeAccessIssue]
            pixel_values, mask_labels=masks, class_labels=classes
        )
        if self.training:  # nobody looks at the maps, and they are large
            return MasksAndClasses(loss=outputs.loss)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        return MasksAndClasses(
            loss=outputs.loss,
            logits=dense_maps(outputs, size).values.clamp_min(1e-6).log(),  # pyright: ignore
            class_queries_logits=outputs.class_queries_logits,
            masks_queries_logits=outputs.masks_queries_logits,
        )


class Mask2FormerForSemanticSegmentation(  # pyright: ignore[reportIncompatibleMethodOverride]
    ClassMaps, Mask2FormerForUniversalSegmentation
):
    """Mask2Former that takes and gives class maps, so that it is used as UperNet is."""


class EomtForSemanticSegmentation(  # pyright: ignore[reportIncompatibleMethodOverride]
    ClassMaps, EomtForUniversalSegmentation
):
    """EoMT that does the same: a ViT in whose last blocks queries stand beside the patches."""


def _as_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the masks ``(N, H, W)`` of the N classes of each class map, and the classes."""
    classes = [ids.unique() for ids in labels]
    classes = [found[found != IGNORE_INDEX] for found in classes]
    masks = [
        (ids == found[:, None, None]).float() for ids, found in zip(labels, classes, strict=True)
    ]
    return masks, classes
