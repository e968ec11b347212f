# SPDX-License-Identifier: Apache-2.0
r"""Adapter+ (https://arxiv.org/abs/2406.06820): a bottleneck after each block, scaled by channel.

.. math:: y = x + s \odot \mathrm{up}(\mathrm{GELU}(\mathrm{down}(x)))

where x is what the block puts out, its residual included ("post"), and s starts as ones. Weights
start as Houlsby's do, so that the model is almost the pretrained one before training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.peers.peer import Peer, attach, changed, find_blocks, widest
from sfa_peft import Backbone

HOULSBY = 0.01  # standard deviation, cut off at two of them


class Adapter(nn.Module):
    """A bottleneck with a residual and a learnable scale for each channel.

    Args:
        features: Channels of the block.
        width: Of the bottleneck.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        self.scale = nn.Parameter(torch.ones(features))
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=HOULSBY, a=-2 * HOULSBY, b=2 * HOULSBY)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(..., C)` with what the bottleneck adds."""
        return x + self.scale * self.up(nn.functional.gelu(self.down(x)))

    def after(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Act on a block's output, as a hook of it."""
        return changed(output, self)


def add(backbone: Backbone, width: int) -> None:
    """Put an adapter after each block of a backbone, whose own weights are frozen.

    Args:
        backbone: What `find_backbone` returns; changed in place.
        width: Width of the bottlenecks; a block of D channels gets min(width, D).
    """
    backbone.module.requires_grad_(False)
    for block in find_blocks(backbone):
        adapter = Adapter(block.features, min(width, block.features))
        attach(block.module, "adapter_plus", adapter)
        block.module.register_forward_hook(adapter.after)


def parameters(backbone: Backbone, width: int) -> int:
    """Return the parameters of the adapters of a backbone."""
    pairs = [(b.features, min(width, b.features)) for b in find_blocks(backbone)]
    return sum(2 * features * own + own + 2 * features for features, own in pairs)


ADAPTER_PLUS = Peer("Adapter+", add, parameters, "Adapter+ of width 1", widest)
