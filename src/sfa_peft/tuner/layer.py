# SPDX-License-Identifier: Apache-2.0
"""`SFALayer`: a layer with the sparse change of its parameters and its external adapter.

Original entries are always put back by overwriting, so every state is exact, whatever came before.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import SFAError
from ..sparse.gradient import WORTH, WORTH_OF_SHARED, Tapped, call_tapped, eager
from ..sparse.pool import Pool
from ..sparse.settled import Settled
from ..sparse.weight import Weight
from ..sparse.weight_averages import take_positions, undo_rounding
from ..sparse.write_lock import is_exporting, is_recorded, now_or_together
from .adapter import Adapter, LayerStore
from .external import AdaptedLayer, apply_bottleneck
from .weight_storage import fit_for_changes, move, refuse_infinite, refuse_offloaded, stored


class SFALayer(nn.Module, BaseTunerLayer):
    """A layer whose selected weights and external adapter train while the rest stays frozen.

    Args:
        base_layer: An `nn.Linear` or `nn.Conv2d`, or any module without children whose parameters
            are changed by name.
        name: Path inside the model.
        role: Role of the layer in a transformer block, None if unknown.
        block: Ordinal of the block, None if unknown.
        stage: Hierarchical stage, None if unknown.
    """

    adapter_layer_names = ("sfa_pool", "sfa_down", "sfa_up")
    other_param_names = ("sfa_slots", "sfa_packed")

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        name: str,
        role: str | None = None,
        block: int | None = None,
        stage: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.role, self.block, self.stage = name, role, block, stage
        self.sfa_pool = nn.ParameterDict()
        self.sfa_slots = BufferDict(persistent=True)
        self.sfa_packed = BufferDict(persistent=True)  # until they are unpacked
        self.sfa_down = nn.ModuleDict()
        self.sfa_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.adapters: dict[str, Adapter] = {}  # those that were added here, by name
        self.weights: dict[str, Weight] = {}  # by name of the base layer's parameter
        self.settled = Settled()
        self.whole: Any = None  # compiled forwards of the model that it is in (see `layers`)
        self.prepared_for: Any = None  # the same, while what was prepared may be used
        kind = "channels" if isinstance(base_layer, nn.Conv2d) else "features"
        self.in_features = getattr(base_layer, f"in_{kind}", None)
        self.out_features = getattr(base_layer, f"out_{kind}", None)

    # --- building ------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter: Adapter,
        *,
        path: str,
        parameters: Sequence[str],
        external: tuple[nn.Module, nn.Module] | None,
    ) -> None:
        """Add an adapter.

        Args:
            adapter: The adapter.
            path: The layer's path in the model the adapter belongs to; task models that share a
                backbone may hold it under different names.
            parameters: Names of this layer's parameters whose entries may be selected.
            external: The ways down and up of the external adapter, None for none.
        """
        name = adapter.name
        self.adapters[name] = adapter
        for parameter in parameters:
            if adapter.pool is None:
                adapter.make_pool(LayerStore.make(self, adapter))
            cast(Pool, adapter.pool).add(self.carrier(parameter), f"{path}.{parameter}")
        if external is not None:
            self.sfa_down[name], self.sfa_up[name] = external
        self.mark_active(self.active_adapters, inference_mode=adapter.config.inference_mode)

    def carrier(self, parameter: str) -> Weight:
        """Return what carries the changes of a parameter."""
        if parameter not in self.weights:
            self.weights[parameter] = Weight(self, parameter)
        return self.weights[parameter]

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the base layer, with the entries of live adapters in it."""
        # Of a plain layer at once: weights ask for it several times in a forward or a switch.
        own = self._modules["base_layer"]._parameters.get(name)  # pyright: ignore
        return cast(Tensor, getattr(self.get_base_layer(), name)) if own is None else own

    def columns_worth(self, name: str) -> float | None:
        """Return what `find_support` asks of the matrix of a linear layer; None of others."""
        if name != "weight" or type(self.base_layer) is not nn.Linear:
            return None
        return WORTH_OF_SHARED if self.role == "attn_in" else WORTH

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight as it is stored (its first tensor where it has none)."""
        return next(stored(self.get_base_layer()))

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter changes this layer's parameters or output."""
        for weight in self.weights.values():
            if adapter_name in weight.slices or adapter_name in weight.earlier:
                return True
        return adapter_name in self.sfa_down

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base's dtype, which loses bits of a loaded fp32 adapter.
        containers = map(self.__getattr__, (*self.adapter_layer_names, *self.other_param_names))
        move(containers, adapter_name, device or self.base_weight.device)

    # --- forward -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with selected weights and external adapters in effect."""
        modules: dict[str, Any] = self._modules  # faster than by attribute
        names, is_transformed = None, False
        if not torch.compiler.is_compiling():
            names = self.settled.look()
        if names is None:
            if modules["sfa_packed"]:
                self._finish_loading()
            if self._disable_adapters:
                return self._pretrained_forward(*args, **kwargs)
            names = self._effective_adapters()
            is_transformed = not self._is_prepared() and self._bring(names)
        out = self._base_forward(names, is_transformed, args, kwargs)
        downs = modules["sfa_down"]._modules
        for name in names:
            if name in downs:
                out = apply_bottleneck(out, downs[name], modules["sfa_up"]._modules[name])
        return out

    def _bring(self, names: list[str]) -> bool:
        """Make the weights hold changes, or find that they do where nothing can be written.

        Returns:
            Whether others stand for them (torch.func).

        Raises:
            SFAError: While a graph is recorded (torch.export, torch.func), if they do not.
        """
        weights, compiling = self.weights.values(), torch.compiler.is_compiling()
        if not compiling and all(weight.is_current(names) for weight in weights):
            self.settled.remember(names, weights, (cast(Any, self._modules), "base_layer"))
            return False
        is_transformed = not compiling and any(weight.is_stand_in for weight in weights)
        if not is_exporting() and not is_transformed:
            self.refresh(names)
        elif not all(weight.holds(names) for weight in weights):
            raise SFAError(
                f"`{self.name}`: its weights do not hold the active adapters yet, and nothing can "
                "be written while torch.export or torch.func look at the model. Call "
                "model.eval() right before."
            )
        return is_transformed

    @eager
    def _finish_loading(self) -> None:
        """Unpack what a loader left; where nothing was loaded, wait no longer."""
        for name in list(self.sfa_packed):
            self.adapters[name].unpack()
            cast(LayerStore, self.adapters[name].store).drop_packed()

    def _pretrained_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            self.unmerge()
        if self.in_graph:
            # A forward whose backward may still come used the weight as it is: leave it alone.
            originals = {name: weight.pretrained() for name, weight in self.weights.items()}
            return torch.func.functional_call(self.base_layer, originals, args, kwargs)
        if not self._is_prepared() and any(weight.live for weight in self.weights.values()):
            self.withdraw()
        return self.base_layer(*args, **kwargs)

    def _base_forward(
        self, names: Sequence[str], is_transformed: bool, args: Any, kwargs: Any
    ) -> Any:
        base: Any = self._modules["base_layer"]
        if not torch.is_grad_enabled() or self.merged_adapters or is_recorded():
            return base(*args, **kwargs)
        if is_transformed:
            computed = {name: weight.computed(names) for name, weight in self.weights.items()}
            return torch.func.functional_call(base, computed, args, kwargs)
        if self._is_prepared():
            if self.whole.is_traced and not self.whole.is_tapped:
                return base(*args, **kwargs)
            tapped = {name: w.prepared or self.taps(w) for name, w in self.weights.items()}
            compiling = torch.compiler.is_compiling()
            if compiling and not self.whole.is_traced:  # later picks need not lead to other graphs
                tapped = {name: found.dense() for name, found in tapped.items()}
        else:
            tapped = {name: self.taps(w) for name, w in self.weights.items()}
        return call_tapped(base, tapped, args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise SFAError(
            "nn.DataParallel (the Trainer's way with several GPUs) copies the model, and copies "
            "would share one adapter's state. Start one process per GPU: torchrun "
            "--nproc_per_node N script.py; or show it one GPU: CUDA_VISIBLE_DEVICES=0."
        )

    @eager  # a cut is kept between forwards, so no graph may own it
    def taps(self, weight: Weight) -> Tapped:
        """Return what active adapters want from a weight's gradient."""
        for name in weight.live if self.training else ():
            if name in self.adapters:
                self.adapters[name].watch(weight)
        return weight.taps()

    def _is_prepared(self) -> bool:
        """Whether this is part of a forward for which `adapted_layers` has prepared the weights."""
        found = self.prepared_for
        if not torch.compiler.is_compiling():
            return found is not None and found.is_open and found.thread == threading.get_ident()
        opened = found is not None and found.is_open
        return opened or (self.whole is not None and self.whole.is_traced)

    # --- the changes on its weights ------------------------------------------------------------

    def refresh(self, names: Sequence[str], *, keep: bool = False) -> None:
        """Make the parameters hold the changes of adapters; TargetError if they are offloaded."""
        for weight in self.weights.values():
            if weight.tensor.is_meta:
                base = self.get_base_layer()
                refuse_offloaded(base, {self.name: base})
            weight.refresh(names, keep=keep)

    def withdraw(self) -> None:
        """Put the original entries back into the parameters, to the bit."""
        self._unprepare()
        for weight in self.weights.values():
            weight.withdraw()

    @property
    def in_graph(self) -> bool:
        """Whether a backward that needs the parameters as they are may still come."""
        return any(weight.in_graph for weight in self.weights.values())

    def _unprepare(self) -> None:
        self.settled.forget()
        if self.prepared_for is not None:  # to set an attribute of a module takes long
            self.prepared_for = None
        if self.whole is not None:
            self.whole.is_settled = False

    def _write_active(self) -> None:
        self._unprepare()
        self.refresh(self._effective_adapters(), keep=True)

    def _switch(self, action: Callable[[], None]) -> None:
        self.settled.forget()
        first = next(iter(self.weights.values()), None)
        if first is not None and not (weight := first.tensor).is_meta:
            alone = first.shard is not None or not weight.is_cpu
            now_or_together(self, 0 if alone else weight.numel(), action)

    def train(self, mode: bool = True) -> Any:
        """Go to train or eval mode; in eval mode weights hold what active adapters change."""
        # Now, so that nothing is left to be written in a forward that torch.export records.
        super().train(mode)
        for adapter in self.adapters.values():
            adapter.find_shards(self)
        if not mode and not (self.merged or self.disable_adapters):
            for name in list(self.sfa_packed):
                self.adapters[name].unpack()
            self._switch(lambda: self.refresh(self._effective_adapters()))
        return self

    # --- which adapters act --------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; in eval mode what they change is written at once."""
        # In train mode the next forward writes, since an optimizer may come first.
        before = self.active_adapters
        self.mark_active(adapter_names, inference_mode=inference_mode)
        if self.merged:
            return
        if not (self.training or self.disable_adapters):
            self._switch(self._write_active)
        elif self.active_adapters != before:
            self._switch(self.withdraw)

    def mark_active(self, adapter_names: str | list[str], *, inference_mode: bool) -> None:
        """Activate adapters without writing; while one is added, its pool is not complete."""
        self.settled.forget()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def act_at_once(self, adapter_names: list[str]) -> None:
        """Activate adapters and write what they change; what is trainable is left alone."""
        self._active_adapter = list(adapter_names)
        self._switch(self._write_active)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off computes with the pretrained weight, to the bit."""
        self.settled.forget()
        super().enable_adapters(enabled)
        if not self.merged and not self.in_graph:
            self._switch(self.withdraw)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the layer."""
        self.withdraw()
        for weight in self.weights.values():
            weight.remove(adapter_name)
        super().delete_adapter(adapter_name)
        self.adapters.pop(adapter_name, None)

    def _all_available_adapter_names(self) -> list[str]:
        # PEFT takes the first of these when the active adapter is deleted, and looks for it among
        # tensors; most layers hold none, since the pool is on the first one.
        changed = {name for weight in self.weights.values() for name in weight.slices}
        return sorted(changed.union(super()._all_available_adapter_names()))

    def _effective_adapters(self) -> list[str]:
        """Names whose change and external adapter act now."""
        if self.merged_adapters or self._disable_adapters:
            return list(self.merged_adapters)
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        return [name for name in names if self.has_adapter(name)]

    # --- merging -------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the change of adapters in the weight until `unmerge`.

        External adapters cannot be folded into a weight: they stay in the forward.

        Args:
            safe_merge: Whether to check first that nothing becomes NaN or infinite.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If `safe_merge` finds a value that is not finite.
        """
        names = [a for a in check_adapters_to_merge(self, adapter_names) if self.has_adapter(a)]
        for name in names if safe_merge else ():
            slices = [w.slices[name] for w in self.weights.values() if name in w.slices]
            projections = [m[name] for m in (self.sfa_down, self.sfa_up) if name in m]
            refuse_infinite(name, projections, [part.change() for part in slices])
        self.merged_adapters.extend(names)
        if names:
            self._switch(lambda: self.refresh(self.merged_adapters))

    def unmerge(self) -> None:
        """Put the original entries back, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self._switch(self.withdraw)

    def unload(self) -> nn.Module:
        """Return what stands in the wrapper's place afterwards: the base layer, merged or not."""
        base = self.get_base_layer()
        if not self.merged:
            self.withdraw()
            return base
        downs, ups = self.sfa_down, self.sfa_up
        kept = [(downs[name], ups[name]) for name in self.merged_adapters if name in downs]
        return AdaptedLayer(base, kept) if kept else base

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like any module's, with the original entries in the base layer unless merged.

        Values and positions that wait to be unpacked are left out, so that a loader (transformers'
        own) does not miss them in a file that has them packed.
        """
        for adapter in self.adapters.values():
            if adapter.store is not None and adapter.store.layer is self:
                adapter.look()
        state = super().state_dict(*args, **kwargs)
        start = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for kind, name in itertools.product(("sfa_pool", "sfa_slots"), self.sfa_packed):
            state.pop(f"{start}{kind}.{name}", None)
        for name, weight in self.weights.items():
            key = f"{start}base_layer.{name}"
            if weight.live and not self.merged and key in state:
                state[key] = weight.original()
        return state

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._forget()  # what is loaded next are original weights
        for name, weight in self.weights.items():
            undo_rounding(state, f"{prefix}base_layer.{name}", weight)
        for name in self.sfa_slots:
            take_positions(state, f"{prefix}sfa_slots.{name}", cast(Pool, self.adapters[name].pool))
        super()._load_from_state_dict(state, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget()
        with fit_for_changes(self.sfa_pool, self.weights):
            super()._apply(fn, recurse)
        if self.merged:
            self.refresh(self.merged_adapters)
        return self

    def _forget(self) -> None:
        """Take changes out of the weights, and look at these anew next time."""
        self.withdraw()
        for weight in self.weights.values():
            weight.forget()

    def extra_repr(self) -> str:
        """Name the role, and per adapter the selected weights and the external adapter's width."""
        parts = [f"role={self.role}"]
        for parameter, weight in self.weights.items():
            for name, part in weight.slices.items():
                share = f"{sum(b - a for a, b in part.spans)} of {weight.tensor.numel()}"
                parts.append(f"{name}: {share} in {parameter} selected")
        for name, down in self.sfa_down.items():
            parts.append(f"{name}: width {down.weight.shape[0]}")  # pyright: ignore
        return ", ".join(parts)
