# SPDX-License-Identifier: Apache-2.0
"""PEFT's `add_weighted_adapter`, and the config of an adapter that unites several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import SFAError
from ..files.adapter_config import Resolved, SavedLayer
from ..sparse.delta import Deltas, count, unite
from .adapted_layers import find_adapter, find_pool
from .adapter import Adapter
from .targets import own_modules

#: The one of PEFT's names for a combination that means something here.
LINEAR = "linear"


def union_config(
    model: nn.Module,
    parts: Sequence[Resolved],
    deltas: Deltas,
    like: SFAConfig,
    *,
    widths: Mapping[str, int] | None = None,
    external: int = 0,
    modules_to_save: list[str] | str | None = None,
) -> SFAConfig:
    """Return the config of an adapter that is as large as the union of several.

    Args:
        model: The model inside the tuner.
        parts: Layers and tensors of each, by the names of the model; sizes are those of the first.
        deltas: The united change.
        like: Config whose task type, base and biases it takes.
        widths: Widths of its external adapters by layer.
        external: Number of their parameters.
        modules_to_save: Modules that it saves whole.
    """
    widths = widths or {}
    tensors = {t.name: t for part in parts for t in part.tensors}
    found = {n: layer for part in parts for n, layer in part.layers.items()}
    layers = {n: found[n] for n in own_modules(model) if n in found}  # in the model's order
    selected = count(deltas)
    total = parts[0].total
    allowed = min(total, max(selected + external, 1))
    resolved = Resolved(
        total=total,
        allowed=allowed,
        adapter_dim=parts[0].adapter_dim if widths else 0,
        internal=selected,
        layers={
            n: SavedLayer(widths.get(n, 0), a.role, a.block, a.index) for n, a in layers.items()
        },
        tensors=tuple(tensors.values()),
        backbone=parts[0].backbone,
        base_config=parts[0].base_config,
    )
    return SFAConfig(
        budget=allowed / total,
        rho=None if widths else 0,
        external_type=like.external_type,
        external_bias=like.external_bias,
        modules_to_save=modules_to_save,
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        resolved=resolved.to_dict(),
    )


def add_weighted(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: Mapping[str, object],
) -> None:
    """Add an adapter that is the weighted sum of others; see `SFAModel.add_weighted_adapter`."""
    _check_way(combination_type, options)
    _check_arguments(tuner.peft_config, adapters, weights, adapter_name)
    model = tuner.model
    parts = [_find(model, name) for name in adapters]
    heads = _find_heads(model, adapters)
    changes = [part.pool.deltas() if part.pool else {} for part in parts]
    united = unite(changes, [float(w) for w in weights], "sum")
    tuner.peft_config[adapter_name] = union_config(
        model,
        [part.record for part in parts],
        united,
        tuner.peft_config[adapters[0]],
        modules_to_save=list(heads) or None,
    )
    try:
        tuner.inject_adapter(model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    pool = find_pool(model, adapter_name)
    if pool is not None:
        pool.fill(united, with_values=True)
    for name, owner in heads.items():
        saved: Any = model.get_submodule(name).modules_to_save
        saved[adapter_name].load_state_dict(saved[owner].state_dict())


def _check_way(combination_type: str, options: Mapping[str, object]) -> None:
    """Refuse ways to combine, and their options, that PEFT has for low-rank matrices."""
    given = "" if combination_type == LINEAR else f"combination_type={combination_type!r} "
    given = given or "".join(f"{name}={value!r} " for name, value in options.items())
    if given:
        raise SFAError(
            f"add_weighted_adapter: {given}is made for low-rank matrices; sparse "
            f"changes know combination_type={LINEAR!r} only (the exact weighted sum), without "
            "options. Other ways to join them: "
            "sfa_peft.tasks.combine(model, adapters, method='larger' or 'disjoint')."
        )


def _check_arguments(
    known: Mapping[str, object],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
) -> None:
    start = "add_weighted_adapter: "
    names = isinstance(adapters, (list, tuple)) and all(isinstance(name, str) for name in adapters)
    if not names or not adapters or any(name not in known for name in adapters):
        raise SFAError(
            f"{start}adapters={adapters!r}, but the model has {sorted(known)}. Name adapters "
            "that it has, in a list."
        )
    if isinstance(weights, (np.ndarray, Tensor)):
        weights = weights.tolist()
    numbers = isinstance(weights, (list, tuple)) and all(
        isinstance(w, Real) and math.isfinite(w) for w in weights
    )
    if not numbers or len(set(adapters)) < len(adapters) or len(weights) != len(adapters):
        raise SFAError(
            f"{start}expected different adapters and one weight for each, a finite number, got "
            f"{list(adapters)} and weights={weights!r}."
        )
    if not isinstance(adapter_name, str) or adapter_name in known:
        raise SFAError(
            f"{start}adapter_name={adapter_name!r} is no name, or the model has an adapter of that "
            "name already. Give another name, or delete it first."
        )


def _find(model: nn.Module, adapter_name: str) -> Adapter:
    """Return an adapter, if its effect is a change of pretrained weights and no more."""
    adapter = find_adapter(model, adapter_name)
    if adapter is None:
        raise SFAError(
            f"add_weighted_adapter: `{adapter_name}` is not an SFA adapter. Give SFA adapters."
        )
    if adapter.record.widths:
        raise SFAError(
            f"add_weighted_adapter: `{adapter_name}` has external adapters, which are not linear, "
            "so a weighted sum of them has no meaning. Only adapters with rho=0 can be summed; "
            "sfa_peft.tasks.combine(model, adapters, keep=...) sums the sparse changes and takes "
            "the external adapters of one of them."
        )
    if adapter.record.chain:
        raise SFAError(
            f"add_weighted_adapter: `{adapter_name}` continues "
            f"`{adapter.record.chain[-1].source}`, so its change is not one of the pretrained "
            "weights. Combine adapters of the plain backbone."
        )
    return adapter


def _find_heads(model: nn.Module, adapters: Sequence[str]) -> dict[str, str]:
    """Return by path the adapter of whose module saved whole the new one takes a copy."""
    owners = {}
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        found = [adapter for adapter in adapters if adapter in module.modules_to_save]
        if len(found) > 1:
            raise SFAError(
                f"add_weighted_adapter: {', '.join(f'`{a}`' for a in found)} each save `{name}` "
                "whole (modules_to_save), and whole modules cannot be summed. Take one head: "
                f"sfa_peft.tasks.combine(model, adapters, weights=..., keep={found[0]!r})."
            )
        if found:
            owners[name] = found[0]
    return owners
