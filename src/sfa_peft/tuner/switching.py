# SPDX-License-Identifier: Apache-2.0
"""What an adapted layer does when adapters are switched, merged, deleted, saved, loaded or moved.

Original entries are always put back by overwriting, so every state is exact, whatever came before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..sparse.writing import now_or_together
from .external import AdaptedLayer
from .quantised import stored

if TYPE_CHECKING:
    from ..files.record import Resolved
    from ..sparse.pool import Pool
    from ..sparse.weight import CompiledPass, LiveEntries


class Switching(nn.Module, BaseTunerLayer):
    """The part of `SFALayer` that changes which adapters act."""

    entries: dict[str, LiveEntries]
    resolved: dict[str, Resolved]
    prepared_for: CompiledPass | None
    sfa_packed: BufferDict
    sfa_down: nn.ModuleDict
    sfa_up: nn.ModuleDict

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
            self.find_pool(adapter_name) is not None
            or adapter_name in self.sfa_down
            or any(adapter_name in entries.earlier for entries in self.entries.values())
        )

    def find_pool(self, adapter_name: str) -> Pool | None:
        """Return the pool of an adapter's change of this layer, None if it has none."""
        pools = (e.pools[adapter_name][0] for e in self.entries.values() if adapter_name in e.pools)
        return next(pools, None)

    def refresh(self, names: list[str], *, keep: bool = False) -> None:
        """Make the base layer's parameters hold the changes of the named adapters."""
        for parameter, entries in self.entries.items():
            entries.refresh(self.parameter(parameter), names, keep=keep)

    def _write_active(self) -> None:
        self.prepared_for = None
        self.refresh(self._effective_adapters(), keep=True)

    def _switch(self, action: Callable[[], None]) -> None:
        weight = self.base_weight
        if self.entries and not weight.is_meta:
            now_or_together(self, weight.numel() if weight.is_cpu else 0, action)

    @property
    def in_graph(self) -> bool:
        """Whether a backward that needs the parameters as they are may still come."""
        return any(entries.in_graph for entries in self.entries.values())

    def withdraw(self) -> None:
        """Put the original entries back into the parameters, to the bit."""
        self.prepared_for = None
        for parameter, entries in self.entries.items():
            entries.withdraw(self.parameter(parameter))

    def _forget(self) -> None:
        for entries in self.entries.values():
            entries.forget()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters.

        In eval mode what they change is written at once; in train mode by the next forward, since
        an optimizer may come first.
        """
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
        """Activate adapters for inference and write what they change, before any forward.

        Unlike `set_adapter` this leaves alone what is trainable, so its cost does not grow with the
        number of adapters.
        """
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
        for entries in self.entries.values():
            entries.remove(adapter_name)
        super().delete_adapter(adapter_name)
        self.resolved.pop(adapter_name, None)

    def _all_available_adapter_names(self) -> list[str]:
        # PEFT takes the first of these when the active adapter is deleted, and looks for it among
        # tensors; most layers hold none, since the pool is on the first one.
        pools = {name for entries in self.entries.values() for name in entries.pools}
        return sorted(pools.union(super()._all_available_adapter_names()))

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

    def _effective_adapters(self) -> list[str]:
        """Names whose change and external adapter act now."""
        if self.merged:
            return list(self.merged_adapters)
        return (
            []
            if self.disable_adapters
            else [a for a in self.active_adapters if self.has_adapter(a)]
        )

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like any module's, with the original entries in the base layer unless merged.

        Values and positions that wait to be unpacked are left out, so that a loader (transformers'
        own) does not miss them in a file that has them packed.
        """
        state = super().state_dict(*args, **kwargs)
        start = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self.sfa_packed:
            state.pop(f"{start}sfa_pool.{name}", None)
            state.pop(f"{start}sfa_slots.{name}", None)
        prefix = start + "base_layer."
        for parameter, entries in self.entries.items():
            if entries.live and not self.merged and prefix + parameter in state:
                state[prefix + parameter] = entries.original(self.parameter(parameter))
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # What is loaded next are original weights: take ours out before, look at them anew after.
        self.withdraw()
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.withdraw()
        self._forget()
        super()._apply(fn, recurse)
        if self.merged:
            self.refresh(self.merged_adapters)
        return self
