# SPDX-License-Identifier: Apache-2.0
"""The one reader: what an adapter's files say of a model, and their tensors as it holds them.

A saved adapter is read either into a model (`unpack_state`, called while PEFT loads it) or against
a model that it is not loaded into (`read_saved`): to reuse its selection, to build on it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import AdapterFileError, OtherBaseWarning, TargetError, warn
from ..files.adapter_config import LONGEST_CHAIN, Resolved, is_same_base, read_resolved, type_name
from ..files.folder import check_selection, reading_once, selection_of
from ..files.packing import PackedSelection
from ..sparse.delta import Delta, adding_type, count
from .adapter import Adapter, base_reader, unpack_selection
from .adapter_chain import SavedFiles, Search, packed_key
from .base_model_config import check_base_config
from .injection_plan import Plan, make_plan
from .layer import SFALayer
from .targets import is_excluded

State = dict[str, Tensor]

#: "0" loads onto other pretrained weights where no config can be passed; with a warning.
_ENVIRONMENT = "SFA_CHECK_BASE"


# --- into a model ------------------------------------------------------------------------------


def unpack_state(adapter: Adapter, state: State, *, strict: bool) -> State:
    """Return the tensors of a file as the model holds them.

    Args:
        adapter: The adapter in the model.
        state: Tensors by key, without adapter names.
        strict: Whether the base must hold the values that the adapter was trained on.

    Raises:
        AdapterFileError: If the selection is damaged or belongs to another model or base.
    """
    state = _renamed(adapter, state)
    pool = adapter.pool
    for key in list(state):
        if key.endswith("sfa_packed"):
            if pool is None:
                raise AdapterFileError(
                    f"{key}: a selection, but adapter `{adapter.name}` changes no weights (rho=1). "
                    "Build it from the adapter's own config."
                )
            packed = selection_of(state.pop(key), key)
            _check_manifest(adapter, packed, strict=strict)
            slots, values = unpack_selection(pool, packed)
            state[key.replace("sfa_packed", "sfa_slots")] = slots
            state[key.replace("sfa_packed", "sfa_pool")] = values
        elif key.endswith("sfa_slots") and pool is not None:
            values = state.get(key.replace("sfa_slots", "sfa_pool"))
            if values is not None:
                check_selection(key, state[key], values, pool.starts[-1])
    if adapter.store is not None:
        adapter.store.drop_packed()
    return state


def in_pool_type(adapter: Adapter, state: State) -> State:
    """Return tensors with the values in their pool's type, which becomes float32 if it must.

    Pools are float32 unless `autocast_adapter_dtype=False`, or where a loader leaves it out; 16
    bits may not hold what was trained in 32.
    """
    key = next((key for key in state if ".sfa_pool." in key), None)
    if adapter.pool is None or key is None:
        return state
    values, parameter = state[key], adapter.pool.values
    kept = values.to(parameter.dtype)
    if torch.equal(kept.float(), values.float()):
        return {**state, key: kept}
    if not parameter.is_meta:
        parameter.data = parameter.data.float()
    return state


def _renamed(adapter: Adapter, state: State) -> State:
    """Return the tensors under the paths that their layers have in this model."""
    new_paths = adapter.new_paths
    if not new_paths:
        return state
    pattern = re.compile(r"(^|.*\.)(" + "|".join(map(re.escape, new_paths)) + r")(\.sfa_.*)")
    found = {}
    for key, tensor in state.items():
        match = pattern.fullmatch(key)
        found[f"{match[1]}{new_paths[match[2]]}{match[3]}" if match else key] = tensor
    return found


def _check_manifest(adapter: Adapter, packed: PackedSelection, *, strict: bool) -> None:
    """Check that a packed selection is of the very tensors that its positions count here.

    Raises:
        AdapterFileError: Naming the first tensor that differs.
    """
    pool = adapter.pool
    if packed.manifest is None or pool is None:
        return
    paths = [
        f"{adapter.new_paths.get(layer, layer)}.{parameter}"
        for layer, _, parameter in (t.name.rpartition(".") for t in packed.manifest)
    ]
    if paths != pool.names:
        pairs = zip(paths, pool.names, strict=False)
        theirs, ours = next((p for p in pairs if p[0] != p[1]), (len(paths), len(pool.names)))
        raise AdapterFileError(
            f"{packed.where}: its positions count `{theirs}` where adapter `{adapter.name}` counts "
            f"`{ours}`. It was made for other layers: load it under a new name, with its own "
            "config."
        )
    known = [tensor.digests for tensor in adapter.record.tensors]
    for weight, name, tensor, digests in zip(
        pool.weights, pool.names, packed.manifest, known, strict=True
    ):
        if tensor.digests == digests:
            continue  # checked when the layers were planned
        base = weight.pretrained()
        if not base.is_meta and is_same_base(base, tensor.digests, tensor.dtype) is False:
            _report_other_base(adapter.name, name, strict)
            return


# --- the base ----------------------------------------------------------------------------------


def check_base(model: nn.Module, adapter_name: str, plan: Plan, *, strict: bool) -> None:
    """Check that the base holds the pretrained values that a saved adapter was trained on.

    Raises:
        AdapterFileError: Naming the first tensor that differs, if `strict`.
    """
    others = set()
    for saved in plan.record.tensors if plan.loaded else ():
        weight = pretrained_tensor(model, saved.name)
        if not saved.digests or weight.is_meta:
            continue
        same = is_same_base(weight, saved.digests, saved.dtype)
        if same is False:
            _report_other_base(adapter_name, saved.name, strict)
            return
        if type_name(weight.dtype) != saved.dtype:
            others.add((saved.dtype, type_name(weight.dtype), same))
    for before, now, same in sorted(others, key=str):
        wide = adding_type(getattr(torch, now))
        verified = "its values are the rounded ones" if same else "its values cannot be verified"
        warn(
            f"Adapter `{adapter_name}` was trained on a {before} base and is loaded onto a {now} "
            f"one ({verified}). Changes are added in {type_name(wide)} and rounded to {now}, so "
            "outputs differ from those in training by that rounding.",
            OtherBaseWarning,
        )


def check_function(adapter_name: str, plan: Plan, *, strict: bool) -> None:
    """Check that the base computes what it did when a saved adapter was trained.

    Of a selection that is trained anew from zero this is not asked: only its positions count.

    Raises:
        AdapterFileError: As `check_base_config`.
    """
    if plan.loaded:
        check_base_config(adapter_name, plan.record, plan.backbone, strict=_is_strict(strict))


def pretrained_tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter with its original entries, also where adapters are on it."""
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, BaseTunerLayer):
        return getattr(layer, parameter).detach()
    if isinstance(layer, SFALayer) and parameter in layer.weights:
        return layer.weights[parameter].pretrained()
    return getattr(layer.get_base_layer(), parameter).detach()


def _is_strict(strict: bool) -> bool:
    return strict and os.environ.get(_ENVIRONMENT) != "0"


def _report_other_base(adapter_name: str, name: str, strict: bool) -> None:
    message = (
        f"Adapter `{adapter_name}` was trained on other pretrained weights: `{name}` holds "
        "other values here. "
    )
    if _is_strict(strict):
        raise AdapterFileError(
            message + "Load it onto the model it was trained on; or, to load it all the same, read "
            "its config with SFAConfig.from_pretrained, set check_base=False and pass "
            f"config=config (or set {_ENVIRONMENT}=0)."
        )
    warn(message + "Loaded all the same, as you wish.", OtherBaseWarning)


# --- against a model ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's files say about a model.

    Attributes:
        source: Folder or Hub id.
        config: Its config.
        plan: Its layers and tensors, found in the model.
        deltas: Its sparse change by the names of this model, in the file's order.
        state: All its tensors by key, as in the file.
        digest: SHA-256 of the stored selection, hexadecimal.
        chain: Earlier adapters that it builds on, the oldest first.
    """

    source: str
    config: SFAConfig
    plan: Plan
    deltas: Mapping[str, Delta]
    state: State
    digest: str
    chain: tuple[SavedAdapter, ...] = ()


def read_saved(model: nn.Module, source: str, *, strict: bool = True) -> SavedAdapter:
    """Read an adapter that was saved, and check that it fits a model; the model stays as it is.

    Args:
        model: The model, with or without adapters. Its weights must be loaded.
        source: The adapter's folder or Hub id.
        strict: Whether the pretrained weights must be those it was trained on (see
            `SFAConfig.check_base`).

    Raises:
        AdapterFileError: If there is none, it is damaged, or it belongs to another model or base;
            or an adapter that it builds on is missing or was changed.
    """
    with reading_once():
        search = Search()
        files = search.read(source)
        return _fitted(model, (*search.earlier(files.links, source), files), strict=strict)[-1]


def read_chain(
    model: nn.Module, config: SFAConfig, folder: str | None, *, strict: bool
) -> tuple[SavedAdapter, ...]:
    """Read the earlier adapters that an adapter builds on, the oldest first.

    Args:
        model: The model.
        config: Of the adapter; a new one's `continue_from`, a saved one's `resolved` counts.
        folder: Where the config was read, None for a new adapter.
        strict: As in `read_saved`.

    Raises:
        AdapterFileError: If one is missing, was changed since, or does not fit the model; or there
            are more than a file may name.
    """
    if config.resolved is not None:
        with reading_once():
            earlier = Search().earlier(read_resolved(config.resolved).chain, folder)
            return _fitted(model, earlier, strict=strict)
    if config.continue_from is None:
        return ()
    parent = read_saved(model, config.continue_from, strict=strict)
    if len(parent.chain) >= LONGEST_CHAIN:
        raise AdapterFileError(
            f"continue_from={config.continue_from!r} builds on {len(parent.chain)} earlier "
            f"adapters; {LONGEST_CHAIN} are the most. Merge it into the base with "
            "merge_and_unload(), and start from that."
        )
    return (*parent.chain, parent)


def _fitted(
    model: nn.Module, files: Sequence[SavedFiles], *, strict: bool
) -> tuple[SavedAdapter, ...]:
    """Check adapters, each built on those before it, against a model.

    Raises:
        AdapterFileError: If one does not fit it.
    """
    chain: tuple[SavedAdapter, ...] = ()
    weights: dict[str, Tensor] = {}  # with the changes of those before
    for own in files:
        for name, delta in chain[-1].deltas.items() if chain else ():
            weight = weights[name] if name in weights else pretrained_tensor(model, name)
            weights[name] = weight if weight.is_meta else delta.added_to(weight)
        plan = make_plan(model, own.config)
        check_base(model, own.source, plan, strict=strict)
        deltas = _deltas(model, own, plan, weights)
        chain += (SavedAdapter(own.source, own.config, plan, deltas, own.state, own.digest, chain),)
    return chain


def _deltas(
    model: nn.Module, files: SavedFiles, plan: Plan, weights: Mapping[str, Tensor]
) -> dict[str, Delta]:
    names, key = [tensor.name for tensor in plan.record.tensors], packed_key(files.state)
    if (key is not None) != bool(names):
        raise AdapterFileError(
            f"{files.source}: its config lists {len(names)} tensors that it changes, but the file "
            f"holds {'no' if key is None else 'a'} selection; damaged. Save the adapter again."
        )
    if key is None:
        return {}
    bases = [weights[n] if n in weights else pretrained_tensor(model, n) for n in names]
    packed = selection_of(files.state[key], f"{files.source}: {key}")
    base_at = base_reader(bases.__getitem__, files.source)
    found = packed.unpack([base.numel() for base in bases], base_at)
    return {n: d for n, d in zip(names, found, strict=True) if d.indices.numel()}


def reuse(saved: SavedAdapter, config: SFAConfig) -> Resolved:
    """Return the record of a saved selection as a plan takes it: `internal` is what is selected.

    Raises:
        TargetError: If the new config leaves out or saves whole a layer that is selected from, or
            nothing is selected.
    """
    if not saved.deltas:
        raise TargetError(
            f"selection_from={saved.source!r}: no weight is selected there. Was that adapter "
            "trained with SFACallback or SFASelector?"
        )
    record = saved.plan.record
    for name in record.parameters:
        if is_excluded(config, name) is not None:
            raise TargetError(
                f"selection_from={saved.source!r} selects weights of `{name}`, which "
                "exclude_modules or modules_to_save of the new config takes. Change those."
            )
    return replace(record, internal=count(saved.deltas))
