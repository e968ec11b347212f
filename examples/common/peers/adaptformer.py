# SPDX-License-Identifier: Apache-2.0
r"""AdaptFormer (https://arxiv.org/abs/2205.13535), a baseline: a bottleneck beside each MLP.

.. math:: x' = \mathrm{MLP}(x) + s \cdot \mathrm{up}(\mathrm{ReLU}(\mathrm{down}(x)))

with s = 0.1, and the up projection at zero before training. SwinV2 normalises what the sum puts
out; other backbones normalise x.
"""

import math

import torch
from torch import Tensor, nn

from common.peers.peer import Peer, find_blocks, inside, widest
from sfa_peft import Backbone, role_modules

SCALE = 0.1


class Tap(nn.Module):
    """The first linear of an MLP; remembers the input for the branch beside the MLP."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer puts out."""
        self.seen = x
        return self.base_layer(x)


class ParallelAdapter(nn.Module):
    """The last linear of an MLP, and the branch beside the MLP that is added to its output."""

    def __init__(self, layer: nn.Linear, tap: Tap, features: int, width: int) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, layer.out_features)
        # As in the authors' code.
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self._tap = [tap]  # in a list, so that it is not registered as a part a second time

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output plus the branch."""
        (tap,) = self._tap
        beside, tap.seen = tap.seen, None
        return self.base_layer(x) + SCALE * self.up(torch.relu(self.down(beside)))


def add(backbone: Backbone, width: int) -> None:
    """Put a branch beside each MLP of a backbone, whose own weights are frozen.

    Args:
        backbone: What `find_backbone` returns; changed in place.
        width: Width of the bottlenecks; a layer of D features gets min(width, D).
    """
    backbone.module.requires_grad_(False)
    taps: dict[int, Tap] = {}
    for entry in role_modules(backbone):
        parent_path, _, name = inside(backbone, entry.name).rpartition(".")
        parent = backbone.module.get_submodule(parent_path)
        layer = getattr(parent, name)
        if entry.role == "mlp_in":
            taps[entry.block] = Tap(layer)
            setattr(parent, name, taps[entry.block])
        elif entry.role == "mlp_out":
            features = taps[entry.block].base_layer.in_features
            adapter = ParallelAdapter(layer, taps[entry.block], features, min(width, features))
            setattr(parent, name, adapter.to(layer.weight.device, layer.weight.dtype))


def parameters(backbone: Backbone, width: int) -> int:
    """Return the parameters of the branches of a backbone, biases included."""
    pairs = [(b.features, min(width, b.features)) for b in find_blocks(backbone)]
    return sum(2 * features * own + own + features for features, own in pairs)


ADAPTFORMER = Peer("AdaptFormer", add, parameters, "AdaptFormer of width 1", widest)
