# SPDX-License-Identifier: Apache-2.0
"""Mask2Former on a SwinV2, and its use for semantic segmentation with class maps in and out."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, PretrainedConfig
from transformers.modeling_outputs import SemanticSegmenterOutput

from sfa_peft.dense.data.transforms import IGNORE_INDEX
from sfa_peft.dense.inference import dense_maps

PAPER_POINTS = 12544  # sampled per mask for the loss


def mask2former_config(
    backbone: PretrainedConfig,
    *,
    image_size: list[int],
    hidden_size: int,
    encoder_layers: int,
    decoder_layers: int,
    num_queries: int,
    num_labels: int,
) -> Mask2FormerConfig:
    """Return a configuration; what is not an argument is as in the paper of Mask2Former.

    Args:
        backbone: Configuration of the backbone, all stages put out.
        image_size: Height and width of training images. Small ones have fewer points for the loss.
        hidden_size: Channels of pixel decoder, mask features and decoder; a multiple of 32.
        encoder_layers: Blocks of the pixel decoder.
        decoder_layers: Layers of the decoder, the prediction from the queries alone included.
        num_queries: Masks predicted per image.
        num_labels: Classes.
    """
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=hidden_size,
        mask_feature_size=hidden_size,
        hidden_dim=hidden_size,
        encoder_feedforward_dim=4 * hidden_size,
        dim_feedforward=8 * hidden_size,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        num_queries=num_queries,
        num_labels=num_labels,
        train_num_points=min(PAPER_POINTS, image_size[0] * image_size[1] // 4),
    )


@dataclass
class MasksAndClasses(SemanticSegmenterOutput):
    """Class maps, and the queries that they are made of, for tests with several runs an image."""

    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None


class Mask2FormerForSemanticSegmentation(Mask2FormerForUniversalSegmentation):
    """Mask2Former that takes and gives class maps, so that it is used as UperNet is."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> MasksAndClasses:
        """Return the loss, where there are labels, and logarithms of class scores.

        Args:
            pixel_values: Images, float `(B, 3, H, W)`.
            labels: Class ids, or `IGNORE_INDEX`, int64 `(B, H, W)`.
            kwargs: Not used; Trainer may give `return_dict` and the like.

        Returns:
            `loss`, a scalar or None, and `logits`, `(B, num_labels, H, W)`; their argmax is the
            class whose masks cover a pixel best (the paper's semantic inference). With them the
            queries' `class_queries_logits` and `masks_queries_logits`.
        """
        masks, classes = (None, None) if labels is None else _as_masks(labels)
        outputs = super().forward(pixel_values, mask_labels=masks, class_labels=classes)
        if self.training:  # nobody looks at the maps, and they are large
            return MasksAndClasses(loss=outputs.loss)
        scores = dense_maps(outputs, tuple(pixel_values.shape[-2:])).values
        return MasksAndClasses(
            loss=outputs.loss,
            logits=scores.clamp_min(1e-6).log(),
            class_queries_logits=outputs.class_queries_logits,
            masks_queries_logits=outputs.masks_queries_logits,
        )


def _as_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the masks `(N, H, W)` of the N classes of each class map, and the classes."""
    classes = [ids.unique() for ids in labels]
    classes = [found[found != IGNORE_INDEX] for found in classes]
    masks = [
        (ids == found[:, None, None]).float() for ids, found in zip(labels, classes, strict=True)
    ]
    return masks, classes
