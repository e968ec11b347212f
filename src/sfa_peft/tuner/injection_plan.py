# SPDX-License-Identifier: Apache-2.0
"""From a model and a config to what goes where: layers, roles, widths and number of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..backbones import Backbone, RoleModule, find_backbone, role_modules
from ..budget import BudgetPlan, External, solve_budget, with_selection
from ..config import SFAConfig
from ..errors import AdapterFileError, BudgetWarning, TargetError, warn
from ..files.adapter_config import Resolved, SavedLayer, SavedTensor, check_tensors, read_resolved
from .base_model_config import recorded_fields
from .external import output_features
from .targets import match_layers, nothing_found, own_modules, refuse_shared, wrappable
from .weight_storage import feature_sizes, is_norm, own_sizes


@dataclass(frozen=True)
class Target:
    """One layer to wrap."""

    name: str
    role: str | None
    block: int | None
    stage: int | None
    index: int | None  # among the block's layers of that role
    parameters: Mapping[str, tuple[int, ...]]  # those that may be selected from, with their shapes
    width: int  # of its external adapter, 0 for none


@dataclass(frozen=True)
class Plan:
    """Everything the tuner needs to know to inject one adapter.

    Attributes:
        backbone: The backbone, None if unknown.
        record: What the adapter's files will say of it, by the names of this model.
        targets: Layers to wrap by path, in the order that positions count their parameters.
        loaded: Whether the record is that of a saved adapter.
        renamed: By path in its file the path of a layer here, where that is another.
        earlier: Layers that an earlier adapter changes.
    """

    backbone: Backbone | None
    record: Resolved
    targets: Mapping[str, Target]
    loaded: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    earlier: frozenset[str] = frozenset()


def make_plan(model: nn.Module, config: SFAConfig, reused: Resolved | None = None) -> Plan:
    """Find the layers to adapt and solve the budget (or take both from a saved adapter).

    Args:
        model: The model, with or without other adapters.
        config: What to adapt; where it is of a saved adapter, its `resolved` decides.
        reused: Record of the selection that a new adapter trains, by the names of this model;
            None where it makes its own.

    Raises:
        TargetError: If nothing is found, or a named layer cannot be wrapped.
        BudgetError: If the budget cannot be met.
        AdapterFileError: If a saved adapter does not fit the model.
    """
    modules = own_modules(model)
    backbone = find_backbone(model)
    roles = {r.name: r for r in role_modules(backbone)} if backbone else {}
    if config.resolved is not None:
        return _loaded_plan(model, config, modules, backbone, roles)
    matches = match_layers(modules, config, backbone, roles)
    outputs, whole = matches.outputs, matches.whole
    parameters: Mapping[str, Sequence[str]] = matches.parameters
    if reused is not None:
        parameters, whole = reused.parameters, whole & outputs
    if not parameters and not outputs:
        raise TargetError(nothing_found(model, config))
    if config.rho == 1:  # no weight is selected, so it may be quantised, shared or computed
        parameters, whole = {}, whole & outputs
    layers = {
        n: wrappable(n, m, parameters.get(n, ()), whole=n in whole)
        for n, m in modules.items()
        if n in parameters or n in outputs
    }
    eligible = {f"{n}.{p}": getattr(layers[n], p) for n, own in parameters.items() for p in own}
    refuse_shared(model, eligible, views=True)
    refuse_shared(model, _own_weights(layers, outputs), views=False)
    budget = solve_budget(
        budget=config.budget,
        rho=config.rho,
        adapter_dim=config.adapter_dim,
        total=_count_parameters(model, backbone, config),
        external=External(
            {n: output_features(layer) for n, layer in layers.items() if n in outputs},
            config.external_bias,
            config.external_type,
        ),
        eligible=sum(parameter.numel() for parameter in eligible.values()),
    )
    if reused is not None:
        budget = with_selection(budget, reused.internal, config.budget)
    elif not outputs and config.rho is None:
        _warn_of_no_outputs()
    _warn_of_unspent_budget(budget, config)
    targets = {}
    for name, layer in layers.items():
        own = parameters.get(name, ()) if budget.internal else ()
        if own or name in budget.widths:
            targets[name] = _target(name, layer, roles, own, budget.widths.get(name, 0))
    return Plan(backbone, _record(budget, targets, backbone), targets)


def _record(
    budget: BudgetPlan, targets: Mapping[str, Target], backbone: Backbone | None
) -> Resolved:
    sizes = {f"{t.name}.{p}": s for t in targets.values() for p, s in t.parameters.items()}
    return Resolved(
        total=budget.total,
        allowed=budget.allowed,
        adapter_dim=budget.adapter_dim,
        internal=budget.internal,
        layers=_layers(targets),
        tensors=tuple(SavedTensor(name, shape) for name, shape in sizes.items()),
        backbone=backbone.model_type if backbone else None,
        base_config=recorded_fields(backbone),
    )


def _layers(targets: Mapping[str, Target]) -> dict[str, SavedLayer]:
    return {n: SavedLayer(t.width, t.role, t.block, t.index) for n, t in targets.items()}


def _target(
    name: str, layer: Any, roles: Mapping[str, RoleModule], parameters: Sequence[str], width: int
) -> Target:
    known = roles.get(name)
    return Target(
        name=name,
        role=known.role if known else None,
        block=known.block if known else None,
        stage=known.stage if known else None,
        index=_indices(roles)[name] if known else None,
        parameters={p: tuple(getattr(layer, p).shape) for p in parameters},
        width=width,
    )


def _indices(roles: Mapping[str, RoleModule]) -> dict[str, int]:
    """Return the ordinal of each layer among the layers of its role in its block."""
    counts: Counter[tuple[str, int]] = Counter()
    indices = {}
    for name, role in roles.items():
        indices[name] = counts[role.role, role.block]
        counts[role.role, role.block] += 1
    return indices


def _warn_of_no_outputs() -> None:
    warn(
        "None of the targeted layers ends an attention or MLP sub-layer, so the whole budget goes "
        "to selected weights. Say rho=0 if that is meant, or name layers in external_modules.",
        BudgetWarning,
    )


def _warn_of_unspent_budget(budget: BudgetPlan, config: SFAConfig) -> None:
    trained = budget.external + budget.internal
    if config.rho == 1 or budget.internal < budget.eligible or trained >= 0.99 * budget.allowed:
        return
    warn(
        f"Only {trained:,} of the {budget.allowed:,} parameters that budget={config.budget} allows "
        "are used: every eligible weight is selected already. Adapt more layers, or lower the "
        "budget.",
        BudgetWarning,
    )


def _count_parameters(model: nn.Module, backbone: Backbone | None, config: SFAConfig) -> int:
    """Return |theta(T)|: the backbone, or the model without modules_to_save where there is none."""
    root = backbone.module if backbone else model
    saved = [] if backbone else list(config.modules_to_save or [])
    heads = [f"{h.removeprefix(f'{backbone.name}.')}." for h in backbone.heads] if backbone else []
    tuned = [n + "." for n, m in root.named_modules() if isinstance(m, BaseTunerLayer)]
    wrapped = [n + "." for n, m in root.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    sizes: dict[int, int] = {}  # each once, since some are shared
    for path, module in root.named_modules():
        name = f"{path}."
        if any(name.startswith(t) and not name.startswith(t + "base_layer.") for t in tuned):
            continue
        if any(name.startswith(w) and not name.startswith(w + "original_module.") for w in wrapped):
            continue
        if name.startswith(tuple(heads)) or any(f".{s}." in f".{name}" for s in saved):
            continue
        sizes |= {id(holder): size for holder, size in own_sizes(module)}
    return sum(sizes.values())


def _own_weights(layers: Mapping[str, nn.Module], outputs: Collection[str]) -> dict[str, Tensor]:
    """Return the weights of layers with an external adapter, where they are parameters."""
    found = {f"{n}.weight": layers[n]._parameters.get("weight") for n in outputs}
    return {name: weight for name, weight in found.items() if weight is not None}


def _loaded_plan(
    model: nn.Module,
    config: SFAConfig,
    modules: Mapping[str, nn.Module],
    backbone: Backbone | None,
    roles: Mapping[str, RoleModule],
) -> Plan:
    saved = read_resolved(config.resolved)
    renamed = _find_layers(saved, modules, roles)
    names = [_here(t.name, renamed) for t in saved.tensors]
    shapes = {
        f"{n}.{p}": tuple(tensor.shape)
        for n, m in modules.items()
        for p, tensor in m._parameters.items()
        if tensor is not None
    }
    check_tensors([(n, t.shape) for n, t in zip(names, saved.tensors, strict=True)], shapes)
    refuse_shared(model, {n: _parameter(modules, n) for n in names}, views=True)
    widths = {renamed[n]: width for n, width in saved.widths.items()}
    check_tensors([(f"{n}.weight", ()) for n in widths if n not in modules], shapes)
    for name, width in widths.items():
        sizes = feature_sizes(modules[name])
        if sizes is not None and width > sizes[1]:
            raise AdapterFileError(
                f"adapter_config.json: an external adapter of width {width} on `{name}`, which has "
                f"{sizes[1]} features; damaged. Save the adapter again."
            )
    parameters: dict[str, list[str]] = {renamed[n]: [] for n in saved.layers}
    for name in names:
        layer, _, parameter = name.rpartition(".")
        parameters[layer].append(parameter)
    # Positions count the tensors in the file's order, which is kept also if the model's differs.
    targets = {
        n: _target(
            n,
            wrappable(n, modules[n], own, whole=n in widths and not is_norm(modules[n])),
            roles,
            own,
            widths.get(n, 0),
        )
        for n, own in parameters.items()
        if own or n in widths
    }
    listed = {n: replace(t, name=n) for n, t in zip(names, saved.tensors, strict=True)}
    record = replace(
        saved,
        layers=_layers(targets),
        tensors=tuple(listed[f"{t.name}.{p}"] for t in targets.values() for p in t.parameters),
        backbone=saved.backbone or (backbone.model_type if backbone else None),
    )
    moved = {a: b for a, b in renamed.items() if a != b}
    return Plan(backbone, record, targets, loaded=True, renamed=moved)


def _parameter(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    layer, _, parameter = name.rpartition(".")
    return getattr(modules[layer], parameter)


def _here(tensor: str, renamed: Mapping[str, str]) -> str:
    layer, _, parameter = tensor.rpartition(".")
    return f"{renamed.get(layer, layer)}.{parameter}"


def _find_layers(
    saved: Resolved, modules: Mapping[str, nn.Module], roles: Mapping[str, RoleModule]
) -> dict[str, str]:
    """Return for each layer of a file its path in this model.

    Where the model lacks one of the paths, modules were renamed, and roles find the layers. All of
    them: a release that renames the attention may keep the names of the MLP.
    """
    if all(name in modules for name in saved.layers):
        return {name: name for name in saved.layers}
    indices = _indices(roles)
    by_role: dict[Any, str] = {(r.role, r.block, indices[n]): n for n, r in roles.items()}
    found = {n: by_role.get((a.role, a.block, a.index), n) for n, a in saved.layers.items()}
    moved = any(name in modules and path != name for name, path in found.items())
    if moved or len(set(found.values())) < len(found):
        return {name: name for name in saved.layers}  # other blocks: not renamed, another model
    return found
