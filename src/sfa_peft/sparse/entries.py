# SPDX-License-Identifier: Apache-2.0
"""The entries of one adapter in a weight: what is written there, and what is put back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from .delta import Spans
from .gradient import Support
from .write_lock import BLOCK, blocks_of


@dataclass
class Entries:
    """One adapter's entries in a weight: to be written, and what is put back.

    Attributes:
        indices: Flat positions, int32 (int64 in a huge weight); of blocks where they are finished
            and come in whole blocks.
        undo: The weight's original entries there, in its dtype (n,), or (n, BLOCK).
        spans: Where they are in slot order: the slots they were read from.
        stamp: Where they are finished: what the changes were when they were added.
        adapted: Where they are finished: what the weight holds there while only they are on it.
        support: The part of a matrix that they lie in, once somebody asked.
    """

    indices: Tensor
    undo: Tensor
    spans: Spans | None = None
    stamp: tuple[Any, ...] = ()
    adapted: Tensor | None = None
    support: Support | None = None

    def flat_indices(self) -> Tensor:
        """Return flat positions, also where they are in blocks."""
        if self.undo.ndim == 1:
            return self.indices
        inside = torch.arange(BLOCK, device=self.indices.device)
        return (self.indices[:, None].long() * BLOCK + inside).flatten()

    def renewed(self) -> Entries:
        """Return the same as another object, where others wrote the weight: that ends its pairs."""
        return replace(self)

    def in_blocks(self, weight: Tensor) -> Entries:
        """Return finished entries by block where they come in whole ones."""
        blocks = blocks_of(self.indices, weight.numel())
        if blocks is None:
            return self
        undo, adapted = (cast(Tensor, t).view(-1, BLOCK) for t in (self.undo, self.adapted))
        return replace(self, indices=blocks, undo=undo, adapted=adapted)
