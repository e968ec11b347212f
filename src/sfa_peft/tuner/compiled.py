# SPDX-License-Identifier: Apache-2.0
"""How an adapted model runs under `torch.compile`: one graph break, before the forward.

A graph cannot hold what decides whether weights are up to date. So a hook on the model does that
first, for all layers, and the layers' forwards go on with what it prepared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..sparse.pool import every_pool
from ..sparse.weight import eager
from .layer import CompiledPass, SFALayer, refuse_offloaded_weights

#: Name under which the hooked model keeps its pass.
_ATTRIBUTE = "_sfa_compiled_pass"


def install(model: nn.Module) -> None:
    """Hook a model, whoever calls it; safe to call again."""
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, CompiledPass())
        model.register_forward_pre_hook(_before_forward)
        model.register_forward_hook(_after_forward)


def remove(model: nn.Module) -> None:
    """Take the hooks away."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for handle in [h for h, f in hooks.items() if f in (_before_forward, _after_forward)]:
            del hooks[handle]


def _before_forward(model: nn.Module, _args: Any) -> None:
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        _prepare(model)
    elif any(pool.store.is_there and pool.values.is_meta for pool in every_pool()):
        refuse_offloaded_weights(model)


def _after_forward(model: nn.Module, _args: Any, _out: Any) -> None:
    """End the pass: a layer that is called on its own must not trust what was prepared."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        getattr(model, _ATTRIBUTE).is_open = False


@eager
def _prepare(model: nn.Module) -> None:
    """Let every layer write its weights and look up its taps, outside a compiled graph."""
    compiled_pass = getattr(model, _ATTRIBUTE)
    compiled_pass.is_open = True
    for module in model.modules():
        if isinstance(module, SFALayer):
            module.prepare(compiled_pass)
