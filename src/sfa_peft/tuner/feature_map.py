# SPDX-License-Identifier: Apache-2.0
"""`FeatureMap`: how the tokens that a layer puts out lie in the image.

A layer sees `(B, N, D)` and not how high and wide its map is. Hierarchical backbones tell that to
their blocks, plain vision transformers follow from the image and the patches: hooks listen there.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import SFAError, TargetError

#: Tokens before the map of plain vision transformers: class, distillation; registers come on top.
_LEADING = {
    "beit": 1,
    "clip_vision_model": 1,
    "data2vec-vision": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "ijepa": 0,
    "siglip_vision_model": 0,
    "vit": 1,
    "vit_msn": 1,
}
#: Families that tell their blocks height and width, and have no tokens beside the map.
_TOLD = {"focalnet", "glpn", "maskformer-swin", "pvt_v2", "segformer", "swin", "swinv2"}
#: Families whose layers put out maps, not tokens.
_OF_MAPS = {"convnext", "convnextv2", "dinov3_convnext", "sam_vision_model", "vitdet"}


@dataclass(frozen=True)
class Place:
    """Where the size of a layer's map is heard of.

    Attributes:
        module: A block that is told height and width, or a backbone that is given images; None for
            square windows.
        stride: Height and width of a patch, for images.
        leading: Number of tokens before the map.
    """

    module: nn.Module | None
    stride: tuple[int, int] | None = None
    leading: int = 0


class FeatureMap:
    """How the tokens of some layers lie in the image.

    Args:
        place: Where it listens.

    Attributes:
        sizes: Height and width by number of tokens, as they were heard of. Of all forwards, since
            a checkpointed block computes again after the next one may have begun.
    """

    def __init__(self, place: Place) -> None:
        self.stride, self.leading = place.stride, place.leading
        self.names: list[str] | None = None  # of what the place is called with; None for windows
        self.sizes: dict[int, tuple[int, int]] = {}
        if place.module is not None:
            self.names = _arguments(place.module)
            place.module.register_forward_pre_hook(self.hear, with_kwargs=True)

    def hear(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the size that a block or backbone is called with."""
        given = {**dict(zip(self.names or (), args, strict=False)), **kwargs}
        if self.stride is not None:
            images = given.get("pixel_values")
            if not isinstance(images, Tensor):
                return
            height, width = images.shape[-2] // self.stride[0], images.shape[-1] // self.stride[1]
        elif "input_dimensions" in given:
            height, width = given["input_dimensions"]
        else:
            height, width = given["height"], given["width"]
        height, width = int(height), int(width)
        self.sizes[self.leading + height * width] = height, width

    @staticmethod
    def find(feature_map: FeatureMap | None, tokens: int) -> tuple[int, int, int]:
        """Return the number of tokens before a map, its height and its width.

        Raises:
            SFAError: If they are not known.
        """
        if feature_map is None:
            raise SFAError(
                f"external_type='mona': {tokens} tokens a layer, of which nobody says how they lie "
                "in the image. Use external_type='bottleneck'."
            )
        if feature_map.names is None:
            side = math.isqrt(tokens)
            found = (side, side) if side * side == tokens else None
        else:
            found = feature_map.sizes.get(tokens)
        if found is None:
            maps = sorted(feature_map.sizes.values()) or "no images yet"
            before = f" and {feature_map.leading} before them" if feature_map.leading else ""
            raise SFAError(
                f"external_type='mona': {tokens} tokens, expected those of "
                f"{'a square window' if feature_map.names is None else maps}{before}. Call the "
                "whole model, and let it drop no tokens; or use external_type='bottleneck'."
            )
        return feature_map.leading, *found


def find_place(
    model: nn.Module, path: str, role: str | None, backbone: Backbone | None
) -> Place | None:
    """Return where to hear how the tokens of a layer lie in the image.

    Args:
        model: The model.
        path: The layer's path.
        role: Its role in a block.
        backbone: The model's backbone.

    Returns:
        The place; None where layers put out maps, or nothing is known of the model.

    Raises:
        TargetError: If it is a backbone of which nobody says that.
    """
    family = backbone.model_type if backbone else None
    if family not in (None, *_TOLD, *_OF_MAPS, *_LEADING):
        raise TargetError(
            f"external_type='mona': how the tokens of {family} lie in the image is not known. Use "
            "external_type='bottleneck'."
        )
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        block = model.get_submodule(".".join(names[:end]))
        arguments = set(_arguments(block))
        if "input_dimensions" in arguments:
            return Place(None if role == "attn_out" else block)
        if {"height", "width"} <= arguments:
            return Place(block)
    if backbone is None or family not in _LEADING:
        return None
    convolution = next(m for m in backbone.module.modules() if isinstance(m, nn.Conv2d))
    height, width = convolution.stride
    registers = getattr(backbone.module.config, "num_register_tokens", 0)
    return Place(backbone.module, (height, width), _LEADING[backbone.model_type] + registers)


def listen(place: Place | None) -> FeatureMap | None:
    """Return the feature map of a place, which listens there from now on; one for each place."""
    if place is None:
        return None
    hooks = place.module._forward_pre_hooks.values() if place.module is not None else ()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((o for o in owners if isinstance(o, FeatureMap)), None) or FeatureMap(place)


def forget_unused(model: nn.Module) -> None:
    """Take away the hooks of feature maps that no layer of a model asks any more."""
    used = {id(m.feature_map) for m in model.modules() if hasattr(m, "feature_map")}
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FeatureMap) and id(owner) not in used:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
