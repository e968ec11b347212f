# SPDX-License-Identifier: Apache-2.0
"""Modules that are trained and saved whole, the task heads.

What PEFT's comparison by the end of names reaches; and tensors of heads under the names that this
release of Transformers gives them. It renames them while it reads a model's checkpoint, but nothing
renames them in an adapter's file. PEFT looks them up before it asks the tuner, so `files` calls
`heads_as_here` first.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...backbones import find_backbone, head_modules, role_modules
from ...config import AUTO, SFAConfig
from ...errors import FrozenHeadWarning, TargetError, warn

# What Transformers 5 calls otherwise, with the name in 4. Only names that one release has and the
# other lacks are compared, so that a pattern that fits too much does no harm.
_FORMER_NAMES = (
    (r"\.linear_projections\.", ".linear_c."),  # SegFormer
    (r"\.aifi\.", ".encoder."),  # RT-DETR, D-FINE
    (r"(_attn)\.o_proj\.", r"\1.out_proj."),  # DETR and what holds its decoder
    (r"(layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"(layers\.\d+)\.mlp\.layers\.0\.", r"\1.fc1."),  # D-FINE
    (r"(layers\.\d+)\.mlp\.layers\.1\.", r"\1.fc2."),
)

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
        warn(
            f'modules_to_save="{AUTO}": the whole model is its backbone, so nothing is trained '
            "whole. Where it has a head nevertheless, name that.",
            FrozenHeadWarning,
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


# --- names of other releases --------------------------------------------------------------------


def former_name(name: str) -> str:
    """Return the name that a head's tensor had in Transformers 4 (the same for such a name)."""
    for pattern, former in _FORMER_NAMES:
        name = re.sub(pattern, former, name)
    return name


def names_here(wanted: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """Pair the tensors that a model lacks in a file with those that it has no place for.

    Args:
        wanted: Names of the model's tensors.
        found: Names of the file's tensors.

    Returns:
        By name in the file the name in the model, where they differ by release only.
    """
    wanted, found = set(wanted), set(found)
    spare = {former_name(name): name for name in found - wanted}
    missing = {former_name(name): name for name in wanted - found}
    return {spare[former]: name for former, name in missing.items() if former in spare}


def heads_as_here(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an adapter's tensors with those of its heads named as in a model.

    Args:
        model: The model with the adapter and its `modules_to_save`.
        adapter_name: The adapter.
        state: Tensors by key as in the file, without adapter names.
    """
    wrappers: list[tuple[str, Any]] = [
        (n, m) for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)
    ]
    wanted = [f"{n}.{k}" for n, m in wrappers for k in m.adapter_state_dict_load_map(adapter_name)]
    here = names_here(wanted, (key for key in state if ".sfa_" not in key))
    return {here.get(key, key): tensor for key, tensor in state.items()}
