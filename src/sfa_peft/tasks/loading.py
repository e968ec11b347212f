# SPDX-License-Identifier: Apache-2.0
"""Loads an adapter into a task model around a shared backbone, and takes it out again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..config import SFAConfig
from ..errors import SFAError
from ..tuner.layer import SFALayer
from .sharing import adapted_layers


def read_config(folder: str | PathLike[str]) -> SFAConfig:
    """Read an adapter's config.

    Raises:
        SFAError: If there is none, or it is not SFA's.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, SFAConfig):
            return SFAConfig.from_pretrained(str(folder))  # which remembers the folder
    except SFAError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise SFAError(f"{folder}: no adapter can be read there ({error}).") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    raise SFAError(f"{folder}: a {kind} adapter, but a bank takes SFA adapters.")


def load_frozen(
    name: str,
    folder: str | PathLike[str],
    config: SFAConfig,
    model: nn.Module,
    shared: nn.Module,
) -> PeftModel:
    """Return a task model with its adapter, in eval mode and with nothing to train.

    Raises:
        SFAError: If the adapter holds a whole copy of a part of the shared backbone.
        AdapterFileError: If the adapter is damaged or does not fit the model.
    """
    peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
    copied = next((n for n, m in shared.named_modules() if isinstance(m, ModulesToSaveWrapper)), "")
    if copied:
        raise SFAError(
            f"{folder}: modules_to_save={config.modules_to_save} names `{copied}` of the backbone "
            "too, so the adapter holds a whole copy of that, which a bank cannot share. Train it "
            "with target_parameters, or name the head by a longer path."
        )
    peft_model.eval().requires_grad_(False)
    for module in model.modules():
        # Let the trained copy of a head stand for the original too: that acts only where adapters
        # are disabled, and a second head would double what a task costs.
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            module.original_module = module.modules_to_save[name]
    return peft_model


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of a task model, and wrappers that serve no other one."""
    for layer in adapted_layers(model):
        if layer.has_adapter(name):
            layer.set_adapter([])  # PEFT would choose another active adapter, each layer its own
            layer.delete_adapter(name)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, SFALayer) and not _serves_any(child):
                setattr(parent, child_name, child.unload())
            elif isinstance(child, ModulesToSaveWrapper):
                setattr(parent, child_name, child.original_module)
    model.__dict__.pop("peft_config", None)


def guard_forward(model: nn.Module, use: Callable[[], AbstractContextManager[Any]]) -> None:
    """Make every forward of a task model run inside `use()`, whoever calls it in whatever way."""
    forward = model.forward

    @functools.wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with use():
            return forward(*args, **kwargs)

    model.forward = guarded


def _serves_any(layer: SFALayer) -> bool:
    return bool(layer.sfa_down) or any(weight.slices for weight in layer.weights.values())
