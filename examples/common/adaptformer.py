# SPDX-License-Identifier: Apache-2.0
r"""AdaptFormer (https://arxiv.org/abs/2205.13535), a baseline: a bottleneck beside each MLP.

.. math:: x' = \mathrm{MLP}(x) + s \cdot \mathrm{up}(\mathrm{ReLU}(\mathrm{down}(x)))

with s = 0.1, and the up projection at zero before training. SwinV2 normalises what the sum puts
out; other backbones normalise x.
"""

import math

import torch
from torch import Tensor, nn

from sfa_peft import Backbone, RoleModule, role_modules

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


def mlp_widths(backbone: Backbone) -> dict[str, int]:
    """Return the output features of each MLP of a backbone by the path of its last linear."""
    paths = [_inside(backbone, e) for e in role_modules(backbone) if e.role == "mlp_out"]
    return {path: backbone.module.get_submodule(path).out_features for path in paths}


def parameters(features: int, width: int) -> int:
    """Return the parameters of a branch beside an MLP of `features`, biases included."""
    width = min(width, features)
    return 2 * features * width + width + features


def add_adapters(backbone: Backbone, width: int) -> None:
    """Put a branch beside each MLP of a backbone, whose own weights are frozen.

    Args:
        backbone: What `find_backbone` returns; changed in place.
        width: Width of the bottlenecks; a layer of D features gets min(width, D).
    """
    backbone.module.requires_grad_(False)
    taps: dict[int, Tap] = {}
    for entry in role_modules(backbone):
        path = _inside(backbone, entry)
        parent_path, _, name = path.rpartition(".")
        parent = backbone.module.get_submodule(parent_path)
        layer = getattr(parent, name)
        if entry.role == "mlp_in":
            taps[entry.block] = Tap(layer)
            setattr(parent, name, taps[entry.block])
        elif entry.role == "mlp_out":
            features = taps[entry.block].base_layer.in_features
            adapter = ParallelAdapter(layer, taps[entry.block], features, min(width, features))
            setattr(parent, name, adapter.to(layer.weight.device, layer.weight.dtype))


def _inside(backbone: Backbone, entry: RoleModule) -> str:
    return entry.name.removeprefix(f"{backbone.name}.")
