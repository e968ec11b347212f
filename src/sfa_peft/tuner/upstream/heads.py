# SPDX-License-Identifier: Apache-2.0
"""Modules that are trained and saved whole: what PEFT's comparison by the end of names reaches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...backbones import find_backbone, head_modules, role_modules
from ...config import AUTO, SFAConfig
from ...errors import SFAWarning, TargetError

#: Containers that PEFT cannot save whole, because they have no forward.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)

#: Task types for which PEFT adds to `modules_to_save` of the very config that it was given, and
#: reads it there again after the injection.
_HEADS_BY_PEFT = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def settle_heads(model: nn.Module, config: SFAConfig) -> SFAConfig:
    """Return a config whose `modules_to_save` names modules, none of them inside another one.

    "auto" becomes what lies outside the backbone. PEFT compares ends of names, so "head" also means
    the `head.head` of DPT; the adapter that it then saves cannot be loaded. The parts of the outer
    module are named instead: the same tensors.

    Args:
        model: The model to adapt.
        config: The user's config. It stays as it is, to serve other models too, unless its task
            type is one for which PEFT rewrites it anyway.

    Returns:
        The config itself, or a copy with other `modules_to_save`.

    Raises:
        TargetError: If that cannot be done.
    """
    config = _without_auto(model, config)
    modules = _visible(model)
    matched = _matched(modules, config.modules_to_save or ())
    if not any(_inside(name, matched) for name in matched) or _take_all(model, config, matched):
        return config
    outer = [name for name in matched if not _inside(name, matched)]
    parts = [part for name in outer for part in _parts(name, modules, matched)]
    if set(_matched(modules, parts)) != set(parts):
        raise TargetError(
            f"modules_to_save={config.modules_to_save}: PEFT compares ends of names, so this means "
            f"{matched}, of which some lie inside others. Give full paths that do not."
        )
    absent = [name for name in config.modules_to_save or () if not _matched(modules, [name])]
    return _with_heads(config, [*parts, *absent])


def _take_all(model: nn.Module, config: SFAConfig, names: Collection[str]) -> bool:
    """Whether modules leave nothing to adapt, which is refused next, by the names as given."""
    backbone = find_backbone(model) if config.target_modules is None else None
    return backbone is not None and all(_inside(r.name, names) for r in role_modules(backbone))


def _with_heads(config: SFAConfig, names: list[str]) -> SFAConfig:
    settled = config if config.task_type in _HEADS_BY_PEFT else copy.copy(config)
    settled.modules_to_save = names
    return settled


def _without_auto(model: nn.Module, config: SFAConfig) -> SFAConfig:
    """Return a config that names what "auto" stands for."""
    given = config.modules_to_save or ()
    if AUTO not in given:
        return config
    found = head_modules(model)
    if not found:
        warnings.warn(
            f'modules_to_save="{AUTO}": the whole model is its backbone, so nothing is trained '
            "whole. Where it has a head nevertheless, name that.",
            SFAWarning,
            stacklevel=2,
        )
    others = [name for name in given if name != AUTO]
    return _with_heads(config, list(dict.fromkeys([*found, *others])))


def check_heads(model: nn.Module, config: SFAConfig, targets: Mapping[str, object]) -> None:
    """Refuse `modules_to_save` that reaches, by the end of its name, a layer that is adapted.

    Raises:
        TargetError: Naming both.
    """
    for name in _matched(_visible(model), config.modules_to_save or ()):
        adapted = next((t for t in targets if f"{t}.".startswith(f"{name}.")), None)
        if adapted is not None:
            raise TargetError(
                f"modules_to_save={config.modules_to_save}: PEFT compares ends of names, so this "
                f"also saves `{name}` whole, in which `{adapted}` is adapted. Give the module's "
                "full path, or leave that layer out with exclude_modules."
            )


def unmatched_heads(model: nn.Module, config: SFAConfig) -> list[str]:
    """Return the entries of `modules_to_save` that reach no module, as after a typing error.

    `classifier` and `score`, which PEFT adds itself for some task types, are not among them.
    """
    modules = _visible(model)
    by_peft = ("classifier", "score") if config.task_type in _HEADS_BY_PEFT else ()
    given = (name for name in config.modules_to_save or () if name not in by_peft)
    return [f"`{name}`" for name in given if not _matched(modules, [name])]


def _visible(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules without what wrappers hold inside."""
    found: dict[str, nn.Module] = {}
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(hidden):
            found[name] = module
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                hidden = (*hidden, f"{name}.")
    return found


def _matched(modules: Mapping[str, nn.Module], ends: Collection[str]) -> list[str]:
    return [name for name in modules if name.endswith(tuple(ends))]


def _inside(name: str, others: Collection[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _parts(name: str, modules: Mapping[str, nn.Module], matched: Collection[str]) -> Iterator[str]:
    """Yield the largest modules in one that hold no other match, and together all its tensors."""
    module = modules[name]
    inner = [other for other in matched if other.startswith(f"{name}.")]
    if not inner and not isinstance(module, _CONTAINERS):
        yield name
        return
    if any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        raise TargetError(
            f"modules_to_save: PEFT compares ends of names and would save `{name}` and "
            f"`{(inner or [name])[0]}` inside it, an adapter that cannot be loaded. Its own "
            "tensors cannot be named apart: rename the inner module, or train only what is inside."
        )
    for child, part in module.named_children():
        if next(part.parameters(), None) is not None or next(part.buffers(), None) is not None:
            yield from _parts(f"{name}.{child}", modules, matched)
