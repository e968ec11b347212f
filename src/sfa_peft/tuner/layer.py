# SPDX-License-Identifier: Apache-2.0
"""`SFALayer`: a layer with the sparse change of its parameters and its external adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import SFAWarning
from .delta import LiveWeight, Tap
from .external import AdaptedLayer, apply_bottleneck, make_projections
from .live import CompiledPass, LiveEntries, eager
from .pool import Pool

#: Training forwards with nothing selected after which a missing selector is reported.
_PATIENCE = 3


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
        self.entries: dict[str, LiveEntries] = {}  # by name of the base layer's parameter
        self.prepared_for: CompiledPass | None = None  # whose forward may use what was prepared
        self.resolved: dict[str, dict[str, Any]] = {}  # by adapter: what its budget was solved to
        kind = "channels" if isinstance(base_layer, nn.Conv2d) else "features"
        self.in_features = getattr(base_layer, f"in_{kind}", None)
        self.out_features = getattr(base_layer, f"out_{kind}", None)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the base layer, with the entries of live adapters in it."""
        return cast(Tensor, getattr(self.get_base_layer(), name))

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight (its first parameter where it has none of that name)."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return next(self.get_base_layer().parameters()) if weight is None else weight

    # --- building ------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: SFAConfig,
        *,
        pool: Pool | None,
        pool_size: int,
        parameters: Sequence[str],
        width: int,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: The adapter.
            config: Its configuration.
            pool: The adapter's pool, None where it changes no pretrained weight of the model.
            pool_size: Length of the pool; the first layer with a parameter to change holds it.
            parameters: Names of this layer's parameters whose entries may be selected.
            width: Width of the external adapter, 0 for none.
        """
        weight = self.base_weight
        for parameter in parameters:
            if pool is None:
                break
            ordinal = pool.add_tensor(self, parameter)
            entries = self.entries.setdefault(parameter, LiveEntries())
            entries.pools[adapter_name] = (pool, ordinal)
            if ordinal == 0:
                device, dtype = weight.device, weight.dtype  # PEFT casts to fp32 later
                self.sfa_pool[adapter_name] = nn.Parameter(
                    torch.zeros(pool_size, device=device, dtype=dtype)
                )
                self.sfa_slots[adapter_name] = torch.full(
                    (pool_size,), -1, dtype=torch.int64, device=device
                )
        if width:
            down, up = make_projections(
                self.get_base_layer(), width, bias=config.external_bias, neutral=config.init_weights
            )
            self.sfa_down[adapter_name], self.sfa_up[adapter_name] = down, up
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base's dtype, which loses bits of a loaded fp32 adapter.
        target = device or self.base_weight.device
        containers: list[Any] = [self.sfa_pool, self.sfa_slots, self.sfa_down, self.sfa_up]
        for container in containers:
            if adapter_name in container:
                item = container[adapter_name]
                tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
                if target.type != "meta" and not any(t.is_meta for t in tensors):
                    container[adapter_name] = item.to(target)

    # --- forward -------------------------------------------------------------------------------

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter changes this layer's parameters or output."""
        return self.find_pool(adapter_name) is not None or adapter_name in self.sfa_down

    def find_pool(self, adapter_name: str) -> Pool | None:
        """Return the pool of an adapter's change of this layer, None if it has none."""
        pools = (e.pools[adapter_name][0] for e in self.entries.values() if adapter_name in e.pools)
        return next(pools, None)

    def _effective_adapters(self) -> list[str]:
        """Names whose change and external adapter act now."""
        if self.merged:
            return list(self.merged_adapters)
        return (
            []
            if self.disable_adapters
            else [a for a in self.active_adapters if self.has_adapter(a)]
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with selected weights and external adapters in effect."""
        if self.disable_adapters:
            return self._pretrained_forward(*args, **kwargs)
        names = self._effective_adapters()
        if not self._is_prepared():
            self.refresh(names)
        out = self._base_forward(*args, **kwargs)
        for name in names:
            if name in self.sfa_down:
                out = apply_bottleneck(out, self.sfa_down[name], self.sfa_up[name])
        return out

    def refresh(self, names: list[str]) -> None:
        """Make the base layer's parameters hold the changes of the named adapters."""
        for parameter, entries in self.entries.items():
            entries.refresh(self.parameter(parameter), names)

    @property
    def in_graph(self) -> bool:
        """Whether a backward that needs the parameters as they are may still come."""
        return any(entries.in_graph for entries in self.entries.values())

    def _pretrained_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            self.unmerge()
        if self.in_graph:
            # A forward whose backward may still come used the weight as it is: leave it alone.
            originals = {n: e.original(self.parameter(n)) for n, e in self.entries.items()}
            return torch.func.functional_call(self.base_layer, originals, args, kwargs)
        self.withdraw()
        return self.base_layer(*args, **kwargs)

    def _base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled() or self.merged:
            return self.base_layer(*args, **kwargs)
        watched = {}
        for parameter, entries in self.entries.items():
            if self._is_prepared():
                taps, slices = entries.prepared
            else:
                taps, slices = self._taps(entries)
            if taps:
                watched[parameter] = LiveWeight.apply(self.parameter(parameter), taps, *slices)
        if not watched:
            return self.base_layer(*args, **kwargs)
        # By name and not F.linear: any layer type and the hooks on it keep working.
        return torch.func.functional_call(self.base_layer, watched, args, kwargs)

    @eager  # a cut is kept between forwards, so no graph may own it
    def _taps(self, entries: LiveEntries) -> tuple[list[Tap], list[Tensor]]:
        for name in entries.live:
            self._watch(*entries.pools[name])
        return entries.taps()

    def _is_prepared(self) -> bool:
        """Whether this is a compiled forward that may use what `prepare` found."""
        prepared_for = self.prepared_for
        return torch.compiler.is_compiling() and prepared_for is not None and prepared_for.is_open

    def prepare(self, compiled_pass: CompiledPass) -> None:
        """Do outside a compiled graph what its forward cannot: write weights, look up taps."""
        usable = not (self.merged or self.disable_adapters)
        self.prepared_for = compiled_pass if usable else None
        if usable:
            self.refresh(self._effective_adapters())
            for entries in self.entries.values():
                entries.prepared = self._taps(entries) if torch.is_grad_enabled() else ([], [])

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

    def withdraw(self) -> None:
        """Put the original entries back into the parameters, to the bit."""
        self.prepared_for = None
        for parameter, entries in self.entries.items():
            entries.withdraw(self.parameter(parameter))

    def _forget(self) -> None:
        for entries in self.entries.values():
            entries.forget()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; the next forward writes what they change."""
        before = self.active_adapters
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if not self.merged and self.active_adapters != before:
            self.withdraw()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off computes with the pretrained weight, to the bit."""
        super().enable_adapters(enabled)
        if not self.merged and not self.in_graph:
            self.withdraw()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the layer."""
        self.withdraw()
        super().delete_adapter(adapter_name)
        for entries in self.entries.values():
            entries.remove(adapter_name)
        self.resolved.pop(adapter_name, None)

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
            self.refresh(self.merged_adapters)

    def unmerge(self) -> None:
        """Put the original entries back, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.withdraw()

    def _check_finite(self, name: str) -> None:
        tensors: list[Tensor] = []
        if name in self.sfa_down:
            tensors += [*self.sfa_down[name].parameters(), *self.sfa_up[name].parameters()]
        for entries in self.entries.values():
            if name in entries.pools:
                pool, ordinal = entries.pools[name]
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
        kept = [
            (self.sfa_down[a], self.sfa_up[a]) for a in self.merged_adapters if a in self.sfa_down
        ]
        return AdaptedLayer(base, kept) if kept else base

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like any module's, with the original entries in the base layer unless merged."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "") + "base_layer."
        for parameter, entries in self.entries.items():
            if entries.live and not self.merged and prefix + parameter in state:
                state[prefix + parameter] = entries.original(self.parameter(parameter))
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # What is loaded next are original weights: take ours out before, look at them anew after.
        self.withdraw()
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SFALayer:
        self.withdraw()
        self._forget()
        super()._apply(fn, recurse)
        if self.merged:
            self.refresh(self.merged_adapters)
        return self

    def extra_repr(self) -> str:
        """Name the role, and per adapter how many weights are selected."""
        parts = [f"role={self.role}"]
        for parameter, entries in self.entries.items():
            numel = self.parameter(parameter).numel()
            for name, (pool, ordinal) in entries.pools.items():
                parts.append(f"{name}: {pool.count(ordinal)} of {numel} in {parameter} selected")
        for name, down in self.sfa_down.items():
            parts.append(f"{name}: width {down.weight.shape[0]}")  # pyright: ignore
        return ", ".join(parts)
