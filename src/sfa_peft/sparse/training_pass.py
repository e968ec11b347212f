# SPDX-License-Identifier: Apache-2.0
"""The weights of one pool from the forward of a training step to its end: all of them at once.

Between two picks a step changes values and nothing else. So nothing need be put back before what is
new is written; positions are widened and changes are added for all weights together, one write is
left for each, and where its gradient goes is wired once. A GPU waits for Python: this is what it
waits for in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .delta import Spans, adapt, span_length
from .entries import Entries
from .weight import Weight, stamp_of
from .write_lock import put, writable

#: Most entries of weights that are written together: their temporary copies take 16 bytes each.
_TOGETHER = 1 << 18


class Group(NamedTuple):
    """Some weights that follow each other, and what stays as it is from one pick to the next.

    Attributes:
        members: Each weight and its entries; None where nothing is selected.
        counts: Their numbers of entries.
        order: Which of the pool's ranges of slots are theirs, in the order of weights.
        indices: Positions of all entries in their weights; None where there are none.
        undo: What the weights have there originally.
    """

    members: list[tuple[Weight, Entries | None]]
    counts: list[int]
    order: list[int]
    indices: Tensor | None
    undo: Tensor | None

    def places(self) -> Sequence[Tensor]:
        """Return the positions of each weight's entries, int64."""
        if self.indices is None:
            return [torch.empty(0, dtype=torch.int64, device="cpu")] * len(self.counts)
        return self.indices.long().split(self.counts)

    def originals(self) -> Sequence[Tensor]:
        """Return what each weight holds without the changes."""
        return self.places() if self.undo is None else self.undo.split(self.counts)

    def entries_of(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what each weight holds with the values of the pool's ranges in it."""
        if self.undo is None:
            return self.places()
        own = [pieces[i] for i in self.order]
        return adapt(self.undo, own[0] if len(own) == 1 else torch.cat(own)).split(self.counts)


class Plan(NamedTuple):
    """What stays as it is from one pick to the next.

    Attributes:
        layout: The pool's, which is another object after a pick.
        sizes: Of its ranges of slots, in the order of slots.
        groups: All weights of the pool.
    """

    layout: list[Spans]
    sizes: list[int]
    groups: list[Group]


class TrainingPass:
    """The training forwards of the weights of a pool.

    Args:
        pool: The pool (`pool.Pool`, which imports this).
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self._plan: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"pool": self.pool, "_plan": None}

    def begin(self) -> bool:
        """Make all weights hold their changes, and wire what they want of the backward.

        Returns:
            Whether layers can use that; not where others than this pool change a weight, or where
            something stands for one (torch.func).
        """
        pool = self.pool
        name = pool.adapter_name
        if pool.shard is not None or any(w.earlier or w.candidates for w in pool.weights):
            return False
        plan, stamps = self._find(), (pool.stamp(),)
        missed = pool.weights if plan is None else self._write(plan, stamps)
        if any(weight.is_stand_in for weight in missed):
            return False
        for weight in missed:
            weight.refresh([name])
        if missed:
            self._plan = None  # what it was made of may be gone
        for weight, stand_in in zip(pool.weights, pool.stand_ins(), strict=True):
            _wire(weight, name, stand_in)
        return True

    def _write(self, plan: Plan, stamps: tuple[Any, ...]) -> list[Weight]:
        """Write what values changed; return the weights that something else happened to."""
        name, missed = self.pool.adapter_name, []
        stack = ((name, False),)
        pieces = self.pool.values.detach()[: sum(plan.sizes)].split(plan.sizes)
        for group in plan.groups:
            due = []
            for number, (weight, entries) in enumerate(group.members):
                now = stamp_of(weight.tensor)
                if not _is_free(weight, name, entries, now):
                    missed.append(weight)
                elif weight.stamp != (stack, now, stamps):
                    due.append((number, weight, entries))
            if not due:
                continue
            written, places = group.entries_of(pieces), group.places()
            with writable(due[0][1].tensor):
                for number, weight, entries in due:
                    put(weight.tensor, places[number], written[number])
                    weight.live, weight.in_graph = (name,), False
                    weight.written = [] if entries is None else [entries]
                    weight.tensor_stamp = stamp_of(weight.tensor)
                    weight.stamp = stack, weight.tensor_stamp, stamps
        return missed

    def end(self) -> None:
        """Put the pretrained entries back, but into merged layers."""
        name, plan = self.pool.adapter_name, self._find()
        for weight in self.pool.weights if plan is None else ():
            if not weight.owner.merged:
                weight.withdraw()
        for group in () if plan is None else plan.groups:
            due = []
            for number, (weight, entries) in enumerate(group.members):
                if weight.owner.merged:
                    continue
                now = stamp_of(weight.tensor)
                if weight.live == (name,) and _is_free(weight, name, entries, now):
                    due.append((number, weight))
                else:
                    weight.withdraw()
            if not due:
                continue
            places, undo = group.places(), group.originals()
            with writable(due[0][1].tensor):
                for number, weight in due:
                    put(weight.tensor, places[number], undo[number])
                    weight.live, weight.written, weight.stamp = (), [], None
                    weight.in_graph, weight.tensor_stamp = False, stamp_of(weight.tensor)

    # --- what stays ----------------------------------------------------------------------------

    def _find(self) -> Plan | None:
        """Return the plan for the present layout; None where weights are not alike enough."""
        layout = self.pool.layout()
        if self._plan is None or self._plan.layout is not layout:
            self._plan = self._make(layout)
        return self._plan

    def _make(self, layout: list[Spans]) -> Plan | None:
        pool, weights = self.pool, self.pool.weights
        if pool.shard is not None or not weights:
            return None
        first = weights[0].tensor
        kinds = {(w.tensor.dtype, w.tensor.device, w.tensor.is_inference()) for w in weights}
        if len(kinds) > 1 or first.is_inference() or first.is_meta:
            return None
        entries = [
            _entries_at(weight, pool.adapter_name, spans) if spans else None
            for weight, spans in zip(weights, layout, strict=True)
        ]
        if any(own is None and spans for own, spans in zip(entries, layout, strict=True)):
            return None  # made by the first forward after a pick
        ranges = sorted((a, b) for spans in layout for a, b in spans)
        number = {span: i for i, span in enumerate(ranges)}
        groups = []
        for first, last in _cuts([span_length(spans) for spans in layout]):
            own = entries[first:last]
            there = [e for e in own if e is not None]
            indices, undo = (_joined([getattr(e, n) for e in there]) for n in ("indices", "undo"))
            if there and (indices is None or undo is None):
                return None
            members = list(zip(weights[first:last], own, strict=True))
            counts = [span_length(spans) for spans in layout[first:last]]
            order = [number[span] for spans in layout[first:last] for span in spans]
            groups.append(Group(members, counts, order, indices, undo))
        return Plan(layout, [b - a for a, b in ranges], groups)


def _cuts(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut a row of weights into groups by their numbers of entries; yield (first, last + 1)."""
    first = number = 0
    for last, count in enumerate(counts):
        if number and number + count > _TOGETHER:
            yield first, last
            first, number = last, 0
        number += count
    yield first, len(counts)


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Return tensors that lie behind each other as one, without a copy; None if they do not."""
    if not parts:
        return None
    first = parts[0]
    ends = [t.data_ptr() + t.nbytes for t in parts]
    storage = first.untyped_storage().data_ptr()
    for part, end in zip(parts[1:], ends, strict=False):
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return None
    size = sum(part.numel() for part in parts)
    return first.as_strided((size,), (1,))


def _entries_at(weight: Weight, name: str, spans: Spans) -> Entries | None:
    """Return an adapter's entries, None if they were not made yet for these slots."""
    known = None if name in weight.finished else weight.entries.get(name)
    return known if known is not None and known.spans is spans else None


def _is_free(weight: Weight, name: str, entries: Entries | None, now: tuple[Any, ...]) -> bool:
    """Whether nothing but an adapter's own entries is on the originals, for all one knows."""
    return (
        weight.tensor_stamp == now
        and weight.whole_original is None
        and (not weight.live or weight.live == (name,))
        and (entries is None or weight.entries.get(name) is entries)
    )


def _wire(weight: Weight, name: str, stand_in: Tensor) -> None:
    """Prepare for a forward what the only adapter wants; the same for as long as it can be."""
    tensor, entries = weight.tensor, weight.entries.get(name)
    place = id(tensor), tensor.data_ptr(), tensor.requires_grad
    key = (place, id(stand_in), id(entries), id(weight.observers.get(name)))
    weight.in_graph = True
    if weight.prepared is None or weight.wired != key:
        # What the ids are of is kept alive by what is prepared.
        weight.wired, weight.prepared = key, weight.taps().with_alias_of(tensor)
