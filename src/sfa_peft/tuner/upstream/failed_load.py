# SPDX-License-Identifier: Apache-2.0
"""A model put back as it was when an adapter could not be loaded into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .. import adapted_layers
from ..adapted_layers import adapter_layers
from ..feature_map import forget_unused
from ..layer import SFALayer

_CONTAINERS = ("_modules", "_parameters", "_buffers")
_CONFIGS = "peft_config"


@contextmanager
def unchanged_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Take an SFA adapter out again where an error leaves the block in which it was to come in.

    Modules, active adapters, `requires_grad` and PEFT's table of adapters are then as before.
    Nothing happens if the model had that adapter before, or has got none of SFA.

    Args:
        model: The model, with or without adapters, or a `PeftModel`.
        adapter_name: The adapter.
    """
    if adapter_layers(model, adapter_name):
        yield
        return
    before = _Snapshot(model)
    try:
        yield
    except Exception:
        if adapter_layers(model, adapter_name):
            before.restore(model, adapter_name)
        raise


class _Snapshot:
    """What injecting an adapter changes, but for values: it writes no weight of the model."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.contents = [(m, [(c, dict(getattr(m, c))) for c in _CONTAINERS]) for m in modules]
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.active: list[tuple[Any, Any, bool]] = [
            (m, m._active_adapter, m._disable_adapters)
            for m in modules
            if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        tables = [getattr(m, _CONFIGS, None) for m in modules]
        self.tables = {id(t): (t, dict(t)) for t in tables if isinstance(t, dict)}

    def restore(self, model: nn.Module, adapter_name: str) -> None:
        for layer in adapter_layers(model, adapter_name):
            layer._active_adapter = []  # PEFT would choose another one, with a warning
            layer.delete_adapter(adapter_name)
        for module, containers in self.contents:
            for name, content in containers:
                now = getattr(module, name)
                now.clear()
                now.update(content)
        for module, active, disabled in self.active:
            module._active_adapter, module._disable_adapters = active, disabled
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        for table, content in self.tables.values():
            table.clear()
            table.update(content)
        for module in model.modules():
            table = vars(module).get(_CONFIGS)
            if isinstance(table, dict) and id(table) not in self.tables:
                delattr(module, _CONFIGS)
        if not any(isinstance(module, SFALayer) for module in model.modules()):
            adapted_layers.remove(model)
        forget_unused(model)
