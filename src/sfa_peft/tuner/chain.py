# SPDX-License-Identifier: Apache-2.0
"""Sparse changes of earlier adapters, which belong to the base of a later one and never train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..config import SFAConfig
from ..errors import TargetError
from ..files.record import Link
from ..sparse.pool import OwnStore, Pool
from ..sparse.weight import Weight
from .layer import SFALayer
from .plan import Plan
from .reading import SavedAdapter


def put_on_chain(plan: Plan, chain: Sequence[SavedAdapter], config: SFAConfig) -> Plan:
    """Return a plan that wraps what earlier adapters change, too.

    Raises:
        TargetError: If `modules_to_save` takes a layer that they change.
    """
    if not chain:
        return plan
    changed = {name.rpartition(".")[0] for saved in chain for name in saved.deltas}
    layers = {n: t for saved in chain for n, t in saved.plan.targets.items() if n in changed}
    for name in layers:
        if any(f".{module}." in f".{name}." for module in config.modules_to_save or ()):
            raise TargetError(
                f"The earlier adapter `{chain[-1].source}` changes `{name}`, which modules_to_save "
                "would train and save whole. Leave that out of modules_to_save."
            )
    last = chain[-1]
    links = plan.record.chain or (*last.plan.record.chain, Link(last.source, last.digest))
    others = {
        n: replace(t, parameters={}, width=0) for n, t in layers.items() if n not in plan.targets
    }
    return replace(
        plan,
        targets=dict(plan.targets) | others,
        record=replace(plan.record, chain=links),
        earlier=frozenset(layers),
    )


def check_same_chain(
    reused: SavedAdapter | None, chain: Sequence[SavedAdapter], config: SFAConfig
) -> None:
    """Check that trained values of a saved selection are changes of the same base.

    Raises:
        TargetError: If they are not.
    """
    if reused is None or config.selection_values != "trained":
        return
    if [a.digest for a in reused.chain] != [a.digest for a in chain]:
        raise TargetError(
            f"selection_from={reused.source!r} with selection_values='trained': those values are "
            f"changes on top of {[a.source for a in reused.chain] or 'the plain backbone'}, here "
            f"the base is {[a.source for a in chain] or 'the plain backbone'}. Give the same "
            "continue_from, or selection_values='zero'."
        )


def attach_chain(model: nn.Module, adapter_name: str, chain: Sequence[SavedAdapter]) -> None:
    """Make earlier changes part of an adapter's base; the layers are wrapped already.

    Later adapters that build on the same earlier one share its pool.
    """
    for saved in chain:
        name = f"earlier {saved.digest[:16]}"  # what weights know it by; no adapter's name
        weights = {tensor: _weight(model, tensor) for tensor in saved.deltas}
        if not any(name in weight.slices for weight in _all_weights(model)):
            starts = [0]
            for weight in weights.values():
                starts.append(starts[-1] + weight.tensor.numel())
            first = next(iter(weights.values()))
            pool = Pool(name, OwnStore(list(saved.deltas.values()), starts, first))
            for tensor, weight in weights.items():
                pool.add(weight, tensor)
        for weight in _all_weights(model):
            if name in weight.slices:
                weight.earlier[adapter_name] = (*weight.earlier.get(adapter_name, ()), name)


def _all_weights(model: nn.Module) -> list[Weight]:
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    return [weight for layer in layers for weight in layer.weights.values()]


def _weight(model: nn.Module, tensor: str) -> Weight:
    path, _, parameter = tensor.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, SFALayer):  # wrapped by `put_on_chain`
        raise TargetError(f"`{path}` is not adapted, but an earlier adapter changes it.")
    return layer.carrier(parameter)
