# SPDX-License-Identifier: Apache-2.0
"""The adapted layers of a model together: found, and what a hook does before their forward.

It looks for what others wrote into adapters that train (see `sparse.weight_averages`). And under
`torch.compile` it does for all layers what a graph cannot hold: decide whether weights are up to
date, and write them. Where nothing else is to be found out, one operator at the start of the graph
does that, through which the model's inputs go. Where a backward will come and picks change what
its layers want of it, the hook makes the one graph break, and the layers' forwards go on with what
it prepared.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import SelectionError, SFAError
from ..selection.pick import is_unfinished
from ..sparse.gradient import TAGS, Tapped
from ..sparse.pool import Pool
from ..sparse.write_lock import is_exporting, is_recorded
from .adapter import Adapter
from .layer import SFALayer
from .weight_storage import refuse_offloaded, take_shards

#: Name under which the hooked model keeps its pass.
_ATTRIBUTE = "_sfa_compiled_pass"


class CompiledPass:
    """The compiled forwards of a whole model.

    Args:
        model: The model.

    Attributes:
        adapters: Those of the model that have a pool.
        layers: Those that have weights to be written.
        is_open: A forward with a graph break is on its way: what layers prepared holds.
        is_settled: What layers prepared holds for later forwards too.
        is_traced: A forward is being traced whose graph begins with `arrive`.
        is_tapped: That forward uses what layers prepared for a backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_open = self.is_settled = self.is_traced = self.is_tapped = False
        self.adapters: list[Adapter] = []
        self.layers: list[SFALayer] = []
        self.stand_ins: list[Any] = []  # of each adapter's pool, when it was settled
        self.thread = 0  # the one whose forward is open
        self.known: Any = None  # weakly, tensor of the first weight when shards were looked for
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"is_settled": False, "stand_ins": []})
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stand_ins": [], "known": None}

    def _register(self) -> None:
        self.handle = next(_handles)  # a graph can hold a number, but no object
        _PASSES[self.handle] = self

    def settle(self) -> None:
        """Find out, before layers prepare, whether later forwards can use it too."""
        trained = _trained(self)
        self.is_settled = len(trained) > 0 and not any(_selects(adapter) for adapter in trained)
        self.stand_ins = [a.pool.stand_ins() for a in trained] if self.is_settled else []

    def bring(self, *, steps: bool, tapped: bool) -> None:
        """Make all layers' weights hold what they should; in a graph.

        Raises:
            SFAError: If somebody has put other positions or values behind the graph's back.
        """
        _look(self.model, steps=steps)
        for layer in self.layers:
            if not layer.disable_adapters:
                layer.refresh(layer._effective_adapters())
            elif not layer.in_graph:
                for weight in layer.weights.values():
                    weight.withdraw()
        if not tapped:
            return
        trained = _trained(self)
        pools = [adapter.pool for adapter in trained]
        if len(pools) != len(self.stand_ins) or not all(
            pool.keeps(known) for pool, known in zip(pools, self.stand_ins, strict=True)
        ):
            self.is_settled = False
            raise SFAError(
                f"Adapter `{trained[0].name if trained else '?'}`: its positions or values are "
                "others than when the model was compiled. Call the model again: it is compiled "
                "anew."
            )
        for layer in self.layers:
            for weight in layer.weights.values():
                weight.in_graph = weight.in_graph or bool(weight.live)


_handles = itertools.count()
_PASSES: weakref.WeakValueDictionary[int, CompiledPass] = weakref.WeakValueDictionary()


@torch.library.custom_op("sfa_peft::arrive", mutates_args=(), **TAGS)
def arrive(x: Tensor, handle: int, steps: bool, tapped: bool) -> Tensor:
    """Write a model's weights, and return its input: what uses the input comes later."""
    found = _PASSES.get(handle)
    if found is not None:
        found.bring(steps=steps, tapped=tapped)
    return x.clone()


@arrive.register_fake
def _(x: Tensor, handle: int, steps: bool, tapped: bool) -> Tensor:
    return x.clone()


arrive.register_autograd(lambda _ctx, grad: (grad, None, None, None))


def _trained(found: CompiledPass) -> list[Any]:
    there: list[Any] = [a for a in found.adapters if a.store is not None and a.store.is_there]
    return [adapter for adapter in there if adapter.pool.values.requires_grad]


def _selects(adapter: Any) -> bool:
    """Whether slots may still be given out, or somebody should be told that nobody does."""
    pool, rules = adapter.pool, adapter.config.rules
    waits = adapter.needs_selector and is_unfinished(pool, rules)
    return pool.is_growing or waits or pool.is_empty


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


class Switched:
    """What of a model follows its active adapters; PEFT's functions take it in the model's place.

    They visit each module by its path, of which a vision model has thousands. Here adapted layers
    are not looked into, which hold half of them. Looked for anew each time: anybody may put other
    modules into a model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        found: dict[nn.Module, None] = {}
        seen, rest = {model}, [model]
        kinds: dict[type, tuple[bool, bool]] = {}
        while rest:
            module = rest.pop()
            kind = type(module)
            if kind not in kinds:  # PEFT's classes are abstract ones, which are slow to ask for
                kinds[kind] = issubclass(kind, SFALayer), issubclass(kind, AuxiliaryTrainingWrapper)
            is_layer, is_wrapper = kinds[kind]
            if is_layer or is_wrapper:
                found[module] = None
            if not is_layer:
                inner = [m for m in module._modules.values() if m is not None and m not in seen]
                seen.update(inner)
                rest += reversed(inner)
        self._found: Sequence[Any] = list(found)

    def modules(self) -> Sequence[Any]:
        """Return adapted layers, and PEFT's wrappers of modules that are saved whole."""
        return self._found


def refuse_offloaded_weights(model: nn.Module) -> None:
    """Refuse a model with offloaded weights that an adapter changes (TargetError)."""
    layers = (m for m in model.modules() if isinstance(m, SFALayer) and m.weights)
    refuse_offloaded(model, {layer.name: layer.get_base_layer() for layer in layers})


def install(model: nn.Module) -> None:
    """Hook a model, whoever calls it; safe to call again."""
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, CompiledPass(model))
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        model.register_forward_hook(_after_forward, always_call=True)
    found = getattr(model, _ATTRIBUTE)
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    stores = {id(a.store): a for layer in layers for a in layer.adapters.values() if a.store}
    found.adapters = list(stores.values())
    found.layers = [layer for layer in layers if layer.weights]
    found.is_settled = False
    for layer in layers:
        layer.whole = found


def remove(model: nn.Module) -> None:
    """Take the hooks away."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for handle in [h for h, f in hooks.items() if f in (_before_forward, _after_forward)]:
            del hooks[handle]
            model._forward_pre_hooks_with_kwargs.pop(handle, None)


def _before_forward(model: nn.Module, args: Any, kwargs: Any) -> Any:
    if is_recorded():
        return None
    found, steps = getattr(model, _ATTRIBUTE), model.training and torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        _look(model, steps=steps)
        if steps:
            _begin_pass(found)
        return None
    if not found.layers:
        return None
    inputs = [*args, *kwargs.values()]
    if not (_is_steady(found) and any(isinstance(x, Tensor) for x in inputs)):
        _prepare(model)
        return None
    found.is_traced = True
    found.is_tapped = torch.is_grad_enabled() and len(_trained(found)) > 0

    def arrived(x: Any) -> Any:
        is_tensor = isinstance(x, Tensor)
        return arrive(x, found.handle, steps, found.is_tapped) if is_tensor else x

    return tuple(arrived(x) for x in args), {key: arrived(x) for key, x in kwargs.items()}


def _begin_pass(found: CompiledPass) -> None:
    """Let all layers' weights be written at once, if the one adapter that acts is alone."""
    first = found.layers[0] if found.layers else None
    active = [] if first is None else first.active_adapters
    adapter = next((a for a in found.adapters if [a.name] == active), None)
    if (
        adapter is None
        or adapter.pool is None
        or not all(_is_usual(m, active) for m in found.layers)
    ):
        return
    adapter.watch(adapter.pool.weights[0])
    if adapter.pool.training_pass.begin():
        for layer in found.layers:
            alone = all(adapter.name in weight.slices for weight in layer.weights.values())
            wanted = found if alone else None
            if layer.prepared_for is not wanted:  # to set an attribute of a module takes long
                layer.prepared_for = wanted
        found.is_open, found.thread = True, threading.get_ident()


def _is_usual(layer: SFALayer, active: list[str]) -> bool:
    """Whether a layer's weights hold what the active adapters change, and nothing is awaited."""
    is_off = layer.merged_adapters or layer.disable_adapters or layer.sfa_packed
    return layer.active_adapters == active and not is_off


def _is_steady(found: CompiledPass) -> bool:
    """Whether a forward that is traced now needs nothing but weights that are up to date."""
    if any(m.disable_adapters and (m.merged or m.in_graph) for m in found.layers):
        return False
    if not TAGS and any(m.base_weight.is_cuda for m in found.layers):
        return False  # the operator could become part of a CUDA graph, which would never call it
    if not torch.is_grad_enabled():
        return True
    trained = _trained(found)
    return not trained or (found.is_settled and not any(a.pool.is_growing for a in trained))


def _look(model: nn.Module, *, steps: bool) -> None:
    """Look for writes of others, but not between one training step and the next; begin rounds."""
    found = getattr(model, _ATTRIBUTE)
    found.adapters = [a for a in found.adapters if a.store.is_there]
    if any(adapter.store.values.is_meta for adapter in found.adapters):
        refuse_offloaded_weights(model)
    _look_for_cuts(model, found)
    for adapter in found.adapters:
        if adapter.name in adapter.store.layer.active_adapters:
            adapter.look(steps=steps)
            if torch.is_grad_enabled():
                adapter.begin(functools.partial(_check_selection, model))


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Refuse gradient checkpointing under which adapters get no gradient.

    Raises:
        SelectionError: If a module of the model (as transformers sets them up) uses it.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        keywords = getattr(function, "keywords", None)
        if not getattr(module, "gradient_checkpointing", False) or keywords is None:
            continue
        if keywords.get("use_reentrant", True):
            raise SelectionError(
                f"`{name}`: gradient checkpointing is of the reentrant kind, under which selected "
                "weights and adapters get no gradient. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, in TrainingArguments or '
                "in model.gradient_checkpointing_enable()."
            )


def _check_selection(model: nn.Module, pool: Pool) -> None:
    """Refuse what a selector refuses (SelectionError)."""
    refuse_reentrant_checkpointing(model)
    take_shards(model, [pool], selects=True)


def _look_for_cuts(model: nn.Module, compiled_pass: CompiledPass) -> None:
    """Take up, or refuse, weights that were cut over processes since they were looked at last."""
    pools = [a.pool for a in compiled_pass.adapters if a.pool is not None]
    first = pools[0].weights[0].tensor if pools else None
    if first is not None and (compiled_pass.known is None or compiled_pass.known() is not first):
        take_shards(model, pools)
        compiled_pass.known = weakref.ref(first)


def _after_forward(model: nn.Module, _args: Any, _out: Any) -> None:
    """End the pass: a layer that is called on its own must not trust what was prepared."""
    if not is_exporting():
        found = getattr(model, _ATTRIBUTE)
        found.is_open = found.is_traced = False


@torch.compiler.disable
def _prepare(model: nn.Module) -> None:
    """Let every layer write its weights and look up its taps, outside a compiled graph."""
    found = getattr(model, _ATTRIBUTE)
    found.is_open = True
    _look(model, steps=model.training and torch.is_grad_enabled())
    found.settle()
    tapped = torch.is_grad_enabled()
    for layer in found.layers:
        usable = not (layer.merged or layer.disable_adapters)
        layer.prepared_for = found if usable else None
        if usable:
            layer.refresh(layer._effective_adapters())
            for weight in layer.weights.values():
                weight.prepared = layer.taps(weight) if tapped else Tapped([], [])
