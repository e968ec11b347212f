# SPDX-License-Identifier: Apache-2.0
"""`SFALayer`: one wrapper for a linear or convolution, its sparse change and its external adapter.

Invariant: while `_live` is empty the base layer's weight holds the pretrained bits; otherwise it
differs from them only at the entries of the adapters named there, and `undo` can put them back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import SFAWarning
from .delta import LiveWeight, Pool, Spans, Tap, version
from .external import AdaptedLayer, apply_bottleneck, make_projections

#: Training forwards with nothing selected after which a missing selector is reported.
_PATIENCE = 3


@dataclass
class _Support:
    """One adapter's entries in one weight."""

    spans: Spans
    indices: Tensor  # int32, in slot order
    undo: Tensor  # the weight's original entries there, in its dtype


class SFALayer(nn.Module, BaseTunerLayer):
    """A layer whose selected weights and external adapter train while the rest stays frozen.

    Args:
        base_layer: An `nn.Linear` or `nn.Conv2d`.
        name: Path inside the model.
        role: Role of the layer in a transformer block, None if unknown.
        block: Ordinal of the block, None if unknown.
        stage: Hierarchical stage, None if unknown.
    """

    adapter_layer_names = ("sfa_pool", "sfa_down", "sfa_up")
    other_param_names = ("sfa_slots",)

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
        self.sfa_down = nn.ModuleDict()
        self.sfa_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._pools: dict[str, tuple[Pool, int]] = {}  # the pool and this layer's ordinal in it
        self._observers: dict[str, Callable[[Tensor], None]] = {}
        self._supports: dict[str, _Support] = {}
        self._live: tuple[str, ...] = ()
        self._stamp: tuple[Any, ...] | None = None
        self._weight_stamp: tuple[Any, ...] | None = None
        convolution = isinstance(base_layer, nn.Conv2d)
        self.in_features = base_layer.in_channels if convolution else base_layer.in_features
        self.out_features = base_layer.out_channels if convolution else base_layer.out_features

    # --- building ------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, config: SFAConfig, *, pool: Pool | None, pool_size: int, width: int
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: The adapter.
            config: Its configuration.
            pool: The adapter's pool if this layer's weights may be selected, else None.
            pool_size: Length of the pool; the first eligible layer holds it.
            width: Width of the external adapter, 0 for none.
        """
        base = self.get_base_layer()
        if pool is not None:
            ordinal = pool.add_layer(self.name, self)
            self._pools[adapter_name] = (pool, ordinal)
            if ordinal == 0:
                device, dtype = base.weight.device, base.weight.dtype  # PEFT casts to fp32 later
                self.sfa_pool[adapter_name] = nn.Parameter(
                    torch.zeros(pool_size, device=device, dtype=dtype)
                )
                self.sfa_slots[adapter_name] = torch.full(
                    (pool_size,), -1, dtype=torch.int64, device=device
                )
        if width:
            down, up = make_projections(
                base, width, bias=config.external_bias, neutral=config.init_weights
            )
            self.sfa_down[adapter_name], self.sfa_up[adapter_name] = down, up
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base's dtype, which loses bits of a loaded fp32 adapter.
        target = device or self.get_base_layer().weight.device
        meta = torch.device("meta")
        for container in (self.sfa_pool, self.sfa_slots, self.sfa_down, self.sfa_up):
            if adapter_name in container:
                item = container[adapter_name]
                tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
                if target != meta and not any(t.device == meta for t in tensors):
                    container[adapter_name] = item.to(target)

    # --- the sparse change in the live weight --------------------------------------------------

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self._pools or adapter_name in self.sfa_down

    def _effective_adapters(self) -> list[str]:
        """Names whose change and external adapter act now."""
        if self.merged:
            return list(self.merged_adapters)
        return [] if self.disable_adapters else [a for a in self.active_adapters if self._has(a)]

    def _refresh(self) -> None:
        """Make the weight hold what the effective adapters say; do nothing if it does."""
        wanted = tuple(a for a in self._effective_adapters() if a in self._pools)
        if self._current_stamp(wanted) == self._stamp:
            return
        with torch.inference_mode(False), torch.no_grad():
            self.withdraw()
            if self._weight_stamp != self._stamp_of_weight():
                self._supports.clear()  # somebody replaced or changed the weight
            weight = self.get_base_layer().weight
            for name in wanted:  # originals first: adapters may share entries
                self._support(name, weight)
            flat = weight.detach().view(-1)
            for position, name in enumerate(wanted):
                support = self._supports[name]
                if support.indices.numel():
                    index = support.indices.long()
                    start = flat.index_select(0, index) if position else support.undo
                    flat.index_copy_(0, index, self._adapted(name, support, start))
                self._pools[name][0].mark_live()
            self._live = wanted
            self._weight_stamp = self._stamp_of_weight()
            self._stamp = self._current_stamp(wanted)

    def _support(self, name: str, weight: Tensor) -> _Support:
        """Return an adapter's entries; the weight must hold the originals."""
        pool, ordinal = self._pools[name]
        spans = pool.layout()[ordinal]
        known = self._supports.get(name)
        if known is None or known.spans is not spans:
            parts = [pool.slots[a:b] for a, b in spans]
            empty = torch.empty(0, dtype=torch.int64)
            index = (torch.cat(parts) - pool.starts[ordinal] if parts else empty).to(weight.device)
            undo = weight.detach().view(-1).index_select(0, index)
            small = weight.numel() <= torch.iinfo(torch.int32).max
            known = _Support(spans, index.int() if small else index, undo)
            self._supports[name] = known
        return known

    def _adapted(self, name: str, support: _Support, start: Tensor) -> Tensor:
        """Return `start` (the entries' present values) with an adapter's change added in fp32."""
        values = self._pools[name][0].values.detach()
        parts = [values[a:b] for a, b in support.spans]
        change = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(start.device)
        return (start.float() + change).to(start.dtype)

    def withdraw(self) -> None:
        """Put the original entries back into the weight, to the bit."""
        if self._live:
            with torch.inference_mode(False), torch.no_grad():
                flat = self.get_base_layer().weight.detach().view(-1)
                for name in self._live:
                    support = self._supports[name]
                    if support.indices.numel():
                        flat.index_copy_(0, support.indices.long(), support.undo)
            self._live = ()
            self._weight_stamp = self._stamp_of_weight()
        self._stamp = None

    def _stamp_of_weight(self) -> tuple[Any, ...]:
        weight = self.get_base_layer().weight
        return id(weight), weight.dtype, weight.device, version(weight)

    def _current_stamp(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        stamp = [names, self._stamp_of_weight()]
        for name in names:
            pool, _ = self._pools[name]
            values, slots = pool.values, pool.slots
            stamp += [id(values), version(values), id(slots), version(slots)]
        return tuple(stamp)

    # --- forward -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with selected weights and external adapters in effect."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            self.withdraw()
            return self.base_layer(*args, **kwargs)
        self._refresh()
        out = self._base_forward(*args, **kwargs)
        for name in self._effective_adapters():
            if name in self.sfa_down:
                out = apply_bottleneck(out, self.sfa_down[name], self.sfa_up[name])
        return out

    def _base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        taps, slices = [], []
        if torch.is_grad_enabled() and not self.merged:
            for name in self._live:
                pool, ordinal = self._pools[name]
                self._watch(pool, ordinal)
                observer, support = self._observers.get(name), self._supports[name]
                if pool.values.requires_grad and (observer is not None or support.spans):
                    taps.append(Tap(support.indices, observer))
                    slices.append(pool.slices()[ordinal])
        if not taps:
            return self.base_layer(*args, **kwargs)
        weight = LiveWeight.apply(self.get_base_layer().weight, taps, *slices)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    def _watch(self, pool: Pool, ordinal: int) -> None:
        """Report once that a selection is being trained which nobody makes."""
        if ordinal or not (pool.needs_selector and self.training and pool.values.requires_grad):
            return
        if pool.idle_forwards < _PATIENCE and pool.is_empty:
            pool.idle_forwards += 1
            if pool.idle_forwards == _PATIENCE:
                warnings.warn(
                    f"Adapter `{pool.adapter_name}`: training goes on but nothing selects weights, "
                    "so only the external adapters and the head learn. Pass "
                    "callbacks=[SFACallback()] to the Trainer, or call SFASelector.step() after "
                    "each optimizer.step() in an own loop.",
                    SFAWarning,
                    stacklevel=2,
                )

    # --- switching, merging --------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if not self.merged:
            self.withdraw()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not self.merged:
            self.withdraw()

    def delete_adapter(self, adapter_name: str) -> None:
        self.withdraw()
        super().delete_adapter(adapter_name)
        for container in (self._pools, self._observers, self._supports):
            container.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the change of adapters in the weight until `unmerge`.

        External adapters cannot be folded into a weight: they stay in the forward.

        Args:
            safe_merge: Whether to check first that nothing becomes NaN or infinite.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If `safe_merge` finds a value that is not finite.
        """
        names = [a for a in check_adapters_to_merge(self, adapter_names) if self._has(a)]
        if safe_merge:
            for name in names:
                self._check_finite(name)
        self.merged_adapters.extend(names)
        if names:
            self._refresh()

    def unmerge(self) -> None:
        """Put the original entries back, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.withdraw()

    def _check_finite(self, name: str) -> None:
        tensors = [p for d in (self.sfa_down, self.sfa_up) if name in d for p in d[name].parameters()]
        if name in self._pools:
            pool, ordinal = self._pools[name]
            tensors += [pool.values[a:b] for a, b in pool.layout()[ordinal]]
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
        kept = [(self.sfa_down[a], self.sfa_up[a]) for a in self.merged_adapters if a in self.sfa_down]
        return AdaptedLayer(base, kept) if kept else base

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like any module's, with the original entries in the base weight unless merged."""
        state = super().state_dict(*args, **kwargs)
        key = kwargs.get("prefix", args[1] if len(args) > 1 else "") + "base_layer.weight"
        if self._live and not self.merged and key in state:
            original = self.get_base_layer().weight.detach().clone()
            for name in self._live:
                support = self._supports[name]
                original.view(-1).index_copy_(0, support.indices.long(), support.undo)
            state[key] = original
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # What is loaded next are original weights: take ours out before, look at them anew after.
        self.withdraw()
        self._supports.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SFALayer:
        self.withdraw()
        self._supports.clear()
        super()._apply(fn, recurse)
        if self.merged:
            self._refresh()
        return self

    def extra_repr(self) -> str:
        parts = [f"role={self.role}"]
        for name, (pool, ordinal) in self._pools.items():
            selected = sum(b - a for a, b in pool.layout()[ordinal])
            parts.append(f"{name}: {selected} of {self.get_base_layer().weight.numel()} selected")
        return ", ".join(parts)
