# SPDX-License-Identifier: Apache-2.0
"""From an adapter in a model to what its files hold, and back."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import AdapterFileError, SFAWarning
from ..files.fingerprint import digests, is_same_base, type_name
from ..files.folder import check_selection
from ..files.packing import Entries, manifest_of, pack, unpack, with_manifest
from ..files.record import Resolved, SavedTensor
from ..sparse.pool import Pool
from .layer import SFALayer
from .plan import Plan
from .upstream.base_config import check_base_config

State = dict[str, Tensor]

#: "0" loads onto other pretrained weights where no config can be passed; with a warning.
_ENVIRONMENT = "SFA_CHECK_BASE"


def pack_state(pool: Pool, config: SFAConfig, resolved: Resolved, state: State) -> Resolved:
    """Put the packed selection in the place of values and positions in a state dict.

    Args:
        pool: The adapter's pool in the model.
        config: Its configuration.
        resolved: What its budget was solved to.
        state: The adapter's tensors by key; changed in place.

    Returns:
        `resolved` with the size of the packed selection and the base's digests.
    """
    key = next((k for k in state if ".sfa_slots" in f".{k}"), None)
    if key is None:
        return resolved
    slots = state.pop(key)
    values = state.pop(key.replace("sfa_slots", "sfa_pool"))
    ordinals = range(len(pool.tensors))
    if slots.is_meta or values.is_meta or any(pool.weight(i).is_meta for i in ordinals):
        raise AdapterFileError(
            "The adapter or its base is on the meta device and holds no values; load it first."
        )
    tensors = tuple(
        SavedTensor(t.name, t.shape, type_name(pool.weight(i).dtype), digests(pool.pretrained(i)))
        for i, t in enumerate(resolved.tensors)
    )
    packed = with_manifest(pack(_entries(pool, slots, values), config.saved_values), tensors)
    state[key.replace("sfa_slots", "sfa_packed")] = packed
    return replace(resolved, tensors=tensors, packed=packed.numel())


def _entries(pool: Pool, slots: Tensor, values: Tensor) -> list[Entries]:
    """Return the selected entries by tensor, in the order of their positions."""
    entries = []
    parts = by_tensor(slots.detach().cpu(), values.detach().cpu(), pool.starts)
    for ordinal, (indices, change) in enumerate(parts):
        weight = pool.foundation(ordinal)
        base = weight.reshape(-1)[indices.to(weight.device)].cpu()
        entries.append(Entries(weight.numel(), indices, change, base))
    return entries


def by_tensor(slots: Tensor, values: Tensor, starts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return (flat positions int64, increasing; values) of each tensor, out of slots.

    Args:
        slots: Positions over all tensors, -1 for values without one.
        values: One per slot.
        starts: First position of each tensor, and the end.
    """
    assigned = slots >= 0
    positions, order = slots[assigned].long().sort()
    values = values[assigned][order]
    cuts = torch.searchsorted(positions, positions.new_tensor(starts)).tolist()
    return [
        (positions[a:b] - start, values[a:b])
        for (a, b), start in zip(pairwise(cuts), starts, strict=False)
    ]


def unpack_state(layers: list[SFALayer], adapter_name: str, state: State, *, strict: bool) -> State:
    """Return the tensors of a file as the model holds them.

    Args:
        layers: The adapter's layers in the model.
        adapter_name: The adapter.
        state: Tensors by key, without adapter names.
        strict: Whether the base must hold the values that the adapter was trained on.

    Raises:
        AdapterFileError: If the selection is damaged or belongs to another model or base.
    """
    state = _renamed(layers, adapter_name, state)
    pool = next((p for layer in layers if (p := layer.find_pool(adapter_name))), None)
    for key in list(state):
        if key.endswith("sfa_packed"):
            if pool is None:
                raise AdapterFileError(
                    f"{key}: a selection, but adapter `{adapter_name}` changes no weights (rho=1). "
                    "Build it from the adapter's own config."
                )
            packed = state.pop(key)
            _check_manifest(layers, pool, packed, key, strict=strict)
            slots, values = unpack_selection(pool, packed, key)
            state[key.replace("sfa_packed", "sfa_slots")] = slots
            state[key.replace("sfa_packed", "sfa_pool")] = values
        elif key.endswith("sfa_slots") and pool is not None:
            values = state.get(key.replace("sfa_slots", "sfa_pool"))
            if values is not None:
                check_selection(key, state[key], values, pool.starts[-1])
    if pool is not None:
        pool.drop_packed()
    return state


def _check_manifest(
    layers: list[SFALayer], pool: Pool, packed: Tensor, where: str, *, strict: bool
) -> None:
    """Check that a packed selection is of the very tensors that its positions count here.

    Raises:
        AdapterFileError: Naming the first tensor that differs.
    """
    name = pool.adapter_name
    listed = manifest_of(packed, where)
    if listed is None:
        return
    here = _new_names(layers, name)
    known = [t.digests for t in layers[0].resolved[name].tensors]
    paths = [
        f"{here.get(layer, layer)}.{parameter}"
        for layer, _, parameter in (t.name.rpartition(".") for t in listed)
    ]
    if paths != pool.names:
        pairs = zip(paths, pool.names, strict=False)
        theirs, ours = next((p for p in pairs if p[0] != p[1]), (len(paths), len(pool.names)))
        raise AdapterFileError(
            f"{where}: its positions count `{theirs}` where adapter `{name}` counts `{ours}`. It "
            "was made for other layers: load it under a new name, with its own config."
        )
    for ordinal, tensor in enumerate(listed):
        if tensor.digests == known[ordinal]:
            continue  # checked when the layers were planned
        weight = pool.pretrained(ordinal)
        if not weight.is_meta and is_same_base(weight, tensor.digests, tensor.dtype) is False:
            _report_other_base(name, pool.names[ordinal], _is_strict(strict))
            return


def _is_strict(strict: bool) -> bool:
    return strict and os.environ.get(_ENVIRONMENT) != "0"


def base_reader(weight_of: Callable[[int], Tensor], where: str) -> Callable[[int, Tensor], Tensor]:
    """Return what `unpack` asks for the base: entries of a weight, by ordinal and positions."""

    def base_at(ordinal: int, indices: Tensor) -> Tensor:
        weight = weight_of(ordinal)
        if weight.is_meta:
            raise AdapterFileError(
                f"{where}: values are stored against the base, which is on the meta device. Load "
                "the base's weights first."
            )
        return weight.reshape(-1)[indices.to(weight.device)]

    return base_at


def unpack_selection(pool: Pool, packed: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return (positions, values) of a packed selection, of the pool's length and type.

    Raises:
        AdapterFileError: If it is damaged, or longer than the pool.
    """
    sizes = [pool.weight(i).numel() for i in range(len(pool.tensors))]
    entries = unpack(packed, sizes, base_reader(pool.foundation, where), where)
    count, size = sum(i.numel() for i, _ in entries), pool.size
    if count > size:
        raise AdapterFileError(
            f"{where}: {count} selected weights, but adapter `{pool.adapter_name}` has room for "
            f"{size}. It was made with another budget: load it under a new name."
        )
    slots = torch.full((size,), -1, dtype=pool.slots_dtype, device="cpu")
    values = torch.zeros(size, dtype=torch.float32, device="cpu")
    if count:
        starts = zip(pool.starts, entries, strict=False)
        slots[:count] = torch.cat([i + start for start, (i, _) in starts]).to(slots.dtype)
        values[:count] = torch.cat([change for _, change in entries])
    return slots, values


def in_pool_type(pool: Pool | None, state: State) -> State:
    """Return tensors with the values in their pool's type, which becomes float32 if it must.

    Pools are float32 unless `autocast_adapter_dtype=False`, or where a loader leaves it out; 16
    bits may not hold what was trained in 32.
    """
    key = next((key for key in state if ".sfa_pool." in key), None)
    if pool is None or key is None:
        return state
    values = state[key]
    kept = values.to(pool.dtype)
    if torch.equal(kept.float(), values.float()):
        return {**state, key: kept}
    parameter = pool.anchor.sfa_pool[pool.adapter_name]
    if not parameter.is_meta:
        parameter.data = parameter.data.float()
    return state


def check_base(model: nn.Module, adapter_name: str, plan: Plan, *, strict: bool) -> None:
    """Check that the base holds the pretrained values that a saved adapter was trained on.

    Raises:
        AdapterFileError: Naming the first tensor that differs, if `strict`.
    """
    check_base_config(adapter_name, plan.saved, plan.backbone, strict=_is_strict(strict))
    others = set()
    for saved in plan.saved.tensors if plan.saved else ():
        name = plan.path_here(saved.name)
        weight = pretrained_tensor(model, name)
        if not saved.digests or weight.is_meta:
            continue
        same = is_same_base(weight, saved.digests, saved.dtype)
        if same is False:
            _report_other_base(adapter_name, name, _is_strict(strict))
            return
        if type_name(weight.dtype) != saved.dtype:
            others.add((saved.dtype, type_name(weight.dtype), same))
    for before, now, same in sorted(others, key=str):
        verified = "its values are the rounded ones" if same else "its values cannot be verified"
        warnings.warn(
            f"Adapter `{adapter_name}` was trained on a {before} base and is loaded onto a {now} "
            f"one ({verified}). Changes are added in float32 and rounded to {now}, so outputs "
            "differ from those in training by that rounding.",
            SFAWarning,
            stacklevel=5,
        )


def pretrained_tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter with its original entries, also where adapters are on it."""
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, BaseTunerLayer):
        return getattr(layer, parameter).detach()
    weight = getattr(layer.get_base_layer(), parameter)
    entries = layer.entries.get(parameter) if isinstance(layer, SFALayer) else None
    return weight.detach() if entries is None else entries.pretrained(weight)


def _report_other_base(adapter_name: str, name: str, strict: bool) -> None:
    message = (
        f"Adapter `{adapter_name}` was trained on other pretrained weights: `{name}` holds "
        "other values here. "
    )
    if strict:
        raise AdapterFileError(
            message + "Load it onto the model it was trained on; or, to load it all the same, read "
            "its config with SFAConfig.from_pretrained, set check_base=False and pass "
            f"config=config (or set {_ENVIRONMENT}=0)."
        )
    warnings.warn(message + "Loaded all the same, as you wish.", SFAWarning, stacklevel=6)


def _new_names(layers: list[SFALayer], adapter_name: str) -> dict[str, str]:
    """Return by path in the file the path here, of layers that have another one there."""
    return {
        layer.saved_names[adapter_name]: layer.name
        for layer in layers
        if adapter_name in layer.saved_names
    }


def _renamed(layers: list[SFALayer], adapter_name: str, state: State) -> State:
    """Return the tensors under the paths that their layers have in this model."""
    new_names = _new_names(layers, adapter_name)
    if not new_names:
        return state
    pattern = re.compile(r"(^|.*\.)(" + "|".join(map(re.escape, new_names)) + r")(\.sfa_.*)")
    found = {}
    for key, tensor in state.items():
        match = pattern.fullmatch(key)
        new = key if match is None else f"{match[1]}{new_names[match[2]]}{match[3]}"
        found[new] = tensor
    return found


def settle(pool: Pool) -> None:
    """Unpack a selection that a loader put into the model as it lies in the file.

    transformers' own loader calls none of PEFT's hooks: the bytes wait on the layer until the
    values are first asked for.
    """
    packed = pool.packed
    if packed is None or packed.is_meta or not bool(packed.any()):
        return  # not loaded (yet)
    pool.settle = None  # values and positions are read below
    try:
        slots, values = unpack_selection(pool, packed, f"adapter `{pool.adapter_name}`, sfa_packed")
    except AdapterFileError:
        pool.settle = settle
        raise
    kept = pool.values
    kept.data = values.to(kept.device)  # the same parameter, float32 also on a 16-bit base
    with torch.no_grad():
        pool.slots.copy_(slots)
    pool.drop_packed()
