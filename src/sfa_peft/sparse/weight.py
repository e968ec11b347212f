# SPDX-License-Identifier: Apache-2.0
"""A weight that carries sparse changes: written, withdrawn, and tapped for their gradient.

Changes lie on the weight's originals as one stack: those of earlier adapters first, then those of
all its entries while candidates train, then those of the active adapters. Invariant: while the
stack is empty the weight holds the pretrained bits; otherwise it differs from them only at the
entries of the stack, and what was there before can be put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .delta import Slice, adapt
from .entries import Entries
from .gradient import Observer, Support, Tap, Tapped, eager, find_support
from .pairs import PAIRS
from .shards import Shard, whole
from .write_lock import is_helper, is_stand_in, put, rows, writable

#: Entries that stand for all of a weight where others may have written it.
_SAMPLE = 256


def version(tensor: Tensor) -> int:
    """Return autograd's version counter (inference tensors have none)."""
    return -1 if tensor.is_inference() else tensor._version


class Owner(Protocol):
    """The layer of a weight, which loading, casting and wrapping may give another tensor."""

    name: str

    def parameter(self, name: str) -> Tensor:
        """Return the tensor that a parameter of the layer is now."""
        ...

    def columns_worth(self, name: str) -> float | None:
        """Return what `find_support` asks of the matrix of a linear layer; None of others."""
        ...

    @property
    def merged(self) -> bool:
        """Whether changes stay in the layer's weights until they are unmerged."""
        ...


class Weight:
    """One parameter of a layer and the stack of changes on it.

    Changes are written absolutely and originals put back by overwriting, never by adding and
    subtracting, so that switching is exact in every dtype.

    Args:
        owner: The layer.
        parameter: The parameter's name in it.
    """

    def __init__(self, owner: Owner, parameter: str) -> None:
        self.owner, self.parameter = owner, parameter
        self.slices: dict[str, Slice] = {}  # by adapter, earlier ones included
        self.earlier: dict[str, tuple[str, ...]] = {}  # by adapter: changes that its base has
        self.candidates: dict[str, Tensor] = {}  # change of all entries while candidates train
        self.observers: dict[str, Observer] = {}  # get the dense gradient (scores)
        self.live: tuple[str, ...] = ()  # adapters on the stack now
        self.in_graph = False  # a backward that needs the weight as it is may still come
        self.prepared: Tapped | None = None  # for a forward of the whole model
        self.shard: Shard | None = None  # this rank's part, where the weight is cut over ranks
        self.touched = True  # others may have written it since `is_untouched`
        self.entries: dict[str, Entries] = {}  # in slot order, for training
        self.finished: dict[str, Entries] = {}  # in the weight's order, for switching
        self.written: list[Entries] = []
        self.whole_original: Tensor | None = None  # while candidates train
        self.stamp: tuple[Any, ...] | None = None  # of what it holds; another object once written
        self.tensor_stamp: tuple[Any, ...] | None = None
        self.wired: tuple[Any, ...] = ()  # what `prepared` was made for

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no selector; a selector that is copied with it attaches itself.
        return self.__dict__ | {"observers": {}, "candidates": {}, "prepared": None}

    @property
    def tensor(self) -> Tensor:
        """The parameter, with the stack on it."""
        return self.owner.parameter(self.parameter)

    @property
    def held(self) -> Tensor:
        """What changes are written to: the parameter, or this rank's part of it."""
        tensor = self.tensor
        if self.shard is None and not isinstance(tensor, DTensor):
            return tensor
        self.find_shard()
        return self.tensor if self.shard is None else self.shard.local

    def find_shard(self) -> None:
        """Go over to this rank's part of the parameter once that is cut."""
        tensor, known = self.tensor, self.shard
        if not isinstance(tensor, DTensor) or (known is not None and known.tensor is tensor):
            return
        self.shard = shard = Shard(tensor, f"{self.owner.name}.{self.parameter}")
        if known is None:
            for entries in self.written:  # of the whole weight, before it was cut
                flat = entries.flat_indices()
                here = shard.places(flat)
                put(shard.local, flat[here] - shard.first, entries.undo.flatten()[here])
            self.live, self.written, self.stamp = (), [], None
            self.forget()

    @property
    def is_stand_in(self) -> bool:
        """Whether the parameter or a change of it is not the real one (see `writing`)."""
        return is_stand_in(self.tensor) or any(s.is_stand_in for s in self.slices.values())

    # --- the stack -----------------------------------------------------------------------------

    @eager  # stamps and in-place writes are for Python, not for a graph
    def refresh(self, names: Sequence[str], *, keep: bool = False) -> None:
        """Make the weight hold the changes of the named adapters; do nothing if it does.

        Args:
            names: Adapters; those that do not change this weight are left out.
            keep: Whether to keep what is written, so that the next time is faster. It takes room
                for two more numbers per entry, so it is for adapters that do not train now.
        """
        if not is_helper() and self.is_current(names):
            return
        stack, weight = self._stack_of(names), self.held
        with writable(weight):
            stamps, found = self._stamps(stack), stamp_of(weight)
            if self.stamp == (stack, found, stamps):
                return  # another thread was faster
            before, is_ours = self.written, self.tensor_stamp == found
            if not (is_ours and self._write_pair(stack, stamps, weight)):
                self._withdraw(weight)
                if self.tensor_stamp != stamp_of(weight):
                    self.forget()  # somebody replaced or changed the weight
                alone = len(stack) == 1 and not stack[0][1]
                if not (alone and self._write_finished(stack[0][0], stamps, weight, keep=keep)):
                    self._write_stack(stack, weight)
                PAIRS.note(before, self.written, weight)
            self.live = tuple([name for name, whole in stack if not whole])
            self.tensor_stamp = stamp_of(weight)
            self.stamp = stack, self.tensor_stamp, stamps
            if self.shard is not None:
                self.shard.show(self.tensor)

    def is_current(self, names: Sequence[str]) -> bool:
        """Whether it holds the changes of the named adapters, as they are now: asked often."""
        if self.stamp is None:
            return False
        stack = self._stack_of(names)
        try:
            return self.stamp == (stack, stamp_of(self.held), self._stamps(stack))
        except RuntimeError:  # stand-ins of a recording or transform have no address
            return False

    def holds(self, names: Sequence[str]) -> bool:
        """Whether the changes of the named adapters, and no others, are on the weight."""
        stack = self._stack_of(names)
        return self.live == tuple([name for name, _ in stack]) and not self.candidates

    def computed(self, names: Sequence[str]) -> Tensor:
        """Return the weight with the changes of the named adapters, differentiable in them.

        A copy, for transforms of functions (torch.func), which see no in-place write. The changes
        must be on the weight already.
        """
        weight, names = self.tensor, [name for name, _ in self._stack_of(names)]
        flat = weight.reshape(-1)
        entries = [self._entries_of(name, weight) for name in names]
        indices = [own.indices.long() for own in entries]
        for index, own in zip(indices, entries, strict=True):
            flat = flat.scatter(0, index, own.undo)
        for index, name in zip(indices, names, strict=True):
            changed = adapt(flat.gather(0, index), self.slices[name].change())
            flat = flat.scatter(0, index, changed)
        return flat.view_as(weight)

    def withdraw(self) -> None:
        """Put the original entries back into the weight, to the bit."""
        weight, was_live = self.held, self.live
        with writable(weight):
            self._withdraw(weight, is_last=True)
            self.stamp = None
            if self.shard is not None and was_live:
                self.shard.show(self.tensor)

    def _withdraw(self, weight: Tensor, *, is_last: bool = False) -> None:
        before, is_ours = self.written, self.tensor_stamp == stamp_of(weight)
        if not is_ours:
            self.touched, self.finished = True, {n: e.renewed() for n, e in self.finished.items()}
        if self.live:
            if not (is_last and is_ours and PAIRS.write(before, (), weight)):
                self._restore(weight)
            if is_last:
                PAIRS.note(before, (), weight)
            self.live, self.written, self.whole_original = (), [], None
            self.tensor_stamp = stamp_of(weight)
        self.in_graph = False

    def forget(self) -> None:
        """Look at the weight anew next time; it must hold the originals then."""
        self.entries.clear()
        self.finished.clear()

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter; the weight must hold the originals."""
        before = self.earlier.pop(adapter_name, ())
        unused = set(before).difference(*self.earlier.values())
        tables: list[dict[str, Any]] = [self.slices, self.observers, self.candidates]
        for table in (*tables, self.entries, self.finished):
            for name in (adapter_name, *unused):
                table.pop(name, None)

    def _stack_of(self, names: Sequence[str]) -> tuple[tuple[str, bool], ...]:
        """Return (adapter, whether its candidates' change is meant), the lowest first."""
        if not (self.earlier or self.candidates):
            return tuple([(name, False) for name in names if name in self.slices])
        earlier = dict.fromkeys(e for name in names for e in self.earlier.get(name, ()))
        dense = [(name, True) for name in names if name in self.candidates]
        own = [(name, False) for name in names if name in self.slices]
        return (*((name, False) for name in earlier), *dense, *own)

    def _stamps(self, stack: tuple[tuple[str, bool], ...]) -> tuple[Any, ...]:
        return tuple(
            [
                version(self.candidates[name]) if whole else self.slices[name].stamp()
                for name, whole in stack
            ]
        )

    def is_as_written(self) -> bool:
        """Whether a sample of its entries is what an adapter alone on it has them be now."""
        if len(self.written) != 1 or len(self.live) != 1 or self.whole_original is not None:
            return True
        own, weight = self.written[0], self.tensor.detach().view(-1)
        entries = rows(weight, own.undo)[own.indices[:_SAMPLE].long()]
        wanted = own.adapted
        if wanted is None:
            if own.spans is not self.slices[self.live[0]].spans:
                return True  # written anew in any case
            change = self.slices[self.live[0]].change()[:_SAMPLE].detach()
            wanted = adapt(own.undo[:_SAMPLE], change.to(own.undo.device))
        return torch.allclose(entries, wanted[:_SAMPLE], rtol=0, atol=0, equal_nan=True)

    def is_untouched(self) -> bool:
        """Whether nobody else can have written the weight since this was asked."""
        touched = self.touched or self.tensor_stamp != stamp_of(self.held)
        self.touched = False
        return not touched

    def overwrite(self, base: Tensor) -> None:
        """Take other originals; the changes on it are written anew by the next `refresh`."""
        self.withdraw()
        with writable(self.tensor):
            self.tensor.copy_(base)
        self.forget()
        self.tensor_stamp = stamp_of(self.tensor)

    # --- what it holds -------------------------------------------------------------------------

    def original(self) -> Tensor:
        """Return a copy of the weight with the original entries, cut over ranks as it is."""
        copy = self.held.detach().clone()
        self._restore(copy)
        return copy if self.shard is None else self.shard.like(copy)

    def pretrained(self) -> Tensor:
        """Return the whole weight with the original entries, a copy only where it must be.

        A call for every rank where the weight is cut.
        """
        found = self.original() if self.live or self.shard else self.tensor.detach()
        return whole(found).to(self.tensor.dtype)  # another one in a forward of mixed precision

    def foundation(self, adapter_name: str) -> Tensor:
        """Return the weight as an adapter finds it: its original entries and earlier changes."""
        if adapter_name not in self.earlier:
            return self.pretrained()
        copy = self.original()
        with torch.no_grad():
            for name in self.earlier[adapter_name]:
                self._write(name, copy, self._entries_of(name, copy), onto_others=True)
        return copy

    def scored(self, adapter_name: str) -> Tensor:
        """Return what scores see of the weight here; what is not selected is the foundation's."""
        is_in = adapter_name not in self.earlier or adapter_name in self.live
        return self.held if is_in else self.foundation(adapter_name)

    def originals_at(self, adapter_name: str) -> Tensor:
        """Return the entries that an adapter's changes are added to, in slot order."""
        if adapter_name not in self.live:
            self.withdraw()
        if adapter_name in self.earlier:
            weight, index = self.foundation(adapter_name), self.slices[adapter_name].indices()
            return weight.view(-1)[index.to(weight.device)]
        return self._entries_of(adapter_name, self.held).undo

    def kept(self, name: str) -> list[Tensor]:
        """Return what is kept to write and withdraw an adapter's change, beside its pool."""
        found = (table.get(name) for table in (self.entries, self.finished))
        tensors = [(e.indices, e.undo, e.adapted) for e in found if e is not None]
        return [tensor for parts in tensors for tensor in parts if tensor is not None]

    # --- gradient ------------------------------------------------------------------------------

    def taps(self) -> Tapped:
        """Return what active adapters want from the weight's gradient, and where it goes."""
        taps, stand_ins = [], []
        self.in_graph = self.in_graph or bool(self.live)
        for name in self.live:
            part, observer = self.slices[name], self.observers.get(name)
            if part.trains and (observer is not None or part.spans or part.keeps_graph):
                entries = self._entries_of(name, self.held)
                index = part.everywhere(self.tensor) if self.shard else entries.indices
                support = None if observer is not None else self._support_of(entries, index)
                taps.append(Tap(index, observer, support))
                stand_ins.append(part.stand_in())
        return Tapped(taps, stand_ins)

    def _support_of(self, entries: Entries, index: Tensor) -> Support | None:
        if entries.support is None:
            worth = self.owner.columns_worth(self.parameter)
            if worth is not None and index.is_cpu:  # elsewhere each would wait for the device
                entries.support = find_support(index, self.tensor.shape, worth)
        return entries.support

    # --- writing -------------------------------------------------------------------------------

    def _restore(self, weight: Tensor) -> None:
        if self.whole_original is not None:
            weight.detach().copy_(self.whole_original)
            return
        for entries in self.written:
            put(weight, entries.indices, entries.undo)

    def _entries_of(self, name: str, weight: Tensor) -> Entries:
        """Return an adapter's entries; the weight must hold the originals, or these entries."""
        part = self.slices[name]
        known = self.entries.get(name)
        if known is not None and known.spans is part.spans:
            return known
        index = part.indices().to(weight.device)
        indices = part.room(_index_dtype(weight), weight.device)
        undo = part.room(weight.dtype, weight.device)
        indices.copy_(index)
        finished = self.finished.get(name)
        if name in self.live and finished is not None:
            undo[index.argsort()] = finished.undo.flatten()
        else:
            torch.index_select(weight.detach().view(-1), 0, index, out=undo)
        self.entries[name] = Entries(indices, undo, part.spans)
        return self.entries[name]

    def _write_pair(
        self, stack: tuple[tuple[str, bool], ...], stamps: tuple[Any, ...], weight: Tensor
    ) -> bool:
        """Go from one adapter as it was kept to another in one pass; return whether it is kept."""
        after = self.finished.get(stack[0][0]) if len(stack) == 1 and not stack[0][1] else None
        if after is None or after.stamp != stamps:
            return False
        if not PAIRS.write(self.written, [after], weight):
            return False
        self.written, self.in_graph = [after], False
        return True

    def _write_stack(self, stack: tuple[tuple[str, bool], ...], weight: Tensor) -> None:
        """Write originals plus changes, and what is needed to train them."""
        for name, dense in stack:  # originals first: adapters may share entries
            if dense and self.whole_original is None:
                self.whole_original = weight.detach().clone()
            elif not dense:
                self.finished.pop(name, None)
                self._entries_of(name, weight)
        for position, (name, dense) in enumerate(stack):
            if dense:
                change = self.candidates[name].to(weight.device)
                weight.detach().copy_(adapt(weight.detach(), change))
            else:
                self._write(name, weight, self.entries[name], onto_others=position > 0)
                self.written.append(self.entries[name])

    def _write(self, name: str, weight: Tensor, entries: Entries, *, onto_others: bool) -> None:
        """Write original plus change; on shared entries onto what is there."""
        if entries.indices.numel():
            start = entries.undo
            if onto_others:
                start = weight.detach().view(-1).index_select(0, entries.indices.long())
            change = self.slices[name].change().to(start.device)
            put(weight, entries.indices, adapt(start, change))

    def _write_finished(
        self, name: str, stamps: tuple[Any, ...], weight: Tensor, *, keep: bool
    ) -> bool:
        """Write an adapter as it was kept; return whether it is (made so where `keep` asks)."""
        finished = self.finished.get(name)
        if finished is None or finished.adapted is None or finished.stamp != stamps:
            if not keep:
                return False
            finished = self.finished[name] = self._finish(name, stamps, weight).in_blocks(weight)
        put(weight, finished.indices, cast(Tensor, finished.adapted))
        self.written.append(finished)
        return True

    def _finish(self, name: str, stamps: tuple[Any, ...], weight: Tensor) -> Entries:
        """Return an adapter's entries ready to write; the weight must hold the originals.

        In the weight's order, which is several times as fast to write as that of many picks.
        """
        part = self.slices[name]
        if len(part.spans) < 2:  # sorted already
            own = self._entries_of(name, weight)
            change = part.change().to(own.undo.device)
            adapted = adapt(own.undo, change) if part.spans else own.undo
            return Entries(own.indices, own.undo, stamp=stamps, adapted=adapted)
        if self.entries.pop(name, None) is not None:
            part.free_room()
        index = part.indices().to(weight.device)
        undo = weight.detach().view(-1).index_select(0, index)
        adapted = adapt(undo, part.change().to(undo.device))
        index, order = index.sort()
        indices = index.to(_index_dtype(weight))
        return Entries(indices, undo[order], stamp=stamps, adapted=adapted[order])


def stamp_of(weight: Tensor) -> tuple[Any, ...]:
    """Return what changes when a weight is replaced or written."""
    return id(weight), weight.dtype, weight.device, version(weight)


def _index_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that flat positions in a weight are kept in."""
    return torch.int32 if weight.numel() <= torch.iinfo(torch.int32).max else torch.int64
