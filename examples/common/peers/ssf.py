# SPDX-License-Identifier: Apache-2.0
r"""SSF (https://arxiv.org/abs/2210.08823): a scale and a shift after each operation.

.. math:: y = \gamma \odot x + \beta

for what each attention and MLP linear, each norm and the patch embedding put out, a number for each
channel. As in the authors' code scales start from N(1, 0.02) and shifts from N(0, 0.02), so that
the model is not quite the pretrained one before training. The scale is kept as its difference from
1: what weight decay pulls to is the pretrained model, not zero features.
"""

import torch
from torch import Tensor, nn

from common.peers.peer import Peer, attach, inside
from sfa_peft import Backbone, role_modules

SPREAD = 0.02


class ScaleShift(nn.Module):
    """Scales and shifts what a layer puts out.

    Args:
        features: Channels of the layer's output.
        trailing: Axes after the channels: two of a convolution, none of other layers.
    """

    def __init__(self, features: int, trailing: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(features))  # its difference from 1
        self.shift = nn.Parameter(torch.empty(features))
        nn.init.normal_(self.scale, std=SPREAD)
        nn.init.normal_(self.shift, std=SPREAD)
        self._shape = (features, *[1] * trailing)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(..., C)`, or `(B, C, H, W)` of a convolution, scaled and shifted."""
        return x * (1 + self.scale.view(self._shape)) + self.shift.view(self._shape)

    def after(self, _layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Act on a layer's output, as a hook of it."""
        return self(output)


def add(backbone: Backbone, _size: int = 1) -> None:
    """Put a scale and a shift after each operation of a backbone, whose own weights are frozen."""
    backbone.module.requires_grad_(False)
    for layer, features in _operations(backbone):
        part = ScaleShift(features, trailing=2 if isinstance(layer, nn.Conv2d) else 0)
        attach(layer, "ssf", part)
        layer.register_forward_hook(part.after)


def parameters(backbone: Backbone, _size: int = 1) -> int:
    """Return how many scales and shifts a backbone gets."""
    return sum(2 * features for _, features in _operations(backbone))


def _operations(backbone: Backbone) -> list[tuple[nn.Module, int]]:
    """Return the layers that are followed by a scale and a shift, with their output channels."""
    roles = {inside(backbone, entry.name) for entry in role_modules(backbone)}
    found: list[tuple[nn.Module, int]] = []
    for path, module in backbone.module.named_modules():
        if isinstance(module, nn.LayerNorm):
            found.append((module, module.normalized_shape[-1]))
        elif isinstance(module, nn.Conv2d):  # the patch embedding
            found.append((module, module.out_channels))
        elif path in roles:
            found.append((module, module.out_features))
    return found


SSF = Peer("SSF", add, parameters)
