# SPDX-License-Identifier: Apache-2.0
"""The part of a pool that belongs to one weight (see `weight.Slice`).

Where weights are cut over ranks, it is that of the entries which lie on this rank. Only the
gradient is gathered at all of them, since that of a whole weight comes by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .delta import Spans
from .shards import Shard
from .write_lock import is_stand_in


def _small(numbers: Tensor) -> Tensor:
    """Return numbers, not negative, in the smallest type that indexes tensors."""
    few = not numbers.numel() or int(numbers.max()) <= torch.iinfo(torch.int32).max
    return numbers.to(torch.int32 if few else torch.int64)


class PoolSlice:
    """One weight's part of a pool.

    Args:
        pool: The pool (`pool.Pool`, which imports this).
        ordinal: Which of its weights.
    """

    def __init__(self, pool: Any, ordinal: int) -> None:
        self.pool, self.ordinal = pool, ordinal
        self._entries: tuple[Spans, Shard, tuple[Tensor, Tensor]] | None = None
        self._everywhere: tuple[Spans, Tensor] | None = None

    @property
    def spans(self) -> Spans:
        """The weight's slots; another object whenever they are others."""
        return self.pool.layout()[self.ordinal]

    @property
    def trains(self) -> bool:
        """Whether the values get a gradient."""
        return self.pool.values.requires_grad

    @property
    def is_stand_in(self) -> bool:
        """Whether the values are not the real ones (see `writing.is_stand_in`)."""
        return is_stand_in(self.pool.values)

    @property
    def keeps_graph(self) -> bool:
        """Whether it is the last weight while nothing is selected: DDP waits for the values."""
        return self.ordinal == len(self.pool.weights) - 1 and self.pool.is_empty

    @property
    def shard(self) -> Shard | None:
        """This rank's part of the weight; None where the weight is whole."""
        return self.pool.weights[self.ordinal].shard

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Of a weight that is cut, (positions in this rank's part, slots) of what lies there.

        int32 where that can name them.
        """
        spans, shard, known = self.spans, self.shard, self._entries
        if shard is None:
            raise TypeError("the weight is whole")
        if known is None or known[0] is not spans or known[1] is not shard:
            index = self.pool.indices(self.ordinal)
            here = shard.places(index)
            ranges = [torch.arange(a, b, device=index.device) for a, b in spans]
            slots = torch.cat(ranges) if ranges else index
            found = _small(index[here] - shard.first), _small(slots[here])
            known = self._entries = (spans, shard, found)
        return known[2]

    def stamp(self) -> tuple[Any, ...]:
        """Return what changes whenever values or slots do."""
        return self.pool.stamp()

    def indices(self) -> Tensor:
        """Return flat positions, int64 (n,), in slot order."""
        return self.pool.indices(self.ordinal) if self.shard is None else self.entries[0].long()

    def everywhere(self, weight: Tensor) -> Tensor:
        """Return flat positions in the whole weight, on its device; on every rank the same."""
        known, device = self._everywhere, weight.device
        if known is None or known[0] is not self.spans or known[1].device != device:
            few = weight.numel() <= torch.iinfo(torch.int32).max
            room = self.pool.room(self.ordinal, torch.int32 if few else torch.int64, device)
            known = (self.spans, room.copy_(self.pool.indices(self.ordinal)))
            self._everywhere = known
        return known[1]

    def change(self) -> Tensor:
        """Return values, (n,), in slot order."""
        if self.shard is not None:
            return self.pool.gathered().index_select(0, self.entries[1])
        values = self.pool.values
        parts = [values[a:b] for a, b in self.spans]
        if not parts:
            return values[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def room(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return room for one number per entry, in the pool's buffer."""
        if self.shard is not None:
            return torch.empty(self.entries[0].numel(), dtype=dtype, device=device)
        return self.pool.room(self.ordinal, dtype, device)

    def free_room(self) -> None:
        """Let go of that buffer."""
        self.pool.free_room()

    def stand_in(self) -> Tensor:
        """Return what is wired to the values' gradient."""
        return self.pool.stand_ins()[self.ordinal]
