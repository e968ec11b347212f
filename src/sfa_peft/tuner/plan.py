# SPDX-License-Identifier: Apache-2.0
"""From a model and a config to what goes where: layers, roles, widths and number of weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..backbones import Backbone, RoleModule, describe_model, find_backbone, role_modules
from ..budget import BudgetPlan, adapter_parameters, solve_budget
from ..checkpoint.file import FORMAT_VERSION, check_layers, check_resolved
from ..config import SFAConfig
from ..errors import SFAWarning, TargetError
from .external import output_features
from .targets import match_layers, own_modules, refuse_shared, wrappable


@dataclass(frozen=True)
class Target:
    """One layer to wrap."""

    name: str
    shape: tuple[int, ...]
    role: str | None
    block: int | None
    stage: int | None
    eligible: bool  # whether its weights may be selected
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
        layers = [[t.name, list(t.shape)] for t in self.targets.values() if t.eligible]
        return {
            "format": FORMAT_VERSION,
            "backbone": self.backbone.model_type if self.backbone else None,
            "total": self.budget.total,
            "allowed": self.budget.allowed,
            "adapter_dim": self.budget.adapter_dim,
            "internal": self.budget.internal,
            "external": dict(self.budget.widths),
            "layers": layers,
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
    eligible, outputs = match_layers(modules, config, backbone, roles)
    if not eligible and not outputs:
        raise TargetError(_nothing_found(model, config))
    layers = {n: wrappable(n, m) for n, m in modules.items() if n in eligible | outputs}
    refuse_shared(model, layers)
    budget = solve_budget(
        budget=config.budget,
        rho=config.rho,
        adapter_dim=config.adapter_dim,
        bias=config.external_bias,
        total=_count_parameters(model, backbone, config),
        outputs={n: output_features(layer) for n, layer in layers.items() if n in outputs},
        eligible=sum(layer.weight.numel() for n, layer in layers.items() if n in eligible),
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
    names = {n for n in layers if n in eligible and budget.internal} | set(budget.widths)
    targets = {
        n: _target(n, layer, roles, n in eligible and budget.internal > 0, budget.widths.get(n, 0))
        for n, layer in layers.items()
        if n in names
    }
    return Plan(backbone, budget, targets, loaded=False)


def _target(
    name: str, layer: Any, roles: Mapping[str, RoleModule], eligible: bool, width: int
) -> Target:
    known = roles.get(name)
    return Target(
        name=name,
        shape=tuple(layer.weight.shape),
        role=known.role if known else None,
        block=known.block if known else None,
        stage=known.stage if known else None,
        eligible=eligible,
        width=width,
    )


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
    layers = dict(resolved["layers"])
    widths = dict(resolved["external"])
    shapes = {
        n: tuple(m.weight.shape)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        for n, m in modules.items()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    check_layers(resolved["layers"], shapes)
    check_layers([(n, shapes.get(n, ())) for n in widths], shapes)
    targets = {
        n: _target(n, wrappable(n, modules[n]), roles, n in layers, widths.get(n, 0))
        for n in modules
        if n in layers or n in widths
    }
    eligible = sum(modules[n].weight.numel() for n in layers)  # pyright: ignore
    # Positions count the layers in the file's order, which is kept also if the model's differs.
    ordered = {n: targets[n] for n in layers} | {
        n: t for n, t in targets.items() if n not in layers
    }
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
    return Plan(backbone, budget, ordered, loaded=True)


def _nothing_found(model: nn.Module, config: SFAConfig) -> str:
    if config.target_modules is None:
        looked = "the attention and MLP linear layers of a known vision backbone"
        advice = "Name layers in target_modules, or check exclude_modules and layers_to_transform."
        start = "Please specify `target_modules` in `peft_config`: "
    else:
        looked = f"layers that match target_modules={config.target_modules!r}"
        advice = "Check the names (a suffix such as 'query', or one regular expression)."
        start = ""
    return (
        f"{start}no layer to adapt found. Looked for {looked}. {advice} The model has: "
        f"{describe_model(model)}"
    )
