# SPDX-License-Identifier: Apache-2.0
"""The adapted layers of a model together: found, and what a hook does before their forward.

It looks for what others wrote into adapters that train (see `sparse.weight_averages`). And under
`torch.compile` it makes the one graph break: a graph cannot hold what decides whether weights are
up to date. So the hook does that first, for all layers, and their forwards go on with what it
prepared.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ..sparse.pool import Pool
from ..sparse.weight import eager
from .adapter import Adapter
from .layer import SFALayer
from .weight_storage import refuse_offloaded, take_shards

#: Name under which the hooked model keeps its pass.
_ATTRIBUTE = "_sfa_compiled_pass"


class CompiledPass:
    """One compiled forward of a whole model: what layers prepared holds while it is open."""

    is_open = False

    def __init__(self) -> None:
        self.adapters: list[Adapter] = []  # of the model
        self.known: Any = None  # weakly, tensor of the first weight when all were found whole

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"known": None}


def adapter_layers(model: nn.Module, adapter_name: str) -> list[SFALayer]:
    """Return the layers that an adapter changes, in model order."""
    layers = (m for m in model.modules() if isinstance(m, SFALayer))
    return [layer for layer in layers if layer.has_adapter(adapter_name)]


def find_adapter(model: nn.Module, adapter_name: str) -> Adapter | None:
    """Return an adapter of a model, unpacked; None where it has none of that name."""
    layers = (m for m in model.modules() if isinstance(m, SFALayer))
    adapter = next((m.adapters[adapter_name] for m in layers if adapter_name in m.adapters), None)
    if adapter is not None:
        adapter.unpack()
    return adapter


def find_pool(model: nn.Module, adapter_name: str) -> Pool | None:
    """Return the pool of an adapter in a model, None where it has none."""
    adapter = find_adapter(model, adapter_name)
    return None if adapter is None else adapter.pool


def refuse_offloaded_weights(model: nn.Module) -> None:
    """Refuse a model with offloaded weights that an adapter changes (TargetError)."""
    layers = (m for m in model.modules() if isinstance(m, SFALayer) and m.weights)
    refuse_offloaded(model, {layer.name: layer.get_base_layer() for layer in layers})


def install(model: nn.Module) -> None:
    """Hook a model, whoever calls it; safe to call again."""
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, CompiledPass())
        model.register_forward_pre_hook(_before_forward)
        model.register_forward_hook(_after_forward)
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    stores = {id(a.store): a for layer in layers for a in layer.adapters.values() if a.store}
    getattr(model, _ATTRIBUTE).adapters = list(stores.values())


def remove(model: nn.Module) -> None:
    """Take the hooks away."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for handle in [h for h, f in hooks.items() if f in (_before_forward, _after_forward)]:
            del hooks[handle]


def _before_forward(model: nn.Module, _args: Any) -> None:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore
        return
    if torch.compiler.is_compiling():
        _prepare(model)
    else:
        _look(model)


def _look(model: nn.Module) -> None:
    """Look for writes of others, but not between one training step and the next; begin rounds."""
    compiled_pass = getattr(model, _ATTRIBUTE)
    compiled_pass.adapters = [a for a in compiled_pass.adapters if a.store.is_there]
    if any(adapter.store.values.is_meta for adapter in compiled_pass.adapters):
        refuse_offloaded_weights(model)
    _look_for_cuts(model, compiled_pass)
    for adapter in compiled_pass.adapters:
        if adapter.name in adapter.store.layer.active_adapters:
            adapter.look(steps=model.training and torch.is_grad_enabled())
            if torch.is_grad_enabled():
                adapter.begin()


def _look_for_cuts(model: nn.Module, compiled_pass: CompiledPass) -> None:
    """Take up, or refuse, weights that were cut over processes since they were looked at last."""
    pools = [a.pool for a in compiled_pass.adapters if a.pool is not None]
    first = pools[0].weights[0].tensor if pools else None
    if first is not None and (compiled_pass.known is None or compiled_pass.known() is not first):
        take_shards(model, pools)
        compiled_pass.known = weakref.ref(first)


def _after_forward(model: nn.Module, _args: Any, _out: Any) -> None:
    """End the pass: a layer that is called on its own must not trust what was prepared."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        getattr(model, _ATTRIBUTE).is_open = False


@eager
def _prepare(model: nn.Module) -> None:
    """Let every layer write its weights and look up its taps, outside a compiled graph."""
    compiled_pass = getattr(model, _ATTRIBUTE)
    compiled_pass.is_open = True
    _look(model)
    for module in model.modules():
        if isinstance(module, SFALayer):
            module.prepare(compiled_pass)
