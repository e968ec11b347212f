# SPDX-License-Identifier: Apache-2.0
r"""Mona (https://arxiv.org/abs/2408.08345): two convolutional adapters in a block.

.. math::
    u &= \mathrm{down}(\mathrm{LN}(x) \odot g + x \odot g_x) \\
    v &= u + (\mathrm{dw}_3(u) + \mathrm{dw}_5(u) + \mathrm{dw}_7(u)) / 3 \\
    y &= x + \mathrm{up}(\mathrm{GELU}(v + \mathrm{conv}_1(v)))

Each acts on the sum that a residual has just been added to; dw are depthwise convolutions over the
feature map. As in the authors' code, g starts at 1e-6 and :math:`g_x` at 1 for each channel (the
paper's count has one number for both), convolutions have biases, and a tenth of the features before
`up` is dropped in training; linears start from N(0, 0.02). Not quite the pretrained model before
training. Tokens that are not in the map (a class token) pass by the convolutions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.peers.peer import Peer, attach, changed, find_blocks, widest
from sfa_peft import Backbone, TargetError

KERNELS = (3, 5, 7)
DROPPED = 0.1


class Mona(nn.Module):
    """What one adapter adds.

    Args:
        features: Channels of the block.
        width: Of the bottleneck.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.norm_scale = nn.Parameter(torch.full((features,), 1e-6))
        self.input_scale = nn.Parameter(torch.ones(features))
        self.down = nn.Linear(features, width)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in KERNELS
        )
        self.mix = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(DROPPED)
        self.up = nn.Linear(width, features)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return what is added to tokens `(B, ..., C)`, of which the last are the map's rows."""
        reduced = self.down(self.norm(x) * self.norm_scale + x * self.input_scale)
        before, tokens = reduced.split([x.shape[1] - height * width, height * width], dim=1)
        maps = tokens.transpose(1, 2).unflatten(2, (height, width))
        maps = maps + sum(conv(maps) for conv in self.depthwise) / len(KERNELS)
        maps = maps + self.mix(maps)
        tokens = torch.cat((before, maps.flatten(2).transpose(1, 2)), dim=1)
        return self.up(self.dropout(nn.functional.gelu(tokens)))


class Pair(nn.Module):
    """The two adapters of a block, and the hooks that let them act.

    The sum after attention is both what the MLP reads and what its output is added to, so the first
    adapter acts before the reader and once more on what the block puts out.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.after_attention = Mona(features, width)
        self.after_mlp = Mona(features, width)
        self._size = (0, 0)
        self._added: Tensor | None = None

    def enter(self, _block: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember height and width of the map, which SwinV2's blocks are called with."""
        self._size = args[1]

    def see(self, embeddings: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember height and width of the map that ViT's embeddings make of the images."""
        height, width = embeddings.patch_embeddings.projection.kernel_size
        self._size = (args[0].shape[-2] // height, args[0].shape[-1] // width)

    def read(self, _reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Act before what reads the sum after attention."""
        self._added = self.after_attention(args[0], *self._size)
        return (args[0] + self._added, *args[1:])

    def leave(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Act on what the block puts out."""
        return changed(output, self._last)

    def _last(self, x: Tensor) -> Tensor:
        added, self._added = self._added, None
        x = x + added
        return x + self.after_mlp(x, *self._size)


def add(backbone: Backbone, width: int) -> None:
    """Put two adapters into each block of a backbone, whose own weights are frozen.

    Args:
        backbone: What `find_backbone` returns, a SwinV2 or ViT; changed in place.
        width: Width of the bottlenecks; a block of D channels gets min(width, D).

    Raises:
        TargetError: If it is another backbone.
    """
    if backbone.model_type not in ("swinv2", "vit"):
        raise TargetError(f"--method mona: knows SwinV2 and ViT, got {backbone.model_type}")
    backbone.module.requires_grad_(False)
    for block in find_blocks(backbone):
        pair = Pair(block.features, min(width, block.features))
        attach(block.module, "mona", pair)
        if backbone.model_type == "swinv2":  # norms after the MLP
            block.module.register_forward_pre_hook(pair.enter)
            block.module.intermediate.register_forward_pre_hook(pair.read)
        else:
            backbone.module.embeddings.register_forward_pre_hook(pair.see)
            block.module.layernorm_after.register_forward_pre_hook(pair.read)
        block.module.register_forward_hook(pair.leave)


def parameters(backbone: Backbone, width: int) -> int:
    """Return the parameters of the adapters of a backbone."""
    weights = sum(size**2 + 1 for size in KERNELS)
    pairs = [(b.features, min(width, b.features)) for b in find_blocks(backbone)]
    return sum(2 * ((2 * n + 5) * m + n**2 + (2 + weights) * n) for m, n in pairs)


MONA = Peer("Mona", add, parameters, "Mona of width 1", widest)
