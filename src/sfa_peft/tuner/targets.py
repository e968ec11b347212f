# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model an adapter may wrap: matching by role or name, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
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

from ..backbones import Backbone, RoleModule, role_of
from ..config import SFAConfig
from ..errors import TargetError

#: Roles whose layer is the last of a sub-layer and gets the external adapter.
OUTPUT_ROLES = ("attn_out", "mlp_out")


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
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


def match_layers(
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


def wrappable(name: str, layer: nn.Module) -> Any:
    """Return the layer if its weight can be adapted.

    Raises:
        TargetError: Naming the layer and what is in the way.
    """
    kind = type(layer)
    weight = getattr(layer, "weight", None)
    plain = (
        isinstance(layer, (nn.Linear, nn.Conv2d))
        and kind.__name__ != "NonDynamicallyQuantizableLinear"
    )
    if plain and "weight" not in layer._parameters:
        raise TargetError(
            f"`{name}` computes its weight (weight_norm or another parametrization), so entries of "
            "it cannot be changed. Remove the parametrization first, or leave the layer out."
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


def refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that are known by a second name, or whose weight another module uses too."""
    wanted = {id(layer.weight): name for name, layer in layers.items()}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in wanted:
            continue
        if id(parameter) in seen:
            raise TargetError(
                f"`{wanted[id(parameter)]}`: its weight is shared by `{seen[id(parameter)]}` and "
                f"`{name}`. A change would reach both, so it cannot be adapted. Untie the weights, "
                "or leave the layer out."
            )
        seen[id(parameter)] = name
