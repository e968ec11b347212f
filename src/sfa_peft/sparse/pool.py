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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .delta import Delta, Deltas, Spans, by_weight, count_assigned, find_spans, span_length
from .gradient import Cut
from .weight import Weight, version
from .write_lock import asked_once, is_stand_in


class Store(Protocol):
    """Where a pool's two tensors lie, and whether they are still there."""

    # ruff: disable[D102]
    @property
    def values(self) -> Any: ...
    @property
    def slots(self) -> Tensor: ...
    @property
    def is_there(self) -> bool: ...

    # ruff: enable[D102]


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
        self.names: list[str] = []
        self.starts: list[int] = [0]
        self._layout: tuple[Tensor, int, list[Spans]] | None = None
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
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
        none = ("_layout", "_cut", "_spread", "before", "driver", "optimizer", "source", "seen")
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
        weight.slices[self.adapter_name] = PoolSlice(self, len(self.weights))
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
        """Return one number per slot, float32 or wider (size,), from one per weight.

        It is 1 where a slot is not assigned. Kept until slots or numbers are others.
        """
        self.layout()  # drops what was kept for other slots
        slots, values = self.slots, self.values
        dtype = torch.promote_types(values.dtype, torch.float32)
        key = (tuple(numbers), dtype, values.device)
        if self._spread is None or self._spread[0] != key:
            table = torch.tensor([1.0, *numbers], dtype=dtype, device="cpu")
            bounds = torch.tensor(self.starts[:-1], dtype=slots.dtype, device="cpu")
            table, bounds = (t.to(values.device, non_blocking=True) for t in (table, bounds))
            weights = torch.bucketize(slots.to(values.device), bounds, right=True)
            self._spread = (key, table[weights])
        return self._spread[1]

    def deltas(self) -> dict[str, Delta]:
        """Return the change of each weight that has one; float32, on the CPU."""
        values = self.values.detach().float().cpu()
        parts = by_weight(self.slots.cpu(), values, self.starts)
        found = zip(self.names, parts, strict=True)
        return {name: delta for name, delta in found if delta.indices.numel()}

    def assign(self, selected: Sequence[Tensor]) -> None:
        """Give the next free slots to newly selected weights.

        Args:
            selected: For each weight flat positions, int64, strictly increasing.
        """
        slots, first = self.slots, self.num_selected
        positions = [
            s.to(slots.device, non_blocking=True) + start
            for s, start in zip(selected, self.starts, strict=False)
        ]
        joined = torch.cat(positions)
        spans = [list(own) for own in self.layout()]
        for own, part in zip(spans, positions, strict=True):
            if part.numel():
                own.append((first, first + part.numel()))
                first += part.numel()
        with torch.no_grad():
            slots[first - joined.numel() : first] = joined
        self._lay_out(spans)  # known, so nobody has to ask the device
        self.known, self.owns = slots.clone(), True

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
        return {"values": self.values.detach().clone(), "slots": self.slots.clone()}

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
            self.values.copy_(state["values"])
        self.known = None

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
                # The parameter and the spans are kept alive by the cut, so their ids stay theirs.
                self._cut = (self._cut_key(), Cut.apply(values, spans), (values, spans))
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
        values, slots = self.values, self.slots
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
        """Return the entry that each value is added to, in its dtype; 0 where not assigned."""
        values = self.values
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

    def withdraw(self) -> None:
        """Put the pretrained entries back into the weights, but for merged layers."""
        for weight in self.weights:
            if not weight.owner.merged:
                weight.withdraw()


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def every_pool() -> list[Pool]:
    """Return all pools that there are, for those who see no model but an optimizer."""
    return list(_POOLS)


@dataclass(frozen=True, eq=False)
class PoolSlice:
    """The part of a pool that belongs to one weight (see `delta.Slice`)."""

    pool: Pool
    ordinal: int

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

    def stamp(self) -> tuple[Any, ...]:
        """Return what changes whenever values or slots do."""
        return self.pool.stamp()

    def indices(self) -> Tensor:
        """Return flat positions, int64 (n,), in slot order."""
        return self.pool.indices(self.ordinal)

    def change(self) -> Tensor:
        """Return values, (n,), in slot order."""
        values = self.pool.values
        parts = [values[a:b] for a, b in self.spans]
        if not parts:
            return values[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def room(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return room for one number per entry, in the pool's buffer."""
        return self.pool.room(self.ordinal, dtype, device)

    def free_room(self) -> None:
        """Let go of that buffer."""
        self.pool.free_room()

    def stand_in(self) -> Tensor:
        """Return what is wired to the values' gradient."""
        return self.pool.stand_ins()[self.ordinal]


class OwnStore:
    """Values and slots that never train and are in no module and no file.

    Args:
        deltas: The change of each weight, in the order of positions.
        starts: First position of each weight, and the end.
        weight: Whose device they follow: no module moves what is no part of it.
    """

    is_there = True

    def __init__(self, deltas: Sequence[Delta], starts: Sequence[int], weight: Weight) -> None:
        positions = [d.indices + start for d, start in zip(deltas, starts, strict=False)]
        few = starts[-1] <= torch.iinfo(torch.int32).max
        self._slots = torch.cat(positions).to(torch.int32 if few else torch.int64)
        self._values = torch.cat([delta.change for delta in deltas]).float()
        self._weight = weight

    @property
    def values(self) -> Tensor:
        """The change of each weight, float32 (size,), without a gradient."""
        self._follow()
        return self._values

    @property
    def slots(self) -> Tensor:
        """Position of each value, int32 or int64 (size,)."""
        self._follow()
        return self._slots

    def _follow(self) -> None:
        device = self._weight.tensor.device
        if self._values.device != device and device.type != "meta":
            self._values, self._slots = self._values.to(device), self._slots.to(device)
