# SPDX-License-Identifier: Apache-2.0
"""Which adapter of a model a selector drives."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import SFAConfig
from ..errors import SelectionError
from ..tuner.layer import SFALayer


def active_adapter(model: nn.Module) -> str:
    """Return the name of the SFA adapter that is active in a model's layers.

    The layers know best: `PeftModel.active_adapter` does not hear of `base_model.set_adapter`, and
    a model with injected adapters has no such attribute.

    Raises:
        SelectionError: If there is no SFA adapter, or not exactly one is active.
    """
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    if not layers:
        raise SelectionError(
            f"{type(model).__name__} has no SFA adapter. Wrap it first, and give the wrapped model "
            "here: get_peft_model(model, SFAConfig(...))."
        )
    active = (name for m in layers for name in m.active_adapters if m.has_adapter(name))
    names = list(dict.fromkeys(active))
    if len(names) != 1:
        raise SelectionError(
            f"SFASelector needs one adapter to drive, but active are: {names}. Give adapter_name."
        )
    return names[0]


def adapter_config(model: nn.Module, adapter_name: str) -> SFAConfig:
    """Return the config of an adapter.

    Raises:
        SelectionError: If the model has no such SFA adapter.
    """
    configs: Any = getattr(model, "peft_config", None)
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    if not isinstance(config, SFAConfig):
        raise SelectionError(
            f"The model has no SFA adapter named `{adapter_name}`. Wrap it first: "
            "get_peft_model(model, SFAConfig(...))."
        )
    return config
