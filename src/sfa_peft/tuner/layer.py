# SPDX-License-Identifier: Apache-2.0
"""`SFALayer`: a layer with the sparse change of its parameters and its external adapter.

Original entries are always put back by overwriting, so every state is exact, whatever came before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import SFAError
from ..sparse.gradient import LiveWeight, Tap
from ..sparse.pool import Pool
from ..sparse.weight import Weight, eager
from ..sparse.weight_averages import take_positions, undo_rounding
from ..sparse.write_lock import now_or_together
from .adapter import Adapter, LayerStore
from .external import AdaptedLayer, apply_bottleneck, make_projections
from .weight_storage import fit_for_changes, refuse_offloaded, stored


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
        self.prepared_for: Any = None  # the compiled forward that may use what was prepared
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
        width: int,
    ) -> None:
        """Add an adapter.

        Args:
            adapter: The adapter.
            path: The layer's path in the model the adapter belongs to; task models that share a
                backbone may hold it under different names.
            parameters: Names of this layer's parameters whose entries may be selected.
            width: Width of the external adapter, 0 for none.
        """
        name, config = adapter.name, adapter.config
        self.adapters[name] = adapter
        for parameter in parameters:
            if adapter.pool is None:
                self._make_store(adapter)
            cast(Pool, adapter.pool).add(self.carrier(parameter), f"{path}.{parameter}")
        if width:
            down, up = make_projections(
                self.get_base_layer(), width, bias=config.external_bias, neutral=config.init_weights
            )
            self.sfa_down[name], self.sfa_up[name] = down, up
        self.mark_active(self.active_adapters, inference_mode=config.inference_mode)

    def _make_store(self, adapter: Adapter) -> None:
        """Hold an adapter's values and positions (of all its layers: this is the first)."""
        size, packed_size = adapter.record.internal, adapter.record.packed
        # PEFT casts the values to fp32 later, but leaves float64, of which a file would lose bits.
        narrow = self.base_weight.dtype.itemsize <= torch.float32.itemsize
        dtype = self.base_weight.dtype if narrow else torch.float32
        options = {"device": self.base_weight.device, "dtype": dtype}
        self.sfa_pool[adapter.name] = nn.Parameter(torch.zeros(size, **options))
        few = adapter.record.num_weights <= torch.iinfo(torch.int32).max
        options["dtype"] = torch.int32 if few else torch.int64
        self.sfa_slots[adapter.name] = torch.full((size,), -1, **options)
        if packed_size is not None:
            options["dtype"] = torch.uint8
            self.sfa_packed[adapter.name] = torch.zeros(packed_size, **options)
        adapter.make_pool(LayerStore(self, adapter.name))

    def carrier(self, parameter: str) -> Weight:
        """Return what carries the changes of a parameter."""
        if parameter not in self.weights:
            self.weights[parameter] = Weight(self, parameter)
        return self.weights[parameter]

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the base layer, with the entries of live adapters in it."""
        return cast(Tensor, getattr(self.get_base_layer(), name))

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight as it is stored (its first tensor where it has none)."""
        return next(stored(self.get_base_layer()))

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter changes this layer's parameters or output."""
        return (
            adapter_name in self.sfa_down
            or any(adapter_name in weight.slices for weight in self.weights.values())
            or any(adapter_name in weight.earlier for weight in self.weights.values())
        )

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base's dtype, which loses bits of a loaded fp32 adapter.
        target = device or self.base_weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container: Any = getattr(self, name)
            if adapter_name in container:
                item = container[adapter_name]
                tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
                if target.type != "meta" and not any(t.is_meta for t in tensors):
                    container[adapter_name] = item.to(target)

    # --- forward -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with selected weights and external adapters in effect."""
        if self.sfa_packed:
            self._finish_loading()
        if self.disable_adapters:
            return self._pretrained_forward(*args, **kwargs)
        names = self._effective_adapters()
        if not self._is_prepared():
            self._bring(names)
        out = self._base_forward(*args, **kwargs)
        for name in names:
            if name in self.sfa_down:
                out = apply_bottleneck(out, self.sfa_down[name], self.sfa_up[name])
        return out

    def _bring(self, names: list[str]) -> None:
        """Make the weights hold changes; SFAError while a graph is recorded and they do not."""
        if not torch.compiler.is_exporting() and not self._is_transformed():
            self.refresh(names)
        elif not all(weight.holds(names) for weight in self.weights.values()):
            raise SFAError(
                f"`{self.name}`: its weights do not hold the active adapters yet, and nothing can "
                "be written while torch.export or torch.func look at the model. Call "
                "model.eval() right before."
            )

    def _is_transformed(self) -> bool:
        compiling = torch.compiler.is_compiling()
        return not compiling and any(weight.is_stand_in for weight in self.weights.values())

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
        self.withdraw()
        return self.base_layer(*args, **kwargs)

    def _base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore
        if not torch.is_grad_enabled() or self.merged or recorded:
            return self.base_layer(*args, **kwargs)
        if self._is_transformed():
            names = self._effective_adapters()
            computed = {name: weight.computed(names) for name, weight in self.weights.items()}
            return torch.func.functional_call(self.base_layer, computed, args, kwargs)
        watched = {}
        for name, weight in self.weights.items():
            ready = weight.prepared if self._is_prepared() else None
            taps, stand_ins = self._taps(weight) if ready is None else ready
            if taps:
                watched[name] = LiveWeight.apply(self.parameter(name), taps, *stand_ins)
        if not watched:
            return self.base_layer(*args, **kwargs)
        # By name and not F.linear: any layer type and the hooks on it keep working.
        return torch.func.functional_call(self.base_layer, watched, args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise SFAError(
            "nn.DataParallel (the Trainer's way with several GPUs) copies the model, and copies "
            "would share one adapter's state. Start one process per GPU: torchrun "
            "--nproc_per_node N script.py; or show it one GPU: CUDA_VISIBLE_DEVICES=0."
        )

    @eager  # a cut is kept between forwards, so no graph may own it
    def _taps(self, weight: Weight) -> tuple[list[Tap], list[Tensor]]:
        for name in weight.live if self.training else ():
            if name in self.adapters:
                self.adapters[name].watch(weight)
        return weight.taps()

    def _is_prepared(self) -> bool:
        """Whether this is a compiled forward that may use what `prepare` found."""
        compiled_pass = self.prepared_for
        return torch.compiler.is_compiling() and compiled_pass is not None and compiled_pass.is_open

    def prepare(self, compiled_pass: Any) -> None:
        """Do outside a compiled graph what its forward cannot: write weights, look up taps."""
        usable = not (self.merged or self.disable_adapters)
        self.prepared_for = compiled_pass if usable else None
        if usable:
            self.refresh(self._effective_adapters())
            tapped = torch.is_grad_enabled()
            for weight in self.weights.values():
                weight.prepared = self._taps(weight) if tapped else ([], [])

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
        self.prepared_for = None
        for weight in self.weights.values():
            weight.withdraw()

    @property
    def in_graph(self) -> bool:
        """Whether a backward that needs the parameters as they are may still come."""
        return any(weight.in_graph for weight in self.weights.values())

    def _write_active(self) -> None:
        self.prepared_for = None
        self.refresh(self._effective_adapters(), keep=True)

    def _switch(self, action: Callable[[], None]) -> None:
        weight = self.base_weight
        if self.weights and not weight.is_meta:
            alone = not weight.is_cpu or any(w.shard for w in self.weights.values())
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
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def act_at_once(self, adapter_names: list[str]) -> None:
        """Activate adapters and write what they change; what is trainable is left alone."""
        self._active_adapter = list(adapter_names)
        self._write_active()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off computes with the pretrained weight, to the bit."""
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
        if self.merged or self.disable_adapters:
            return list(self.merged_adapters)
        return [name for name in self.active_adapters if self.has_adapter(name)]

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
        if safe_merge:
            for name in names:
                self._check_finite(name)
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

    def _check_finite(self, name: str) -> None:
        tensors: list[Tensor] = []
        if name in self.sfa_down:
            tensors += [*self.sfa_down[name].parameters(), *self.sfa_up[name].parameters()]
        tensors += [w.slices[name].change() for w in self.weights.values() if name in w.slices]
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            )

    def unload(self) -> nn.Module:
        """Return what stands in the wrapper's place afterwards: the base layer, merged or not."""
        base = self.get_base_layer()
        if not self.merged:
            self.withdraw()
            return base
        kept = [
            (self.sfa_down[a], self.sfa_up[a]) for a in self.merged_adapters if a in self.sfa_down
        ]
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
        for name in self.sfa_packed:
            state.pop(f"{start}sfa_pool.{name}", None)
            state.pop(f"{start}sfa_slots.{name}", None)
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
            of = f"of {weight.tensor.numel()} in {parameter} selected"
            counts = {n: sum(b - a for a, b in part.spans) for n, part in weight.slices.items()}
            parts += [f"{name}: {count} {of}" for name, count in counts.items()]
        for name, down in self.sfa_down.items():
            parts.append(f"{name}: width {down.weight.shape[0]}")  # pyright: ignore
        return ", ".join(parts)
