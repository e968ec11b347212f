# SPDX-License-Identifier: Apache-2.0
"""The values of one adapter's sparse change, and which weight each belongs to.

The pool is one flat parameter of the budgeted length. A slot of it is assigned to one entry of one
weight by a pick and stays there, so nothing that sees parameters (optimizer, clipping, DDP) ever
sees a size change.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .delta import Delta, Deltas, Spans, by_weight, count_assigned, find_spans, span_length
from .gradient import Cut
from .shards import Joined, Ranks, Shard, local, whole
from .slices import PoolSlice
from .stores import Store
from .training_pass import TrainingPass
from .weight import Weight, version
from .write_lock import asked_once


class Pool:
    """Values of one adapter and the slots that say where each belongs.

    Args:
        adapter_name: The adapter.
        store: Where values and slots lie.
        lr_ratio: Learning rate of the values over that of their optimizer.
        decay_weight: Whether weight decay pulls the weights towards zero, not their change.

    Attributes:
        weights: Those that may be selected from, in the order that positions count them in;
            `names` are their full names, `starts` the first position of each, and the end.
        known: The slots as they were last given out or loaded, to notice what others write there;
            None where that has not been looked at yet.
        owns: Whether slots were given out here, and not in the pool that this one is a copy of.
        source: That pool.
        foreign_writes: How often others were found to have written values (see `averages`).
    """

    def __init__(
        self,
        adapter_name: str,
        store: Store,
        *,
        lr_ratio: float = 1.0,
        decay_weight: bool = False,
    ) -> None:
        self.adapter_name, self.store = adapter_name, store
        self.lr_ratio, self.decay_weight = lr_ratio, decay_weight
        self.weights: list[Weight] = []
        self.slices: list[PoolSlice] = []  # what each weight has of it
        self.training_pass = TrainingPass(self)
        self.names: list[str] = []
        self.starts: list[int] = [0]
        self._layout: tuple[Tensor, int, list[Spans]] | None = None
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._shard: Shard | None = None
        self._gathered: tuple[tuple[Any, ...], Tensor] | None = None
        self._spread: tuple[tuple[Any, ...], Tensor] | None = None
        self._cut: tuple[tuple[Any, ...], Sequence[Tensor], Any] | None = None
        self.driver: object = None  # whoever fills the pool; the latest one does
        self.is_growing = False  # the driver will still give out slots
        self.optimizer_steps = 0  # steps of an optimizer that trains the values
        self.optimizer: weakref.ref[Any] | None = None  # the one that stepped last
        self.stepped_by_grad_scaler = False
        self.keep_before = False  # whether the values before the next step are wanted
        self.before: Tensor | None = None
        self.known: Tensor | None = None
        self.owns = False
        self.source: weakref.ref[Any] | None = None
        self.foreign_writes = 0
        self.seen: tuple[Any, ...] | None = None  # by whoever looks for foreign writes
        _POOLS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # Cut tensors belong to a graph and cannot be copied; both caches are made again on demand.
        none = ("_layout", "_cut", "_spread", "_gathered", "before", "driver", "optimizer")
        none += ("source", "seen")
        return self.__dict__ | dict.fromkeys(none) | {"_buffers": {}, "is_growing": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.owns, twin.source = False, weakref.ref(self)
        if self.store.is_there and self.values.requires_grad and self.known is None:
            twin.known = self.slots.clone()
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _POOLS.add(self)

    def add(self, weight: Weight, name: str) -> None:
        """Append a weight that may be selected from, by its full name."""
        self.slices.append(PoolSlice(self, len(self.weights)))
        weight.slices[self.adapter_name] = self.slices[-1]
        self.weights.append(weight)
        self.names.append(name)
        self.starts.append(self.starts[-1] + weight.tensor.numel())

    # --- values and slots ----------------------------------------------------------------------

    @property
    def values(self) -> Any:
        """The change of each assigned weight, (size,), fp32 by default; the trainable part."""
        return self.store.values

    @property
    def slots(self) -> Tensor:
        """Position of each value, (size,); -1 where not assigned yet, only at the end.

        int32, or int64 where there are more positions than that can name (or a file had it).
        """
        return self.store.slots

    @property
    def shard(self) -> Shard | None:
        """This rank's part of the values where they are cut over ranks; None where they are not."""
        values = self.values
        if not isinstance(values, DTensor):
            return None
        if self._shard is None or self._shard.tensor is not values:
            self._shard = Shard(values, f"sfa_pool.{self.adapter_name}")
        return self._shard

    @property
    def held(self) -> Tensor:
        """The values that lie on this rank, plain, in the memory of `values`."""
        return local(self.values)

    @property
    def ranks(self) -> Ranks | None:
        """The processes over which weights and values are cut; None where they are not."""
        return None if self.shard is None else Ranks(self.shard)

    def find_shards(self) -> None:
        """Go over to this rank's parts of weights and values that are cut."""
        for weight in self.weights:
            weight.find_shard()
        self._shard = self.shard

    def gathered(self) -> Tensor:
        """Return the values of all ranks, plain; a call for every rank where they are cut."""
        if self.shard is None:
            return self.values.detach()
        stamp = self.stamp()
        if self._gathered is None or self._gathered[0] != stamp:
            self._gathered = (stamp, whole(self.values))
        return self._gathered[1]

    @property
    def size(self) -> int:
        """Number of values."""
        return self.values.numel()

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each weight."""
        return [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]

    @property
    def num_assigned(self) -> int:
        """Number of weights selected so far."""
        return count_assigned(self.slots)

    @property
    def num_selected(self) -> int:
        """The same; asks no device between two picks."""
        return sum(span_length(spans) for spans in self.layout())

    @property
    def is_empty(self) -> bool:
        """Whether no weight is selected yet."""
        return not any(self.layout())

    def layout(self) -> list[Spans]:
        """Return for each weight the (first, last + 1) ranges of slots that belong to it."""
        slots, known = self.slots, self._layout
        if known is None or known[0] is not slots or known[1] != version(slots):
            known = self._lay_out(find_spans(slots, self.starts))
        return known[2]

    def _lay_out(self, spans: list[Spans]) -> tuple[Tensor, int, list[Spans]]:
        self._layout = (self.slots, version(self.slots), spans)
        self._buffers, self._spread = {}, None
        return self._layout

    def indices(self, ordinal: int) -> Tensor:
        """Return a weight's selected flat positions, int64, in slot order."""
        slots, spans = self.slots, self.layout()[ordinal]
        if not spans:
            return slots[:0].long()
        return torch.cat([slots[a:b] for a, b in spans]).long() - self.starts[ordinal]

    def count(self, ordinal: int) -> int:
        """Return how many entries of a weight are selected."""
        return span_length(self.layout()[ordinal])

    def spread(self, numbers: Sequence[float]) -> Tensor:
        """Return one number per slot on this rank, float32 or wider, from one per weight.

        It is 1 where a slot is not assigned. Kept until slots or numbers are others.
        """
        self.layout()  # drops what was kept for other slots
        slots, values = self.slots, self.held
        dtype = torch.promote_types(values.dtype, torch.float32)
        key = (tuple(numbers), dtype, values.device)
        if self._spread is None or self._spread[0] != key:
            table = torch.tensor([1.0, *numbers], dtype=dtype, device="cpu")
            bounds = torch.tensor(self.starts[:-1], dtype=slots.dtype, device="cpu")
            table, bounds = (t.to(values.device, non_blocking=True) for t in (table, bounds))
            slots = slots if self.shard is None else self.shard.part(slots)
            weights = torch.bucketize(slots.to(values.device), bounds, right=True)
            self._spread = (key, table[weights])
        return self._spread[1]

    def deltas(self) -> dict[str, Delta]:
        """Return the change of each weight that has one; float32, on the CPU."""
        values = self.gathered().float().cpu()
        parts = by_weight(self.slots.cpu(), values, self.starts)
        found = zip(self.names, parts, strict=True)
        return {name: delta for name, delta in found if delta.indices.numel()}

    def assign(self, selected: Sequence[Tensor]) -> None:
        """Give the next free slots to newly selected weights.

        Args:
            selected: For each weight flat positions, int64, strictly increasing; where weights are
                cut over ranks, those in this rank's part.
        """
        slots, first = self.slots, self.num_selected
        positions = [
            s.to(slots.device, non_blocking=True) + start
            for s, start in zip(selected, self.starts, strict=False)
        ]
        if self.ranks is not None:
            positions = self._of_all_ranks(positions)
        joined = torch.cat(positions)
        spans = [list(own) for own in self.layout()]
        for own, part in zip(spans, positions, strict=True):
            if part.numel():
                own.append((first, first + part.numel()))
                first += part.numel()
        with torch.no_grad():
            slots[first - joined.numel() : first] = joined
        self._lay_out(spans)  # known, so nobody has to ask the device
        self.known, self.owns = None if self.ranks else slots.clone(), True

    def _of_all_ranks(self, positions: Sequence[Tensor]) -> list[Tensor]:
        """Return the positions that all ranks selected, out of those in this rank's parts."""
        parts = zip(positions, self.weights, strict=True)
        own = torch.cat([p + (w.shard.first if w.shard else 0) for p, w in parts])
        joined = Ranks(cast(Shard, self.shard)).concatenated(own).sort().values
        cuts = torch.searchsorted(joined, joined.new_tensor(self.starts[1:-1]))
        return list(joined.tensor_split(cuts.cpu()))

    def fill(self, deltas: Deltas, *, with_values: bool) -> None:
        """Give the slots of an empty pool to the entries of a change.

        Args:
            deltas: By the names of the pool's weights.
            with_values: Whether values are set to the change; otherwise they stay as they are.
        """
        kinds = (torch.int64, torch.float32)
        none = Delta(*(torch.empty(0, dtype=kind, device="cpu") for kind in kinds))
        found = [deltas.get(name, none) for name in self.names]
        self.assign([delta.indices for delta in found])
        if with_values:
            with torch.no_grad():
                change = torch.cat([delta.change for delta in found])
                self.values[: change.numel()] = change.to(self.values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return values and slots as they are, which a packed file does not keep.

        It orders entries by position and not by pick, and has no bits below a weight's own.
        """
        return {"values": self.gathered().clone(), "slots": self.slots.clone()}

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state is of the entries that are selected here, in whatever order."""
        slots = state["slots"].to(self.slots)
        return slots.shape == self.slots.shape and torch.equal(
            slots.sort().values, self.slots.sort().values
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        with torch.no_grad():
            self.slots.copy_(state["slots"])
            values = state["values"].to(self.held.device)
            self.held.copy_(values if self.shard is None else self.shard.part(values))
        self.known = None
        self.settle()

    # --- for weights and optimizers ------------------------------------------------------------

    def room(self, ordinal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return room for one number per selected entry of a weight.

        All weights share one buffer: many small ones, made in the course of a forward, would lie
        between its activations and keep the allocator from using their memory again.
        """
        counts = [
            span_length(spans) if weight.tensor.device == device else 0
            for weight, spans in zip(self.weights, self.layout(), strict=True)
        ]
        if (dtype, device) not in self._buffers:
            self._buffers[dtype, device] = torch.empty(sum(counts), dtype=dtype, device=device)
        first = sum(counts[:ordinal])
        return self._buffers[dtype, device][first : first + counts[ordinal]]

    def free_room(self) -> None:
        """Let go of that room, where nobody looks into it any more."""
        self._buffers = {}

    def stand_ins(self) -> Sequence[Tensor]:
        """Return for each weight what stands for its slice of values, wired to their gradient."""
        if self._cut is None or not self.keeps(self._cut[1]):
            values, spans = self.values, self.layout()
            with torch.inference_mode(False), torch.enable_grad():
                every = values if self.shard is None else Joined.apply(values, self.shard)
                # The parameter and the spans are kept alive by the cut, so their ids stay theirs.
                self._cut = (self._cut_key(), Cut.apply(every, spans), (values, spans))
        return self._cut[1]

    def keeps(self, stand_ins: Sequence[Tensor]) -> bool:
        """Whether these are still what `stand_ins` returns."""
        return (
            self._cut is not None and self._cut[1] is stand_ins and self._cut[0] == self._cut_key()
        )

    def _cut_key(self) -> tuple[Any, ...]:
        values, spans = self.values, self.layout()
        return (id(values), values.dtype, values.device, values.requires_grad, id(spans))

    def stamp(self) -> tuple[Any, ...]:
        """Return what changes whenever values or slots do.

        Fused optimizers write values without telling autograd, so their steps are counted too.
        """
        return asked_once(self, self._stamp)

    def _stamp(self) -> tuple[Any, ...]:
        values, slots = self.held, self.slots
        return (
            id(values),
            values.data_ptr(),
            version(values),
            self.optimizer_steps,
            self.foreign_writes,
            id(slots),
            version(slots),
        )

    def originals(self) -> Tensor:
        """Return the entry that each value here is added to, in its dtype; 0 where not assigned.

        A call for every rank where weights are cut.
        """
        values = self.held
        if self.shard is not None:
            found = torch.zeros(self.size, dtype=values.dtype, device=values.device)
            for weight, part in zip(self.weights, self.slices, strict=True):
                undo = weight.originals_at(self.adapter_name)
                found[part.entries[1].to(found.device).long()] = undo.to(found)
            return self.shard.summed(found)
        found = torch.zeros_like(values, requires_grad=False)
        for weight, spans in zip(self.weights, self.layout(), strict=True):
            if spans:
                undo = weight.originals_at(self.adapter_name)
                parts = undo.to(found).split([b - a for a, b in spans])
                for (a, b), part in zip(spans, parts, strict=True):
                    found[a:b] = part
        return found

    def is_trained_by(self, optimizer: Any) -> bool:
        """Whether the values are among an optimizer's parameters (no, once they are deleted)."""
        return self.group_of(optimizer) is not None

    def group_of(self, optimizer: Any) -> dict[str, Any] | None:
        """Return the optimizer's parameter group that holds the values, None where it has none."""
        if not self.store.is_there:
            return None
        values = self.values
        for group in optimizer.param_groups:
            if any(p is values for p in group["params"]):
                return group
        return None

    def end_step(self) -> None:
        """After an optimizer's step: values are others than those that weights hold.

        Plain weights are pretrained ones until the next forward. Shards are written at once, since
        no code of ours runs between a shard and the forward; if something fills the pool, it may
        change values and slots first, and settles them.
        """
        if self.shard is None:
            self.withdraw()
        elif self.driver is None:
            self.settle()

    def settle(self) -> None:
        """Write what shards do not hold yet; do nothing for plain weights."""
        if self.shard is None:
            return
        for weight in self.weights:
            if self.adapter_name in weight.live:
                weight.refresh(weight.live)
        self._gathered = None

    def withdraw(self) -> None:
        """Put the pretrained entries back into the weights, but for merged layers."""
        self.training_pass.end()


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def every_pool() -> list[Pool]:
    """Return all pools that there are, for those who see no model but an optimizer."""
    return list(_POOLS)
