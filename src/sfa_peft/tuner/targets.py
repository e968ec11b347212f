# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model an adapter may wrap: matching by role or name, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..backbones import (
    Backbone,
    RoleModule,
    describe_model,
    find_backbone,
    head_modules,
    role_modules,
)
from ..blocks import Row, find_rows, role_of
from ..config import SFAConfig
from ..errors import TargetError
from .weight_storage import feature_sizes, holds_codes, is_norm, is_packed

#: Roles whose layer is the last of a sub-layer and gets the external adapter.
OUTPUT_ROLES = ("attn_out", "mlp_out")

#: Number of layers that an error lists.
_LISTED = 8


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


@dataclass(frozen=True)
class Matches:
    """What a config names in a model.

    Attributes:
        parameters: By layer, in model order, the names of its parameters that may be selected from.
        whole: Layers that are matched as layers, not by names of parameters, but for norms.
        outputs: Layers that get an external adapter.
    """

    parameters: dict[str, tuple[str, ...]]
    whole: set[str]
    outputs: set[str]


def match_layers(
    modules: Mapping[str, nn.Module],
    config: SFAConfig,
    backbone: Backbone | None,
    roles: Mapping[str, RoleModule],
) -> Matches:
    """Return what `target_modules`, `target_parameters` and `external_modules` name."""
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
    parameters = {}
    for name, module in modules.items():
        present = [p for p, tensor in module._parameters.items() if tensor is not None]
        own = [p for p in present if _names_parameter(config, name, p)]
        if name in eligible and "weight" not in own:
            own.insert(0, "weight")
        if own:
            parameters[name] = tuple(own)
    _refuse_unmatched(config, parameters)
    whole = eligible | {name for name in outputs if not is_norm(modules[name])}
    return Matches(parameters, whole, outputs)


def _names_parameter(config: SFAConfig, module: str, parameter: str) -> bool:
    """Whether `target_parameters` names a parameter (and nothing excludes its module)."""
    full = f"{module}.{parameter}"
    named = any(is_name(full) for is_name in _parameter_rules(config).values())
    return named and _matches(config, {module.rpartition(".")[2]}, module)


def _parameter_rules(config: SFAConfig) -> dict[str, Callable[[str], object]]:
    """Return what tells whether a full name is meant, for each of `target_parameters`."""
    targets = config.target_parameters or ()
    if isinstance(targets, str):
        return {targets: re.compile(targets).fullmatch}
    return {t: partial(_ends_with, t) for t in sorted(targets)}


def _ends_with(end: str, full: str) -> bool:
    return f".{full}".endswith(f".{end}")


def _refuse_unmatched(config: SFAConfig, parameters: Mapping[str, Sequence[str]]) -> None:
    """Refuse `target_parameters` of which a name (or the regular expression) finds nothing."""
    found = [f"{n}.{p}" for n, own in parameters.items() for p in own]
    rules = _parameter_rules(config)
    missing = [target for target, is_name in rules.items() if not any(map(is_name, found))]
    if missing:
        raise TargetError(
            f"target_parameters: no parameter of a layer in the model matches {missing}. Give the "
            "end of its name ('norm.weight', 'bias') or one regular expression for whole names, "
            "and check exclude_modules, modules_to_save and layers_to_transform, which leave "
            "layers out."
        )


def nothing_found(model: nn.Module, config: SFAConfig) -> str:
    """Say that a config names no layer of a model, and what would."""
    looked = "the attention and MLP linear layers of a known vision backbone"
    start = "Please specify `target_modules` in `peft_config`: "
    if config.target_modules is not None:
        looked = f"layers that match target_modules={config.target_modules!r}"
        if config.target_parameters:
            looked += f" or target_parameters={config.target_parameters!r}"
        start = ""
    advice = _taken(model, config)
    if advice:
        start = ""
    elif config.target_modules is None:
        advice = _advice(model, config)
    else:
        advice = "Check the names (a suffix such as 'query', or one regular expression)."
    return (
        f"{start}no layer to adapt found. Looked for {looked}. {advice} The model has: "
        f"{describe_model(model)}"
    )


def _finds(model: nn.Module, config: SFAConfig, **changes: Any) -> list[str]:
    """Return the layers that a config would adapt with other values of some fields."""
    other = copy.copy(config)
    for name, value in changes.items():
        setattr(other, name, value)
    modules, backbone = own_modules(model), find_backbone(model)
    roles = {r.name: r for r in role_modules(backbone)} if backbone else {}
    try:
        found = match_layers(modules, other, backbone, roles)
        layers = dict.fromkeys([*found.parameters, *found.outputs])
        for name in layers:
            own = found.parameters.get(name, ())
            wrappable(name, modules[name], own, whole=name in found.whole)
    except TargetError:
        return []
    return list(layers)


def _taken(model: nn.Module, config: SFAConfig) -> str:
    """Say which field leaves out every layer that there is, and what works; "" for none."""
    saved = config.modules_to_save
    found = _finds(model, config, modules_to_save=None) if saved else []
    if saved and found:
        blamed = [name for name in saved if not _finds(model, config, modules_to_save=[name])]
        blamed = blamed or list(saved)
        heads, others = _known_heads(model), [name for name in saved if name not in blamed]
        works = (h for h in (heads, others) if h and _finds(model, config, modules_to_save=h))
        return (
            f"Every one of them (`{found[0]}`, ...) lies in a module that modules_to_save names "
            f"({', '.join(f'`{name}`' for name in blamed)}: PEFT compares parts of paths) and is "
            f"trained whole. They are left with modules_to_save={next(works, None)}."
        )
    for field in ("exclude_modules", "layers_to_transform"):
        empty = dict.fromkeys([field, "layers_pattern"])
        found = _finds(model, config, **empty) if getattr(config, field) is not None else []
        if found:
            value = getattr(config, field)
            return f"{field}={value!r} leaves out every one of them (`{found[0]}`, ...). Change it."
    return ""


def _known_heads(model: nn.Module) -> list[str]:
    try:
        return head_modules(model)
    except TargetError:
        return []


def _advice(model: nn.Module, config: SFAConfig) -> str:
    """Say which `target_modules` fit a model without a known backbone."""
    rows = find_rows(model)
    tried = [row for row in rows if _finds(model, config, target_modules=row.expression)]
    if tried:
        choices = "; or ".join(
            f'`{row.name}` ({len(row.blocks)}): target_modules=r"{row.expression}"' for row in tried
        )
        return f"Its blocks have layers of that kind, but {doubt(rows)}. Say which: {choices}."
    # Not the subclass inside MultiheadAttention, which cannot be adapted.
    linears = [n for n, m in own_modules(model).items() if type(m) is nn.Linear]
    more = ", ..." if len(linears) > _LISTED else "."
    listed = f" Its linear layers: {', '.join(linears[:_LISTED])}{more}" if linears else ""
    return (
        "Name the layers whose weights may be selected in target_modules, and those that end an "
        f"attention or MLP sub-layer in external_modules as well.{listed}"
    )


def doubt(rows: Sequence[Row]) -> str:
    """Say why rows of blocks are not taken for a vision backbone without being named."""
    if all(row.root is None for row in rows):
        return "no convolution of an image comes before them"
    partial = [row for row in rows if not row.whole]
    if partial:
        found = ", ".join(partial[0].layers)
        return f"some of `{partial[0].name}` lack a linear layer of a known name (found: {found})"
    return "which of them read the image is not clear"


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


def wrappable(name: str, layer: nn.Module, parameters: Sequence[str], *, whole: bool) -> Any:
    """Return the layer if it can be adapted.

    Args:
        name: Its path.
        layer: The layer.
        parameters: Names of its parameters whose entries may be selected.
        whole: Whether it is adapted as a layer (weight, external adapter), which needs a linear
            layer or a convolution, and not only by names of parameters.

    Raises:
        TargetError: Naming the layer and what is in the way.
    """
    for parameter in parameters:
        if isinstance(getattr(layer, parameter, None), Tensor):
            _check_parameter(name, layer, parameter)
    kind = type(layer).__name__
    if kind == "NonDynamicallyQuantizableLinear":
        raise TargetError(
            f"`{name}` belongs to a torch.nn.MultiheadAttention, which reads its weight without "
            "calling it, so it cannot be adapted. Leave it out of target_modules; linear layers "
            "outside the attention can be named."
        )
    if whole and parameters and holds_codes(layer):
        raise _packed(name, layer, "weight")
    if whole and feature_sizes(layer) is None:
        raise TargetError(
            f"`{name}` is a {kind}; only torch.nn.Linear and torch.nn.Conv2d layers can be "
            "adapted. Leave it out of target_modules (or name the linear layers inside it; single "
            "parameters of other layers go into target_parameters)."
        )
    if next(layer.children(), None) is not None:
        raise TargetError(
            f"`{name}` ({kind}) holds other layers, so its own parameters {list(parameters)} "
            "cannot be changed by wrapping it. Leave them out of target_parameters."
        )
    return layer


def _check_parameter(name: str, layer: nn.Module, parameter: str) -> None:
    tensor = cast(Tensor, getattr(layer, parameter))
    if parameter not in layer._parameters:
        raise TargetError(
            f"`{name}` computes its {parameter} (weight_norm or another parametrization), so "
            "entries of it cannot be changed. Remove the parametrization first, or leave the layer "
            "out."
        )
    if is_packed(tensor):
        raise _packed(name, layer, parameter)
    if not tensor.is_contiguous():
        raise TargetError(
            f"`{name}`: its {parameter} is not contiguous, so positions in it are not defined. "
            "Call model.to(memory_format=torch.contiguous_format) first."
        )


def _packed(name: str, layer: nn.Module, parameter: str) -> TargetError:
    """Return the error for a selection among quantised weights."""
    return TargetError(
        f"`{name}` ({type(layer).__name__}) holds a packed (quantised) {parameter}; single weights "
        "inside it cannot be changed. Use external adapters only (rho=1), which work on quantised "
        "layers; or load the model unquantised; or leave the layer out."
    )


def refuse_shared(model: nn.Module, parameters: Mapping[str, Tensor], *, views: bool) -> None:
    """Refuse parameters that the model uses a second time, under another name.

    Args:
        model: The model.
        parameters: Those that must be used once, by name.
        views: Whether other tensors in the same memory count, too.

    Raises:
        TargetError: With both names.
    """
    wanted = {id(parameter): name for name, parameter in parameters.items()}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    places = [(*(_memory(t) if views else _of_its_own(t)), id(t), name) for name, t in tensors]
    before = ("", 0, 0, 0, "")  # of those in the same space the one that reaches furthest
    for place in sorted(places, key=lambda place: place[:2]):
        space, start, end, tensor, name = place
        if space == before[0] and start < before[2]:
            parameter = wanted.get(tensor) or wanted.get(before[3])
            if parameter is not None:
                where, _, own = parameter.rpartition(".")
                raise TargetError(
                    f"`{where}`: its {own} is shared by `{before[4]}` and `{name}`. A change would "
                    "reach both, so it cannot be adapted. Untie the weights, or leave the layer "
                    "out."
                )
        if space != before[0] or end > before[2]:
            before = place


def _memory(tensor: Tensor) -> tuple[str, int, int]:
    """Return where a tensor lies: a space, and in it the first byte and the one after the last."""
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # it stands for another one
        start = 0
    if not start:  # as on the meta device
        return _of_its_own(tensor)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return str(tensor.device), start, start + (last + 1) * tensor.itemsize


def _of_its_own(tensor: Tensor) -> tuple[str, int, int]:
    return f"tensor {id(tensor)}", 0, 1
