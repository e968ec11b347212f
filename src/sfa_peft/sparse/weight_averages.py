# SPDX-License-Identifier: Apache-2.0
"""Averages of weights (EMA, SWA, mean teachers), made by others: noticed, and put right.

They write where torch's version counters do not see it (`.data`), average positions like numbers,
copy values without positions, and move frozen weights by rounding. A model that was copied takes
positions and frozen weights from the one that it is a copy of: slots are never given out anew, so
the positions of a later time belong to the values of an earlier one too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import SFAError
from .pool import Pool, every_pool
from .weight import Weight
from .write_lock import is_stand_in

State = dict[str, Tensor]

_SAME_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes of a number
#: So many roundings an average of equal numbers may be from them.
_ROUNDINGS = 8


def notice(pool: Pool) -> None:
    """Look at what a pool and its weights hold, and make the next forward use it.

    Costs two reductions over the pool, so it is for models that train, once a forward.

    Raises:
        SFAError: If there are values whose positions nobody knows.
    """
    values = pool.values
    if values.is_meta or is_stand_in(values):
        return
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing may be asked of the device
    with torch.no_grad():
        _settle_slots(pool)
        _settle_base(pool)
        _notice_values(pool)


def _settle_slots(pool: Pool) -> None:
    slots = pool.slots
    if pool.known is None:
        pool.known = slots.clone()
    if not torch.equal(slots, _on(pool, pool.known)):
        _write_slots(pool, _positions(pool))
    if pool.owns or not _has_loose_values(pool):
        return
    _write_slots(pool, _positions(pool))
    if _has_loose_values(pool):
        raise SFAError(
            f"Adapter `{pool.adapter_name}`: values are there whose positions are not: parameters "
            "of another model were copied or averaged into this one, and positions are a buffer. "
            "Copy buffers too, for t, s in zip(teacher.buffers(), student.buffers()): t.copy_(s). "
            "Or make the teacher with copy.deepcopy(student)."
        )


def _positions(pool: Pool) -> Tensor:
    """Return the positions that a pool's values belong to, whatever was written to its slots."""
    known = _on(pool, _known(pool))
    if pool.owns:
        return known
    source = _source(pool)
    if source is not None:
        theirs = _on(pool, _positions(source))
        if _extends(theirs, known):
            return theirs
    slots = pool.slots
    others = (_known(p) for p in every_pool() if p is not pool and p.store.is_there)
    same = (o for o in others if o.shape == slots.shape and not o.is_meta)
    if any(torch.equal(_on(pool, o), slots) for o in same):
        return slots.clone()  # another model's buffers were copied into this one
    return known


def _source(pool: Pool) -> Pool | None:
    source = None if pool.source is None else pool.source()
    return source if source is not None and source.store.is_there else None


def _known(pool: Pool) -> Tensor:
    return pool.slots if pool.known is None else pool.known


def _on(pool: Pool, positions: Tensor) -> Tensor:
    return positions.to(pool.slots)


def _extends(positions: Tensor, known: Tensor) -> bool:
    used = known >= 0
    return positions.shape == known.shape and torch.equal(positions[used], known[used])


def _write_slots(pool: Pool, positions: Tensor) -> None:
    if not torch.equal(pool.slots, positions):
        pool.slots.copy_(positions)
    pool.known = positions.clone()


def _has_loose_values(pool: Pool) -> bool:
    count = pool.num_selected
    return count < pool.size and bool(pool.values[count:].any())


def _settle_base(pool: Pool) -> None:
    """Give a copy the frozen weights of its source where it holds averages of them."""
    source = None if pool.owns else _source(pool)
    if source is None or source.names != pool.names:
        return
    for ordinal, (weight, other) in enumerate(zip(pool.weights, source.weights, strict=True)):
        if weight.is_untouched():
            continue
        found, base = weight.pretrained(), other.pretrained()
        base = base.to(found.device)
        if found.dtype == base.dtype and not torch.equal(found, base):
            same = _is_average(found, base).view(-1)
            same[source.indices(ordinal).to(found.device)] = True  # may have held changes
            if bool(same.all()):
                weight.overwrite(base)


def _is_average(found: Tensor, base: Tensor) -> Tensor:
    """Whether each number differs from another by rounding only."""
    return torch.isclose(found, base, rtol=_ROUNDINGS * torch.finfo(base.dtype).eps, atol=0)


def _notice_values(pool: Pool) -> None:
    """Count a write that moved no version counter, so that the pool's stamp moves."""
    values, stamp = pool.values.detach(), pool.stamp()
    bits = int(values.view(_SAME_SIZE[values.element_size()]).sum(dtype=torch.int64))
    unseen = pool.seen is not None and pool.seen[0] == stamp and pool.seen[1] != bits
    live = next((w for w in pool.weights if pool.adapter_name in w.live), None)
    if unseen or (live is not None and not live.is_as_written()):
        pool.foreign_writes += 1
    pool.seen = pool.stamp(), bits


def take_positions(state: State, key: str, pool: Pool) -> None:
    """Prepare for loading positions from a state dict.

    Raises:
        SFAError: If they are an average.
    """
    if key in state and state[key].is_floating_point():
        raise SFAError(
            f"{key}: positions as {state[key].dtype}: they were averaged, but are no numbers to be "
            "averaged. Average floating-point tensors only (is_floating_point()), and take the "
            "others from the last state dict."
        )
    if key in state:
        pool.known = None


def undo_rounding(state: State, key: str, weight: Weight) -> None:
    """Leave a frozen weight as it is where a state dict holds an average of its equals.

    An average of equal numbers is rounded, and adapters are refused on another base. Only for
    float32: numbers of 16 bits may well be those of another base.
    """
    found = state.get(key)
    if found is None or weight.tensor.dtype != torch.float32 or found.dtype != torch.float32:
        return
    own = weight.tensor.detach()
    if own.is_meta or found.is_meta or own.shape != found.shape or isinstance(own, DTensor):
        return
    found = found.to(own.device)
    if not torch.equal(found, own) and bool(_is_average(found, own).all()):
        state[key] = own.clone()
