# SPDX-License-Identifier: Apache-2.0
"""Faster R-CNN and Mask R-CNN of torchvision on a backbone of transformers, with the paper's necks.

The heads of the paper's Table 2: FPN or BiFPN, one stage or Cascade. The model takes and gives what
the detectors of transformers do; importing this module registers it with their auto classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForObjectDetection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from sfa_peft.dense.heads.backbone_configs import read_backbone_config
from sfa_peft.dense.heads.bifpn import BiFPN
from sfa_peft.dense.heads.cascade import CascadeRoIHeads
from sfa_peft.dense.heads.feature_norms import MapNorm
from sfa_peft.dense.heads.torchvision_parts import STRIDES, make_detector, torchvision_detection
from sfa_peft.errors import SFAError

NECKS = ("fpn", "bifpn")
_STAGES = ("stage1", "stage2", "stage3", "stage4")


class RCNNConfig(PretrainedConfig):
    """Configuration of :class:`RCNNForObjectDetection`.

    Args:
        backbone_config: Config of the backbone, or its dict; its four ``out_features`` have strides
            of 4, 8, 16 and 32. By default a ``Swinv2Config``.
        neck: ``"fpn"`` or ``"bifpn"``.
        neck_layers: How often BiFPN fuses the maps there and back.
        cascade: Whether there are three box heads in a row, else one.
        masks: Whether there is a mask head (Mask R-CNN), else boxes alone (Faster R-CNN).
        hidden_size: Channels of the neck and of the convolutions behind it; the box head has four
            times as many features.
        anchor_scale: Side of the square anchors, in strides of their map.
        num_samples: Regions of an image that each box head is trained on; at most a quarter of them
            are objects, on which the mask head is trained.
        norm_features: Whether the neck begins with a LayerNorm on each map, as Swin's own code has
            them; transformers' ``Swinv2Backbone`` has none there.

    Raises:
        SFAError: If a value is out of range or the backbone's config is none.
    """

    model_type = "rcnn"
    # As transformers 4 declares it; 5 has a property that reads other class attributes.
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        neck: str = "fpn",
        neck_layers: int = 3,
        cascade: bool = False,
        masks: bool = True,
        hidden_size: int = 256,
        anchor_scale: float = 8.0,
        num_samples: int = 512,
        norm_features: bool = False,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = read_backbone_config(backbone_config, type(self).__name__, _STAGES)
        self.neck = neck
        self.neck_layers = neck_layers
        self.cascade = cascade
        self.masks = masks
        self.hidden_size = hidden_size
        self.anchor_scale = anchor_scale
        self.num_samples = num_samples
        self.norm_features = norm_features
        if neck not in NECKS:
            raise SFAError(f"RCNNConfig.neck: expected one of {list(NECKS)}, got {neck!r}")
        if min(neck_layers, hidden_size, num_samples) < 1 or not anchor_scale > 0:
            raise SFAError(
                "RCNNConfig: expected neck_layers, hidden_size and num_samples of 1 or more and "
                f"anchor_scale above 0, got {neck_layers}, {hidden_size}, {num_samples} and "
                f"{anchor_scale}"
            )
        super().__init__(**kwargs)


@dataclass
class RCNNOutput(ModelOutput):
    """What is found in each image, or in training mode the losses.

    Attributes:
        loss: The sum of ``losses``, a scalar.
        losses: Each part by name.
        boxes: Of each image, by falling score, ``(N, 4)``: left, top, right, bottom in pixels of
            ``pixel_values``.
        scores: ``(N,)`` each, in ``[0, 1]``.
        classes: Class ids from 0, int64 ``(N,)`` each.
        masks: Probabilities in the boxes, ``(N, 1, 28, 28)`` each; None without a mask head.
        sizes: Height and width of each image, without its padding.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    boxes: list[Tensor] | None = None
    scores: list[Tensor] | None = None
    classes: list[Tensor] | None = None
    masks: list[Tensor] | None = None
    sizes: list[tuple[int, int]] | None = None


class Neck(nn.Module):
    """Norms, where they are asked for, and FPN or BiFPN behind them.

    Args:
        config: Configuration of the model.
        in_channels: Channels of the backbone's maps.
    """

    def __init__(self, config: RCNNConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        kinds = [MapNorm if config.norm_features else nn.Identity] * len(in_channels)
        self.norms = nn.ModuleList(
            kind(channels) for kind, channels in zip(kinds, in_channels, strict=True)
        )
        width = config.hidden_size
        if config.neck == "bifpn":
            self.pyramid = BiFPN(in_channels, width, num_layers=config.neck_layers)
        else:
            library = torchvision_detection().backbone_utils
            self.pyramid = library.FeaturePyramidNetwork(
                list(in_channels), width, extra_blocks=library.LastLevelMaxPool()
            )

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the maps by the names that torchvision's heads know, and ``pool`` behind them."""
        normed = [norm(features) for norm, features in zip(self.norms, maps, strict=True)]
        return self.pyramid({str(level): features for level, features in enumerate(normed)})


class RCNNForObjectDetection(PreTrainedModel):
    """Faster R-CNN or Mask R-CNN, with one or three box heads, on a backbone of transformers.

    For a pretrained backbone, assign one: ``model.backbone = Swinv2Backbone.from_pretrained(folder,
    out_features=["stage1", "stage2", "stage3", "stage4"])``.

    Args:
        config: The configuration.

    Raises:
        SFAError: If torchvision is missing, or the backbone has not four maps.
    """

    config_class = RCNNConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The losses are means. Without this Trainer may take them as summed over micro-batches
    # (transformers #47688).
    accepts_loss_kwargs = False

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__(config)
        detector = make_detector(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        channels = self.backbone.channels
        if len(channels) != len(STRIDES) - 1:
            raise SFAError(
                "RCNNConfig.backbone_config: expected out_features of four stages, with strides of "
                f"4 to 32, got {list(self.backbone.out_features)}"
            )
        self.neck = Neck(config, channels)
        self.rpn = detector.rpn
        self.roi_heads = CascadeRoIHeads(config) if config.cascade else detector.roi_heads
        for part in (self.neck, self.rpn, self.roi_heads):
            for module in part.modules():  # they have drawn their start, if they have memory
                own = module.parameters(recurse=False)
                module._is_hf_initialized = not any(p.is_meta for p in own)  # pyright: ignore
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Layers of a checkpoint that lacks them.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
    ) -> RCNNOutput:
        """Find objects or, in training mode, compare with the true ones.

        Args:
            pixel_values: Images, ``(B, 3, H, W)``.
            pixel_mask: 1 on each image and 0 on its padding, which is at the right and the bottom,
                ``(B, H, W)``; None where there is no padding.
            labels: In training mode, of each image ``class_labels``, int64 ``(N,)`` from 0;
                ``boxes``, ``(N, 4)``: centre, width and height as shares of the image without its
                padding; and ``masks``, bool ``(N, H, W)``, for a mask head.

        Returns:
            ``loss`` and ``losses`` in training mode, else what was found.

        Raises:
            SFAError: If labels are missing in training mode.
        """
        sizes = _sizes(pixel_values, pixel_mask)
        pixels = _padded(pixel_values)
        maps = self.backbone(pixels).feature_maps
        features = {name: level.float() for name, level in self.neck(maps).items()}
        targets = self._targets(labels, sizes) if self.training else None
        # Boxes in bfloat16 would be off by several pixels.
        with torch.autocast(pixels.device.type, enabled=False):
            images = torchvision_detection().image_list.ImageList(pixels, sizes)
            proposals, losses = self.rpn(images, features, targets)
            found, more = self.roi_heads(features, proposals, sizes, targets)
        if self.training:
            losses = {**losses, **more}
            return RCNNOutput(loss=torch.stack([*losses.values()]).sum(), losses=losses)
        return RCNNOutput(
            boxes=[one["boxes"] for one in found],
            scores=[one["scores"] for one in found],
            classes=[one["labels"] - 1 for one in found],
            masks=[one["masks"] for one in found] if self.config.masks else None,
            sizes=sizes,
        )

    def _targets(
        self, labels: list[dict[str, Tensor]] | None, sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return labels as torchvision wants them: corners in pixels, classes from 1."""
        if labels is None or len(labels) != len(sizes):
            raise SFAError(
                f"RCNNForObjectDetection: training needs labels of {len(sizes)} images, got "
                f"{'none' if labels is None else len(labels)}"
            )
        if self.config.masks and not all("masks" in one for one in labels):
            raise SFAError(
                "RCNNForObjectDetection: its mask head needs labels with `masks`; "
                "collate_detection(items, masks=True) keeps them"
            )
        targets = []
        for one, (height, width) in zip(labels, sizes, strict=True):
            centre, extent = one["boxes"].float().split(2, dim=1)
            corners = torch.cat((centre - extent / 2, centre + extent / 2), dim=1)
            target = {
                "boxes": corners * corners.new_tensor((width, height, width, height)),
                "labels": one["class_labels"] + 1,
            }
            targets.append(target | ({"masks": one["masks"]} if self.config.masks else {}))
        return targets


def _padded(pixels: Tensor) -> Tensor:
    """Pad with 0, the mean colour, so that each map has half the size of the one before."""
    right, below = (-pixels.shape[axis] % STRIDES[-1] for axis in (-1, -2))
    return pad(pixels, (0, right, 0, below)) if right or below else pixels


def _sizes(pixels: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    if mask is None:
        return [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
    return [(int(one.any(1).sum()), int(one.any(0).sum())) for one in mask]


AutoConfig.register(RCNNConfig.model_type, RCNNConfig, exist_ok=True)
AutoModelForObjectDetection.register(RCNNConfig, RCNNForObjectDetection, exist_ok=True)
