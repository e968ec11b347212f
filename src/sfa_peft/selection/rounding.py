# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to bfloat16, so that sums of many small gradients are kept on average.

A bfloat16 is the upper half of a float32. Adding a uniform 16-bit number to the lower half before
cutting it off rounds up with the probability that makes the expected value right.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

#: Entries rounded together; also the length of the noise that is used again, turned each time:
#: as many as there are 16-bit numbers.
_TILE = 1 << 16
_INF_BITS = 0x7F800000


class Noise:
    """Uniform 16-bit numbers: one tile, turned by another offset for every piece it is used on.

    Args:
        seed: Seed of the tile and of the offsets.
        device: Where the tile lies.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Every number once, so that over all offsets an entry meets each equally often.
        tile = torch.randperm(_TILE, dtype=torch.int32, generator=generator)
        self._tile = torch.cat([tile, tile]).to(device)

    def draw(self, size: int, key: str) -> Tensor:
        """Return `size` numbers (int32, at most a tile) that depend on the key alone."""
        first = Random(key).randrange(_TILE)
        return self._tile[first : first + size]


def add_rounded(target: Tensor, addend: Tensor, noise: Noise, key: str) -> None:
    """Add to a bfloat16 tensor in place, rounding stochastically.

    Args:
        target: bfloat16, contiguous.
        addend: Any float dtype, same number of entries.
        noise: Where random bits come from.
        key: What the bits depend on; the same key gives the same result.
    """
    flat, more = target.view(-1), addend.reshape(-1)
    for first in range(0, flat.numel(), _TILE):
        piece = flat[first : first + _TILE]
        exact = piece.float().add_(more[first : first + _TILE])
        piece.copy_(round_stochastically(exact, noise, f"{key}/{first}"))


def round_stochastically(exact: Tensor, noise: Noise, key: str) -> Tensor:
    """Return a float32 piece (at most a tile, overwritten) rounded to what bfloat16 can hold."""
    bits = exact.view(torch.int32)
    special = (bits & _INF_BITS) == _INF_BITS  # infinity and NaN stay as they are
    rounded = (bits + noise.draw(bits.numel(), key).masked_fill(special, 0)) & -0x10000
    return rounded.view(torch.float32)
