# SPDX-License-Identifier: Apache-2.0
"""From a model and a config to what goes where: layers, roles, widths and number of weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..backbones import Backbone, RoleModule, describe_model, find_backbone, role_modules
from ..budget import BudgetPlan, adapter_parameters, solve_budget
from ..checkpoint.file import FORMAT_VERSION, check_resolved, check_tensors, saved_tensors
from ..config import SFAConfig
from ..errors import SFAWarning, TargetError
from .external import output_features
from .targets import match_layers, own_modules, refuse_shared, wrappable


@dataclass(frozen=True)
class Target:
    """One layer to wrap."""

    name: str
    role: str | None
    block: int | None
    stage: int | None
    parameters: Mapping[str, tuple[int, ...]]  # those that may be selected from, with their shapes
    width: int  # of its external adapter, 0 for none


@dataclass(frozen=True)
class Plan:
    """Everything the tuner needs to know to inject one adapter."""

    backbone: Backbone | None
    budget: BudgetPlan
    targets: Mapping[str, Target]
    loaded: bool  # whether sizes come from a saved adapter

    def to_resolved(self) -> dict[str, Any]:
        """Return what a file must record so that the same adapter can be built again."""
        tensors = [[n, list(s)] for t in self.targets.values() for n, s in _full_names(t)]
        return {
            "format": FORMAT_VERSION,
            "backbone": self.backbone.model_type if self.backbone else None,
            "total": self.budget.total,
            "allowed": self.budget.allowed,
            "adapter_dim": self.budget.adapter_dim,
            "internal": self.budget.internal,
            "external": dict(self.budget.widths),
            "tensors": tensors,
        }


def make_plan(model: nn.Module, config: SFAConfig) -> Plan:
    """Find the layers to adapt and solve the budget (or take both from a saved adapter).

    Raises:
        TargetError: If nothing is found, or a named layer cannot be wrapped.
        BudgetError: If the budget cannot be met.
        AdapterFileError: If a saved adapter does not fit the model.
    """
    modules = own_modules(model)
    backbone = find_backbone(model)
    roles = {r.name: r for r in role_modules(backbone)} if backbone else {}
    if config.resolved is not None:
        return _loaded_plan(config, config.resolved, modules, backbone, roles)
    matches = match_layers(modules, config, backbone, roles)
    outputs = matches.outputs
    if not matches.parameters and not outputs:
        raise TargetError(_nothing_found(model, config))
    layers = {
        n: wrappable(n, m, matches.parameters.get(n, ()), whole=n in matches.whole)
        for n, m in modules.items()
        if n in matches.parameters or n in outputs
    }
    eligible = {
        f"{n}.{p}": getattr(layers[n], p) for n, own in matches.parameters.items() for p in own
    }
    refuse_shared(model, eligible | {f"{n}.weight": layers[n].weight for n in outputs})
    budget = solve_budget(
        budget=config.budget,
        rho=config.rho,
        adapter_dim=config.adapter_dim,
        bias=config.external_bias,
        total=_count_parameters(model, backbone, config),
        outputs={n: output_features(layer) for n, layer in layers.items() if n in outputs},
        eligible=sum(parameter.numel() for parameter in eligible.values()),
    )
    if not outputs and config.rho is None:
        warnings.warn(
            "None of the targeted layers ends an attention or MLP sub-layer, so the whole budget "
            "goes to selected weights. Say rho=0 if that is meant, or name layers in "
            "external_modules.",
            SFAWarning,
            stacklevel=2,
        )
    _warn_of_unspent_budget(budget, config)
    targets = {}
    for name, layer in layers.items():
        own = matches.parameters.get(name, ()) if budget.internal else ()
        if own or name in budget.widths:
            targets[name] = _target(name, layer, roles, own, budget.widths.get(name, 0))
    return Plan(backbone, budget, targets, loaded=False)


def _target(
    name: str, layer: Any, roles: Mapping[str, RoleModule], parameters: Sequence[str], width: int
) -> Target:
    known = roles.get(name)
    return Target(
        name=name,
        role=known.role if known else None,
        block=known.block if known else None,
        stage=known.stage if known else None,
        parameters={p: tuple(getattr(layer, p).shape) for p in parameters},
        width=width,
    )


def _full_names(target: Target) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{target.name}.{p}", shape) for p, shape in target.parameters.items()]


def _warn_of_unspent_budget(budget: BudgetPlan, config: SFAConfig) -> None:
    trained = budget.external + budget.internal
    if config.rho == 1 or budget.internal < budget.eligible or trained >= 0.99 * budget.allowed:
        return
    warnings.warn(
        f"Only {trained:,} of the {budget.allowed:,} parameters that budget={config.budget} allows "
        "are used: every eligible weight is selected already. Adapt more layers, or lower the "
        "budget.",
        SFAWarning,
        stacklevel=2,
    )


def _count_parameters(model: nn.Module, backbone: Backbone | None, config: SFAConfig) -> int:
    """Return |theta(T)|: the backbone, or the model without modules_to_save where there is none."""
    root = backbone.module if backbone else model
    saved = [] if backbone else list(config.modules_to_save or [])
    tuned = [n + "." for n, m in root.named_modules() if isinstance(m, BaseTunerLayer)]
    wrapped = [n + "." for n, m in root.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    total = 0
    for name, parameter in root.named_parameters():
        if any(name.startswith(t) and not name.startswith(t + "base_layer.") for t in tuned):
            continue
        if any(name.startswith(w) and not name.startswith(w + "original_module.") for w in wrapped):
            continue
        if any(f".{s}." in f".{name}" for s in saved):
            continue
        total += parameter.numel()
    return total


def _loaded_plan(
    config: SFAConfig,
    resolved: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    backbone: Backbone | None,
    roles: Mapping[str, RoleModule],
) -> Plan:
    check_resolved(resolved)
    saved = saved_tensors(resolved)
    widths = dict(resolved["external"])
    shapes = {
        f"{n}.{p}": tuple(tensor.shape)
        for n, m in modules.items()
        for p, tensor in m._parameters.items()
        if tensor is not None
    }
    check_tensors(saved, shapes)
    weights = [(f"{n}.weight", shapes.get(f"{n}.weight", ())) for n in widths]
    check_tensors(weights, shapes)
    parameters: dict[str, list[str]] = {n: [] for n in widths}
    # Positions count the tensors in the file's order, which is kept also if the model's differs.
    order = dict.fromkeys(name.rpartition(".")[0] for name, _ in saved)
    for name, _ in saved:
        layer, _, parameter = name.rpartition(".")
        parameters.setdefault(layer, []).append(parameter)
    targets = {
        n: _target(
            n,
            wrappable(n, modules[n], parameters[n], whole=n in widths),
            roles,
            parameters[n],
            widths.get(n, 0),
        )
        for n in [*order, *(n for n in modules if n in widths and n not in order)]
    }
    eligible = sum(math.prod(shape) for _, shape in saved)
    budget = BudgetPlan(
        total=resolved["total"],
        allowed=resolved["allowed"],
        adapter_dim=resolved["adapter_dim"],
        widths=widths,
        external=sum(
            adapter_parameters(output_features(modules[n]), width, config.external_bias)
            for n, width in widths.items()
        ),
        internal=resolved["internal"],
        eligible=eligible,
    )
    return Plan(backbone, budget, targets, loaded=True)


def _nothing_found(model: nn.Module, config: SFAConfig) -> str:
    if config.target_modules is None:
        looked = "the attention and MLP linear layers of a known vision backbone"
        advice = "Name layers in target_modules, or check exclude_modules and layers_to_transform."
        start = "Please specify `target_modules` in `peft_config`: "
    else:
        looked = f"layers that match target_modules={config.target_modules!r}"
        if config.target_parameters:
            looked += f" or target_parameters={config.target_parameters!r}"
        advice = "Check the names (a suffix such as 'query', or one regular expression)."
        start = ""
    return (
        f"{start}no layer to adapt found. Looked for {looked}. {advice} The model has: "
        f"{describe_model(model)}"
    )
