# SPDX-License-Identifier: Apache-2.0
"""Depth estimation from a backbone's last feature map by three transposed convolutions.

The head of MIM-Depth (https://github.com/SwinTransformer/MIM-Depth-Estimation), which the paper
uses for NYU and KITTI. Importing this module registers it with the auto classes of transformers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForDepthEstimation,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.utils.generic import can_return_tuple

from sfa_peft.dense.heads.backbone_configs import read_backbone_config
from sfa_peft.dense.heads.feature_norms import MapNorm
from sfa_peft.dense.losses import resize_depth, silog_loss
from sfa_peft.errors import SFAError


class DeconvDepthConfig(PretrainedConfig):
    """Configuration of :class:`DeconvForDepthEstimation`.

    Args:
        backbone_config: Config of the backbone, or its dict; the last of its ``out_features`` is
            used. By default a ``Swinv2Config`` with its stage 4.
        num_filters: Output channels of each transposed convolution, which doubles the resolution.
        hidden_size: Channels of the convolutions after them. By default an eighth of the channels
            of the backbone's last map, which is the ``embed_dim`` of a Swin transformer.
        max_depth: Largest depth that can be predicted, in metres: 10 for NYU, 80 for KITTI.
        norm_features: Whether the head begins with a LayerNorm over the channels, as MIM-Depth's
            backbone ends with; transformers' ``Swinv2Backbone`` has none there.
        silog_lambda: Lambda of the loss, see :func:`~sfa_peft.dense.losses.silog_loss`.
        initializer_range: Standard deviation of the head's initial weights.

    Raises:
        SFAError: If a number is out of range or the backbone's config is none.
    """

    model_type = "deconv_depth"
    # As transformers 4 declares it; 5 has a property that reads other class attributes.
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        num_filters: tuple[int, ...] | list[int] = (32, 32, 32),
        hidden_size: int | None = None,
        max_depth: float = 10.0,
        norm_features: bool = False,
        silog_lambda: float = 0.5,
        initializer_range: float = 0.001,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = read_backbone_config(
            backbone_config, type(self).__name__, ["stage4"]
        )
        self.num_filters = list(num_filters)
        self.hidden_size = hidden_size
        self.max_depth = max_depth
        self.norm_features = norm_features
        self.silog_lambda = silog_lambda
        self.initializer_range = initializer_range
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        widths = [*self.num_filters, 1 if self.hidden_size is None else self.hidden_size]
        if not self.num_filters or min(widths) < 1:
            raise SFAError(
                "DeconvDepthConfig: expected one or more num_filters and a hidden_size of 1 or "
                f"more, got {self.num_filters} and {self.hidden_size}"
            )
        if not self.max_depth > 0 or not 0 <= self.silog_lambda <= 1:
            raise SFAError(
                "DeconvDepthConfig: expected max_depth above 0 and silog_lambda in [0, 1], got "
                f"{self.max_depth} and {self.silog_lambda}"
            )


class DeconvDepthHead(nn.Module):
    """Transposed convolutions, a convolution, two doublings, two convolutions, a sigmoid.

    Args:
        config: Configuration of the model.
        in_channels: Channels of the feature map.
    """

    def __init__(self, config: DeconvDepthConfig, in_channels: int) -> None:
        super().__init__()
        self.max_depth = config.max_depth
        hidden = config.hidden_size or max(1, in_channels // 8)
        widths = [in_channels, *config.num_filters]
        self.norm = MapNorm(in_channels) if config.norm_features else nn.Identity()
        deconvolutions = []
        for inside, outside in pairwise(widths):
            deconvolutions += [
                nn.ConvTranspose2d(inside, outside, kernel_size=2, stride=2, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            ]
        self.deconv_layers = nn.Sequential(*deconvolutions)
        self.conv_layers = nn.Sequential(
            nn.Conv2d(widths[-1], hidden, kernel_size=3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.last_layer_depth = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, kernel_size=3, padding=1),
        )
        self.scale = 2 ** (len(config.num_filters) + 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the depth map of a feature map.

        Args:
            features: ``(B, in_channels, h, w)``.

        Returns:
            Depth in metres, ``(B, scale * h, scale * w)`` with a scale of 32 for three transposed
            convolutions.
        """
        hidden = self.conv_layers(self.deconv_layers(self.norm(features)))
        hidden = self.upsample(self.upsample(hidden))
        return torch.sigmoid(self.last_layer_depth(hidden)[:, 0]) * self.max_depth


class DeconvForDepthEstimation(PreTrainedModel):
    """A backbone of transformers with the depth head of MIM-Depth and its loss.

    Takes images of any size that the backbone takes. Saved and loaded as every model of
    transformers, also by ``AutoModelForDepthEstimation`` once this module has been imported. For a
    pretrained backbone, assign one: ``model.backbone = Swinv2Backbone.from_pretrained(folder,
    out_features=["stage4"])``.

    Args:
        config: The configuration.

    Raises:
        SFAError: If the backbone's last feature map is none of ``(B, C, h, w)``.
    """

    config_class = DeconvDepthConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The loss is a mean. Without this Trainer may take it as summed over micro-batches
    # (transformers #47688).
    accepts_loss_kwargs = False

    def __init__(self, config: DeconvDepthConfig) -> None:
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.head = DeconvDepthHead(config, self.backbone.channels[-1])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.reset_parameters()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DepthEstimatorOutput:
        """Predict depth, and compare it with the truth if that is given.

        Args:
            pixel_values: Images, ``(B, 3, H, W)``.
            labels: True depth in metres, ``(B, H, W)`` or of another size, to which predictions
                are then resized; 0 where nothing was measured.
            output_hidden_states: Return the backbone's hidden states.
            output_attentions: Return the backbone's attentions.

        Returns:
            ``predicted_depth``, metres ``(B, H, W)``, and ``loss`` if there are labels.
        """
        outputs = self.backbone.forward_with_filtered_kwargs(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        features = outputs.feature_maps[-1]
        if features.ndim != 4:
            raise SFAError(
                f"{type(self.backbone).__name__}: expected feature maps (B, C, h, w), got "
                f"{tuple(features.shape)}; set reshape_hidden_states=True in its config if it has "
                "that option"
            )
        depth = self._to_image(self.head(features), pixel_values.shape[-2:])
        loss = None
        if labels is not None:
            resized = resize_depth(depth, (labels.shape[-2], labels.shape[-1]))
            loss = silog_loss(resized, labels, lambd=self.config.silog_lambda)
        return DepthEstimatorOutput(
            loss=loss,
            predicted_depth=depth,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _to_image(self, depth: torch.Tensor, size: torch.Size) -> torch.Tensor:
        height, width = size
        excess = (depth.shape[1] - height, depth.shape[2] - width)
        if all(0 <= e < self.head.scale for e in excess):
            # Backbones of stride 32 pad an image at its bottom and right: cut that off again.
            return depth[:, :height, :width]
        return resize_depth(depth, (height, width))


AutoConfig.register(DeconvDepthConfig.model_type, DeconvDepthConfig, exist_ok=True)
AutoModelForDepthEstimation.register(DeconvDepthConfig, DeconvForDepthEstimation, exist_ok=True)
