# SPDX-License-Identifier: Apache-2.0
"""LayerNorms between a backbone and a head, which transformers' SwinV2 lacks.

The Swin code of Mask2Former, MIM-Depth and mmsegmentation normalises what each stage puts out, as
transformers' SwinBackbone does; its Swinv2Backbone puts stages out as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sfa_peft.errors import SFAError


class MapNorm(nn.LayerNorm):
    """A LayerNorm over the channels of maps.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, input: Tensor) -> Tensor:
        """Return a map of the same shape ``(B, channels, h, w)``, normalised at each place."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedFeatures(nn.Module):
    """A head, and a norm for each feature map that it is given.

    Put it where a model holds its head: the norms are then trained, counted and saved with it::

        model.decode_head = NormedFeatures(model.decode_head, model.backbone.channels)

    Args:
        head: Module called with a sequence of feature maps first.
        channels: Channels of each feature map.
    """

    def __init__(self, head: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(count) for count in channels)
        self.head = head

    # Named as some heads name it, since their models give it by name.
    def forward(self, hidden_states: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return what the head makes of normalised maps.

        Args:
            hidden_states: Feature maps, each ``(B, channels, h, w)``.
            args: More for the head.
            kwargs: More for the head.

        Raises:
            SFAError: If there are more or fewer maps than norms.
        """
        if len(hidden_states) != len(self.norms):
            raise SFAError(
                f"NormedFeatures: built for {len(self.norms)} feature maps, got "
                f"{len(hidden_states)}; give it the `channels` of the backbone that is used"
            )
        normed = [norm(features) for norm, features in zip(self.norms, hidden_states, strict=True)]
        return self.head(normed, *args, **kwargs)


def find_norms(model: nn.Module) -> dict[str, list[int]]:
    """Return where norms stand before parts of a model, for :func:`add_norms`.

    Args:
        model: A task model.

    Returns:
        By path of a :class:`NormedFeatures` the channels of its maps; by path of a sequence that
        begins with a :class:`MapNorm` the channels of its one map.
    """
    found: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, NormedFeatures):
            norms = [norm for norm in module.norms if isinstance(norm, MapNorm)]
            found[path] = [norm.normalized_shape[0] for norm in norms]
            continue
        first = next(module.children(), None) if isinstance(module, nn.Sequential) else None
        if isinstance(first, MapNorm):
            found[path] = [first.normalized_shape[0]]
    return found


def add_norms(model: nn.Module, norms: Mapping[str, Sequence[int]]) -> None:
    """Put norms before parts of a model, in place; what :func:`find_norms` found in one like it.

    Args:
        model: The task model, without them.
        norms: Channels by path. A part that is a sequence gets its norm inside, first; another
            one becomes a :class:`NormedFeatures`.

    Raises:
        SFAError: If the model has no part of that path.
    """
    for path, channels in norms.items():
        try:
            part = model.get_submodule(path)
        except AttributeError as error:
            raise SFAError(f"norms of `{path}`: {type(model).__name__} has no such part") from error
        if isinstance(part, nn.Sequential):
            model.set_submodule(path, nn.Sequential(MapNorm(channels[0]), *part))
        else:
            model.set_submodule(path, NormedFeatures(part, channels))
