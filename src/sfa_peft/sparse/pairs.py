# SPDX-License-Identifier: Apache-2.0
"""Writes from one adapter to another in one pass, kept for pairs that are switched again.

To put back the entries of one adapter and then to write those of the other touches most of the
memory twice. A pair holds what both together come to, at the union of their entries. Whatever the
entries were made of, a pair lives as long as both of them, and no longer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SFAError
from .write_lock import put, rows

#: Bytes for all pairs of the process, unless `limit_switch_memory` is called.
_LIMIT = 512 << 20
#: Bytes of a position (int64).
_INDEX_BYTES = 8
#: Most pairs that were met once and are remembered for that.
_MOST_MET = 1 << 16
#: A pair gives way to another one if it was not used for so many uses of each that is kept.
_LEAST_USES = 8


@dataclass(eq=False)
class Pair:
    """What a weight gets where one adapter's entries give way to another's, or to the originals.

    Attributes:
        indices: Flat positions in the weight, or numbers of blocks, int64: what torch writes by,
            as to make that of int32 each time takes a quarter of a switch. None for all of it.
        entries: What it holds there afterwards.
        used: Number of the use that was its last.
    """

    indices: Tensor | None
    entries: Tensor
    used: int = 0

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return self.entries.nbytes + (0 if self.indices is None else self.indices.nbytes)

    def write(self, weight: Tensor) -> None:
        """Lead from one adapter to the other."""
        if self.indices is None:
            weight.detach().copy_(self.entries)
        else:
            put(weight, self.indices, self.entries)


class Pairs:
    """The pairs of all weights, within a bound of memory."""

    def __init__(self) -> None:
        self.limit, self.nbytes = _LIMIT, 0
        self._kept: dict[Hashable, Pair] = {}
        self._ends: dict[Hashable, tuple[Any, ...]] = {}  # of what is kept
        self._met: set[Hashable] = set()
        self._uses = 0
        self._lock = threading.RLock()  # entries may end at any time, also inside of it

    def write(self, before: Sequence[Any], after: Sequence[Any], weight: Tensor) -> bool:
        """Lead a weight from some entries to others (none: the originals), if that is kept."""
        pair = self.find(_key(before, after))
        if pair is not None:
            pair.write(weight)
        return pair is not None

    def find(self, key: Hashable) -> Pair | None:
        """Return what is kept."""
        self._uses += 1
        pair = self._kept.get(key)
        if pair is not None:
            pair.used = self._uses
        return pair

    def note(self, before: Sequence[Any], after: Sequence[Any], weight: Tensor) -> None:
        """Keep what led from one adapter to another, where it did so before and there is room.

        Args:
            before: The entries that were put back.
            after: The entries that were written then; nothing is kept unless both are one
                adapter's or none, and finished (see `weight`).
            weight: It holds them now.
        """
        both = (*before, *after)
        if max(len(before), len(after)) != 1 or any(e.adapted is None for e in both):
            return
        key = _key(before, after)
        lists = sum(_INDEX_BYTES * e.indices.numel() + e.undo.nbytes for e in both)
        most = min(lists, weight.nbytes)
        with self._lock:
            if key in self._kept or both[0].undo.ndim != both[-1].undo.ndim:
                return
            if key not in self._met:  # perhaps never again
                if len(self._met) >= _MOST_MET:
                    self._met.clear()
                self._met.add(key)
                return
            if not self._make_room(most):
                return  # asked before one is made, which takes longer than to do without
        pair = _united(both, weight)
        pair.used = self._uses
        with self._lock:
            self._kept[key] = pair
            self._ends[key] = tuple(weakref.ref(e, lambda _: self._drop(key)) for e in both)
            self.nbytes += pair.nbytes
            self.shrink(self.limit)  # other threads may have made pairs meanwhile

    def _make_room(self, nbytes: int) -> bool:
        """Let go of what is no longer used; return whether there is room."""
        while self._kept and self.nbytes + nbytes > self.limit:
            oldest, pair = self._oldest()
            if self._uses - pair.used <= _LEAST_USES * len(self._kept):
                return False
            self._drop(oldest)
        return self.nbytes + nbytes <= self.limit

    def shrink(self, limit: int) -> None:
        """Set the limit, and let go of pairs beyond it, those that were not used for long first."""
        with self._lock:
            self.limit = limit
            while self.nbytes > limit:
                self._drop(self._oldest()[0])

    def _oldest(self) -> tuple[Hashable, Pair]:
        # A copy: entries may end, and with them pairs, while this looks at them.
        return min(list(self._kept.items()), key=lambda item: item[1].used)

    def _drop(self, key: Hashable) -> None:
        with self._lock:
            pair = self._kept.pop(key, None)
            self._ends.pop(key, None)
            self.nbytes -= 0 if pair is None else pair.nbytes


PAIRS = Pairs()


def limit_switch_memory(nbytes: int) -> int:
    """Bound what this process keeps to switch between two adapters in one pass.

    A pair of adapters takes, in each direction and on the weights' device, 8 bytes and a weight's
    own (12 in float32) for each entry that one of them selects, but never more than the weights
    themselves. An adapter and the pretrained weights are such a pair too, where adapters are
    disabled again and again. Pairs are kept from the second switch on. Those for which there is no
    room are written in two passes.

    Args:
        nbytes: Most bytes for all pairs together; 536,870,912 unless this is called. 0 keeps none.

    Returns:
        The bytes that are kept now.

    Raises:
        SFAError: If it is no whole number of at least 0.
    """
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
        raise SFAError(
            f"limit_switch_memory: expected a number of bytes, 0 or more, got {nbytes!r}. "
            "limit_switch_memory(0) keeps nothing."
        )
    PAIRS.shrink(nbytes)
    return PAIRS.nbytes


def _key(before: Sequence[Any], after: Sequence[Any]) -> Hashable:
    return tuple(map(id, before)), tuple(map(id, after))


def _united(both: Sequence[Any], weight: Tensor) -> Pair:
    flat = rows(weight, both[0].undo)
    is_in = torch.zeros(flat.shape[0], dtype=torch.bool, device=flat.device)
    for entries in both:
        is_in[entries.indices.long()] = True
    indices = is_in.nonzero().squeeze(1)
    if indices.nbytes + indices.numel() * flat[:1].nbytes >= weight.nbytes:
        return Pair(None, weight.detach().clone())  # takes less memory, and no more time
    return Pair(indices, flat[indices])
