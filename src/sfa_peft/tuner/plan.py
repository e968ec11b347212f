# SPDX-License-Identifier: Apache-2.0
"""From a model and a config to what goes where: layers, roles, widths and number of weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..backbones import Backbone, RoleModule, describe_model, find_backbone, role_modules, role_of
from ..budget import BudgetPlan, solve_budget
from ..checkpoint.file import FORMAT_VERSION, check_layers, check_resolved
from ..config import SFAConfig
from ..errors import SFAWarning, TargetError
from .external import output_features

#: Roles whose layer is the last of a sub-layer and gets the external adapter.
OUTPUT_ROLES = ("attn_out", "mlp_out")


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
    modules = _own_modules(model)
    backbone = find_backbone(model)
    roles = {r.name: r for r in role_modules(backbone)} if backbone else {}
    if config.resolved is not None:
        return _loaded_plan(config.resolved, modules, backbone, roles)
    eligible, outputs = _match(modules, config, backbone, roles)
    if not eligible and not outputs:
        raise TargetError(_nothing_found(model, config))
    layers = {n: _wrappable(n, m) for n, m in modules.items() if n in eligible | outputs}
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
    names = {n for n in layers if n in eligible and budget.internal} | set(budget.widths)
    targets = {
        n: _target(n, layer, roles, n in eligible and budget.internal > 0, budget.widths.get(n, 0))
        for n, layer in layers.items()
        if n in names
    }
    return Plan(backbone, budget, targets, loaded=False)


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules without what tuners and modules_to_save hide inside them."""
    found: dict[str, nn.Module] = {}
    hidden: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in hidden):
            continue
        if isinstance(module, BaseTunerLayer):
            hidden.append(name + ".")
            found[name] = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            hidden.append(name + ".")
        else:
            found[name] = module
    return found


def _match(
    modules: Mapping[str, nn.Module],
    config: SFAConfig,
    backbone: Backbone | None,
    roles: Mapping[str, RoleModule],
) -> tuple[set[str], set[str]]:
    """Return the names of layers whose weights may be selected, and of those with an adapter."""
    if config.target_modules is not None:
        eligible = {n for n in modules if _matches(config, config.target_modules, n)}
    else:
        # The last part as the target makes PEFT look at excluded names and layer indices only.
        eligible = {n for n in roles if _matches(config, {n.rpartition(".")[2]}, n)}
    if config.external_modules is not None:
        outputs = {n for n in modules if _matches(config, config.external_modules, n)}
    else:
        outputs = {n for n in eligible if _role_name(n, backbone, roles) in OUTPUT_ROLES}
    if config.rho == 0:
        outputs = set()
    return eligible, outputs


def _peft_match(config: SFAConfig, targets: Any, name: str) -> Any:
    """Return PEFT's own verdict: truthy or falsy, or an object that says "excluded"."""
    rules = SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return check_target_module_exists(rules, name)


def _matches(config: SFAConfig, targets: Any, name: str) -> bool:
    found = _peft_match(config, targets, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def is_excluded(config: SFAConfig, name: str) -> Any:
    """Return PEFT's mark of a layer that `exclude_modules` or `modules_to_save` leaves out."""
    found = _peft_match(config, {name}, name)
    return found if isinstance(found, _ExcludedModule) else None


def _role_name(name: str, backbone: Backbone | None, roles: Mapping[str, RoleModule]) -> str | None:
    if name in roles:
        return roles[name].role
    return role_of(name) if backbone is None else None


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


def _wrappable(name: str, layer: nn.Module) -> Any:
    kind = type(layer)
    weight = getattr(layer, "weight", None)
    plain = (
        isinstance(layer, (nn.Linear, nn.Conv2d))
        and kind.__name__ != "NonDynamicallyQuantizableLinear"
    )
    if not plain or not isinstance(weight, torch.Tensor):
        raise TargetError(
            f"`{name}` is a {kind.__name__}; only torch.nn.Linear and torch.nn.Conv2d layers can "
            "be adapted. Leave it out of target_modules (or name the linear layers inside it)."
        )
    if not weight.is_floating_point():
        raise TargetError(
            f"`{name}` holds packed {weight.dtype} weights; single weights inside them cannot be "
            "changed. Load the model unquantised, or leave the layer out."
        )
    if not weight.is_contiguous():
        raise TargetError(
            f"`{name}`: its weight is not contiguous, so positions in it are not defined. Call "
            "model.to(memory_format=torch.contiguous_format) first."
        )
    return layer


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
        n: _target(n, _wrappable(n, modules[n]), roles, n in layers, widths.get(n, 0))
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
        external=0,
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
