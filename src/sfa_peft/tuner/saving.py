# SPDX-License-Identifier: Apache-2.0
"""From an adapter in a model to what its files hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import AdapterFileError, OtherBaseWarning, warn
from ..files.packing import Entries, pack, with_manifest
from ..files.record import Resolved, SavedTensor, digests, type_name
from ..sparse.delta import adapt, by_weight
from ..sparse.pool import Pool
from .adapter import Adapter


def pack_state(adapter: Adapter, state: dict[str, Tensor], saved_values: str) -> Resolved:
    """Put the packed selection in the place of values and positions in a state dict.

    Args:
        adapter: The adapter.
        state: Its tensors by key; changed in place.
        saved_values: How changed weights are written, see `SFAConfig`.

    Returns:
        Its record, with the size of the packed selection and the base's digests.
    """
    pool, record = adapter.pool, adapter.record
    key = next((k for k in state if ".sfa_slots" in f".{k}"), None)
    if key is None or pool is None:
        return record
    slots = state.pop(key)
    values = state.pop(key.replace("sfa_slots", "sfa_pool"))
    if slots.is_meta or values.is_meta or any(w.tensor.is_meta for w in pool.weights):
        raise AdapterFileError(
            "The adapter or its base is on the meta device and holds no values; load it first."
        )
    bases = [weight.pretrained() for weight in pool.weights]
    tensors = tuple(
        SavedTensor(t.name, t.shape, type_name(base.dtype), digests(base))
        for t, base in zip(record.tensors, bases, strict=True)
    )
    entries = _entries(pool, slots, values)
    if saved_values == "exact":
        _warn_of_lost_bits(adapter.name, entries)
    packed = pack(entries, saved_values)
    state[key.replace("sfa_slots", "sfa_packed")] = packed = with_manifest(packed, tensors)
    return replace(record, tensors=tensors, packed=packed.numel())


def _entries(pool: Pool, slots: Tensor, values: Tensor) -> list[Entries]:
    """Return the selected entries by weight, in the order of their positions."""
    entries = []
    deltas = by_weight(slots.detach().cpu(), values.detach().cpu(), pool.starts)
    for weight, delta in zip(pool.weights, deltas, strict=True):
        base = weight.foundation(pool.adapter_name)
        at = base.reshape(-1)[delta.indices.to(base.device)].cpu()
        entries.append(Entries(base.numel(), delta.indices, delta.change, at))
    return entries


def _warn_of_lost_bits(adapter_name: str, tensors: list[Entries]) -> None:
    """Say where float64 changes, which a file holds in float32, lead to other weights then."""
    lost = sum(
        int((adapt(t.base, t.change) != adapt(t.base, t.change.float())).sum())
        for t in tensors
        if t.change.dtype == torch.float64
    )
    if lost:
        warn(
            f"Adapter `{adapter_name}` was trained with float64 values and is saved with float32 "
            f"ones, so {lost} adapted weights lose their last bits. Make the model float64 before "
            "it gets the adapter, not after: the values are float32 then, and files are exact.",
            OtherBaseWarning,
        )
