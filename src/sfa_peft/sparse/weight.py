# SPDX-License-Identifier: Apache-2.0
"""Selected entries in a live weight: written, withdrawn, and tapped for their gradient.

Invariant: while `live` is empty the weight holds the pretrained bits; otherwise it differs from
them only at the entries of the adapters named there, and `undo` can put them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .gradient import Observer, Tap
from .kept import Finished, Support, index_dtype, put
from .pool import Pool, version
from .spans import Spans
from .writing import exclusively

_F = TypeVar("_F", bound=Callable[..., Any])


def eager(function: _F) -> _F:
    """Keep a function out of graphs that torch.compile makes."""
    return cast(_F, torch.compiler.disable(function))


class CompiledPass:
    """One compiled forward of a whole model: what layers prepared holds while it is open."""

    is_open = False


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
        self._finished: dict[str, Finished] = {}
        self._written: list[tuple[Tensor, Tensor]] = []  # positions in the weight, originals there
        self._pretrained: Tensor | None = None  # the whole weight, while candidates train
        self._stamp: tuple[Any, ...] | None = None
        self._weight_stamp: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no selector; a selector that is copied with it attaches itself.
        return self.__dict__ | {"observers": {}, "candidates": {}, "prepared": ([], [])}

    @eager  # stamps and in-place writes are for Python, not for a graph
    def refresh(self, weight: Tensor, names: list[str], *, keep: bool = False) -> None:
        """Make the weight hold the changes of the named adapters; do nothing if it does.

        Args:
            weight: The weight.
            names: Adapters; those that do not change this weight are left out.
            keep: Whether to keep what is written, so that the next time is faster. It takes room
                for two more numbers per entry, so it is for adapters that do not train now.
        """
        earlier = dict.fromkeys(e for name in names for e in self.earlier.get(name, ()))
        wanted = (*earlier, *(name for name in names if name in self.pools))
        if self._stamp_of(weight, wanted) == self._stamp:
            return
        with exclusively(), torch.inference_mode(weight.is_inference()), torch.no_grad():
            values = self._values_stamp(wanted)
            if (wanted, _weight_stamp(weight), values) == self._stamp:
                return  # another thread was faster
            self._withdraw(weight)
            if self._weight_stamp != _weight_stamp(weight):
                self.forget()  # somebody replaced or changed the weight
            if len(wanted) != 1 or not self._write_finished(wanted[0], values, weight, keep=keep):
                self._write_all(wanted, weight, num_earlier=len(earlier))
            self.live = wanted
            self._weight_stamp = _weight_stamp(weight)
            self._stamp = wanted, self._weight_stamp, values

    def withdraw(self, weight: Tensor) -> None:
        """Put the original entries back into the weight, to the bit."""
        with exclusively(), torch.inference_mode(weight.is_inference()), torch.no_grad():
            self._withdraw(weight)
            self._stamp = None
            self.in_graph = False

    def _withdraw(self, weight: Tensor) -> None:
        if self.live:
            self._restore(weight)
            self.live, self._written, self._pretrained = (), [], None
            self._weight_stamp = _weight_stamp(weight)
        self.in_graph = False

    def forget(self) -> None:
        """Look at the weight anew next time; it must hold the originals then."""
        self._supports.clear()
        self._finished.clear()

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter; the weight must hold the originals."""
        before = self.earlier.pop(adapter_name, ())
        unused = set(before).difference(*self.earlier.values())
        for container in self._containers():
            for name in (adapter_name, *unused):
                container.pop(name, None)

    def _containers(self) -> list[dict[str, Any]]:
        return [self.pools, self.observers, self.candidates, self._supports, self._finished]

    def originals_at(self, weight: Tensor, adapter_name: str) -> Tensor:
        """Return the pretrained entries that an adapter changes, in slot order."""
        if adapter_name not in self.live:
            self.withdraw(weight)
        return self._support(adapter_name, weight).undo

    def original(self, weight: Tensor) -> Tensor:
        """Return a copy of the weight with the original entries."""
        copy = weight.detach().clone()
        self._restore(copy)
        return copy

    def pretrained(self, weight: Tensor) -> Tensor:
        """Return the weight with the original entries, a copy only where changes are live."""
        return self.original(weight) if self.live else weight.detach()

    def foundation(self, weight: Tensor, adapter_name: str) -> Tensor:
        """Return a copy of the weight as an adapter finds it: with earlier changes in it."""
        copy = self.original(weight)
        with torch.no_grad():
            for name in self.earlier.get(adapter_name, ()):
                self._write(name, copy, self._support(name, copy), onto_others=True)
        return copy

    def taps(self, weight: Tensor) -> tuple[list[Tap], list[Tensor]]:
        """Return what live adapters want from the weight's gradient, and their slices of values."""
        taps, slices = [], []
        self.in_graph = self.in_graph or bool(self.live)
        for name in self.live:
            pool, ordinal = self.pools[name]
            observer, support = self.observers.get(name), self._support(name, weight)
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
        for indices, undo in self._written:
            put(weight, indices, undo)

    def _support(self, name: str, weight: Tensor) -> Support:
        """Return an adapter's entries; the weight must hold the originals, or these entries."""
        pool, ordinal = self.pools[name]
        spans = pool.layout()[ordinal]
        known = self._supports.get(name)
        if known is not None and known.spans is spans:
            return known
        index = pool.indices(ordinal).to(weight.device)
        indices = pool.room(ordinal, index_dtype(weight), weight.device)
        undo = pool.room(ordinal, weight.dtype, weight.device)
        indices.copy_(index)
        finished = self._finished.get(name)
        if name in self.live and finished is not None:
            undo[index.argsort()] = finished.undo
        else:
            torch.index_select(weight.detach().view(-1), 0, index, out=undo)
        self._supports[name] = Support(spans, indices, undo)
        return self._supports[name]

    def _write_all(self, names: tuple[str, ...], weight: Tensor, *, num_earlier: int) -> None:
        """Write originals plus changes, and what is needed to train them."""
        for name in names:  # originals first: adapters may share entries
            self._finished.pop(name, None)
            self._support(name, weight)
        if self._pretrained is None and any(name in self.candidates for name in names):
            self._pretrained = weight.detach().clone()
        for position, name in enumerate(names):
            if position == num_earlier:
                self._write_candidates(names, weight)
            support = self._supports[name]
            self._write(name, weight, support, onto_others=position > 0)
            self._written.append((support.indices, support.undo))

    def _write(self, name: str, weight: Tensor, support: Support, *, onto_others: bool) -> None:
        """Write original plus change, added in fp32; on shared entries onto what is there."""
        if not support.indices.numel():
            return
        start = support.undo
        if onto_others:
            start = weight.detach().view(-1).index_select(0, support.indices.long())
        put(weight, support.indices, self._add_change(name, start, support.spans))

    def _add_change(self, name: str, start: Tensor, spans: Spans) -> Tensor:
        """Return entries plus an adapter's change of them, in slot order."""
        values = self.pools[name][0].values.detach()
        parts = [values[a:b] for a, b in spans]
        change = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(start.device)
        return (start.float() + change).to(start.dtype)

    def _write_finished(
        self, name: str, stamp: tuple[Any, ...], weight: Tensor, *, keep: bool
    ) -> bool:
        """Write an adapter as it was kept; return whether it is (made so where `keep` asks)."""
        if name in self.candidates:
            return False
        finished = self._finished.get(name)
        if finished is None or finished.stamp != stamp:
            if not keep:
                return False
            finished = self._finished[name] = self._finish(name, stamp, weight)
        put(weight, finished.indices, finished.adapted)
        self._written.append((finished.indices, finished.undo))
        return True

    def _finish(self, name: str, stamp: tuple[Any, ...], weight: Tensor) -> Finished:
        """Return an adapter's entries ready to write; the weight must hold the originals."""
        pool, ordinal = self.pools[name]
        spans = pool.layout()[ordinal]
        if len(spans) < 2:  # sorted already
            support = self._support(name, weight)
            adapted = self._add_change(name, support.undo, spans) if spans else support.undo
            return Finished(stamp, support.indices, support.undo, adapted)
        if self._supports.pop(name, None) is not None:
            pool.free_room()
        index = pool.indices(ordinal).to(weight.device)
        undo = weight.detach().view(-1).index_select(0, index)
        adapted = self._add_change(name, undo, spans)
        index, order = index.sort()
        indices = index.to(index_dtype(weight))
        return Finished(stamp, indices, undo[order], adapted[order])

    def kept(self, name: str) -> list[Tensor]:
        """Return what is kept to write and withdraw an adapter's change, beside its pool."""
        support, finished = self._supports.get(name), self._finished.get(name)
        parts = [] if support is None else [support.indices, support.undo]
        if finished is not None:
            parts += [finished.indices, finished.undo, finished.adapted]
        return parts

    def _stamp_of(self, weight: Tensor, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Return what must not have changed for the weight to be up to date."""
        return names, _weight_stamp(weight), self._values_stamp(names)

    def _values_stamp(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        pools = tuple([self.pools[name][0].stamp() for name in names])
        return pools, tuple([version(self.candidates[n]) for n in names if n in self.candidates])


def _weight_stamp(weight: Tensor) -> tuple[Any, ...]:
    return id(weight), weight.dtype, weight.device, version(weight)
