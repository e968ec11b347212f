# SPDX-License-Identifier: Apache-2.0
"""Selected entries in a live weight: written, withdrawn, and tapped for their gradient.

Invariant: while `live` is empty the weight holds the pretrained bits; otherwise it differs from
them only at the entries of the adapters named there, and `undo` can put them back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .delta import Observer, Spans, Tap
from .pool import Pool, version

#: One lock for all weights: they are written rarely, and a lock of its own cannot be copied.
_LOCK = threading.RLock()

_F = TypeVar("_F", bound=Callable[..., Any])


def eager(function: _F) -> _F:
    """Keep a function out of graphs that torch.compile makes."""
    return cast(_F, torch.compiler.disable(function))


class CompiledPass:
    """One compiled forward of a whole model: what layers prepared holds while it is open."""

    is_open = False


@dataclass
class Support:
    """One adapter's entries in one weight."""

    spans: Spans
    indices: Tensor  # flat positions, int32 (int64 in a huge weight), in slot order
    undo: Tensor  # the weight's original entries there, in its dtype


class LiveEntries:
    """What the adapters of one layer do to one of its parameters.

    Values are written absolutely and originals put back by overwriting, never by adding and
    subtracting, so that switching is exact in every dtype. Every method gets the weight, because
    loading, casting and wrapping may replace it.
    """

    def __init__(self) -> None:
        self.pools: dict[str, tuple[Pool, int]] = {}  # by adapter: its pool, this weight's ordinal
        self.earlier: dict[str, tuple[str, ...]] = {}  # by adapter: pools that belong to its base
        self.observers: dict[str, Observer] = {}  # get the dense gradient (scores)
        self.candidates: dict[str, Tensor] = {}  # change of all entries while candidates train
        self.live: tuple[str, ...] = ()
        self.in_graph = False  # a backward that needs the weight as it is may still come
        self.prepared: tuple[list[Tap], list[Tensor]] = ([], [])  # for a compiled forward
        self._supports: dict[str, Support] = {}
        self._pretrained: Tensor | None = None  # the whole weight, while candidates train
        self._stamp: tuple[Any, ...] | None = None
        self._weight_stamp: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no selector; a selector that is copied with it attaches itself.
        return self.__dict__ | {"observers": {}, "candidates": {}, "prepared": ([], [])}

    @eager  # stamps and in-place writes are for Python, not for a graph
    def refresh(self, weight: Tensor, names: list[str]) -> None:
        """Make the weight hold the changes of the named adapters; do nothing if it does."""
        earlier = dict.fromkeys(e for name in names for e in self.earlier.get(name, ()))
        wanted = (*earlier, *(name for name in names if name in self.pools))
        if self._stamp_of(weight, wanted) == self._stamp:
            return
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            if self._stamp_of(weight, wanted) == self._stamp:
                return  # another thread was faster
            self.withdraw(weight)
            if self._weight_stamp != _weight_stamp(weight):
                self._supports.clear()  # somebody replaced or changed the weight
            for name in wanted:  # originals first: adapters may share entries
                self._supports[name] = self._find_support(name, weight)
            if self._pretrained is None and any(name in self.candidates for name in wanted):
                self._pretrained = weight.detach().clone()
            for position, name in enumerate(wanted):
                if position == len(earlier):
                    self._write_candidates(wanted, weight)
                self._write(name, weight, onto_others=position > 0)
            self.live = wanted
            self._weight_stamp = _weight_stamp(weight)
            self._stamp = self._stamp_of(weight, wanted)

    def withdraw(self, weight: Tensor) -> None:
        """Put the original entries back into the weight, to the bit."""
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            if self.live:
                self._restore(weight)
                self.live, self._pretrained = (), None
                self._weight_stamp = _weight_stamp(weight)
            self._stamp = None
            self.in_graph = False

    def forget(self) -> None:
        """Look at the weight anew next time; it must hold the originals then."""
        self._supports.clear()

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter; the weight must hold the originals."""
        before = self.earlier.pop(adapter_name, ())
        unused = set(before).difference(*self.earlier.values())
        for container in (self.pools, self.observers, self.candidates, self._supports):
            for name in (adapter_name, *unused):
                container.pop(name, None)

    def originals_at(self, weight: Tensor, adapter_name: str) -> Tensor:
        """Return the pretrained entries that an adapter changes, in slot order."""
        if adapter_name not in self.live:
            self.withdraw(weight)
            self._supports[adapter_name] = self._find_support(adapter_name, weight)
        return self._supports[adapter_name].undo

    def original(self, weight: Tensor) -> Tensor:
        """Return a copy of the weight with the original entries."""
        copy = weight.detach().clone()
        self._restore(copy)
        return copy

    def foundation(self, weight: Tensor, adapter_name: str) -> Tensor:
        """Return a copy of the weight as an adapter finds it: with earlier changes in it."""
        copy = self.original(weight)
        with torch.no_grad():
            for name in self.earlier.get(adapter_name, ()):
                self._supports.setdefault(name, self._find_support(name, copy))
                self._write(name, copy, onto_others=True)
        return copy

    def taps(self) -> tuple[list[Tap], list[Tensor]]:
        """Return what live adapters want from the weight's gradient, and their slices of values."""
        taps, slices = [], []
        self.in_graph = self.in_graph or bool(self.live)
        for name in self.live:
            pool, ordinal = self.pools[name]
            observer, support = self.observers.get(name), self._supports[name]
            # While nothing is selected one layer keeps the values in the graph: DDP waits for them.
            wanted = observer is not None or support.spans or pool.is_last_of_empty(ordinal)
            if pool.values.requires_grad and wanted:
                taps.append(Tap(support.indices, observer))
                slices.append(pool.slices()[ordinal])
        return taps, slices

    def _write_candidates(self, names: tuple[str, ...], weight: Tensor) -> None:
        """Add the change of all entries of an adapter whose candidates train (Eq. 4)."""
        for name in names:
            if name in self.candidates:
                change = self.candidates[name].to(weight.device)
                weight.detach().copy_((weight.detach().float() + change).to(weight.dtype))

    def _restore(self, weight: Tensor) -> None:
        if self._pretrained is not None:
            weight.detach().copy_(self._pretrained)
            return
        flat = weight.detach().view(-1)
        for name in self.live:
            support = self._supports[name]
            if support.indices.numel():
                flat.scatter_(0, support.indices.long(), support.undo)

    def _find_support(self, name: str, weight: Tensor) -> Support:
        """Return an adapter's entries; the weight must hold the originals."""
        pool, ordinal = self.pools[name]
        spans = pool.layout()[ordinal]
        known = self._supports.get(name)
        if known is not None and known.spans is spans:
            return known
        index = pool.indices(ordinal).to(weight.device)
        small = weight.numel() <= torch.iinfo(torch.int32).max
        indices = pool.room(ordinal, torch.int32 if small else torch.int64, weight.device)
        undo = pool.room(ordinal, weight.dtype, weight.device)
        indices.copy_(index)
        torch.index_select(weight.detach().view(-1), 0, index, out=undo)
        return Support(spans, indices, undo)

    def _write(self, name: str, weight: Tensor, *, onto_others: bool) -> None:
        """Write original plus change, added in fp32; on shared entries onto what is there."""
        support = self._supports[name]
        if not support.indices.numel():
            return
        flat, index = weight.detach().view(-1), support.indices.long()
        start = flat.index_select(0, index) if onto_others else support.undo
        values = self.pools[name][0].values.detach()
        parts = [values[a:b] for a, b in support.spans]
        change = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(start.device)
        flat.scatter_(0, index, (start.float() + change).to(start.dtype))  # faster than index_copy_

    def _stamp_of(self, weight: Tensor, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Return what must not have changed for the weight to be up to date."""
        pools = tuple(self.pools[name][0].stamp() for name in names)
        changes = tuple(version(self.candidates[n]) for n in names if n in self.candidates)
        return names, _weight_stamp(weight), pools, changes


def _weight_stamp(weight: Tensor) -> tuple[Any, ...]:
    return id(weight), weight.dtype, weight.device, version(weight)
