# SPDX-License-Identifier: Apache-2.0
"""Sparse changes of earlier adapters, which belong to the base of a later one and never train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import TargetError
from ..files.record import Link
from ..sparse.pool import Pool
from ..sparse.weight import LiveEntries
from .layer import SFALayer
from .plan import Plan
from .reading import SavedAdapter


class FrozenPool(Pool):
    """A pool whose values and positions are its own: no parameters of the model, in no file.

    Later adapters that build on the same earlier one share it.

    Args:
        name: What weights know it by; no adapter's name.
        num_weights: Number of weights of all its tensors together.
    """

    def __init__(self, name: str, *, num_weights: int) -> None:
        super().__init__(name, needs_selector=False, num_weights=num_weights)
        self._values, self._slots = torch.empty(0), torch.empty(0, dtype=self.slots_dtype)

    def fill(self, indices: Sequence[Tensor], changes: Sequence[Tensor]) -> None:
        """Take up the entries of all tensors, in the order these were added."""
        positions = [i + start for i, start in zip(indices, self.starts, strict=False)]
        self._slots = torch.cat(positions).to(self.slots_dtype)
        self._values = torch.cat(list(changes)).float()

    @property
    def size(self) -> int:
        """Number of values."""
        return self._values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self._values.dtype

    @property
    def values(self) -> Any:
        """The change of each weight, float32 (size,), without a gradient."""
        self._follow()
        return self._values

    @property
    def slots(self) -> Tensor:
        """Position of each value, (size,)."""
        self._follow()
        return self._slots

    def _follow(self) -> None:
        """Move to the first weight's device: no module moves what is no part of it."""
        device = self.weight(0).device
        if self._values.device != device and device.type != "meta":
            self._values, self._slots = self._values.to(device), self._slots.to(device)

    @property
    def packed(self) -> None:
        """Nothing waits to be unpacked."""
        return None


def put_on_chain(plan: Plan, chain: Sequence[SavedAdapter], config: SFAConfig) -> Plan:
    """Return a plan that wraps what earlier adapters change, too.

    Raises:
        TargetError: If `modules_to_save` takes a layer that they change.
    """
    if not chain:
        return plan
    changed = {name.rpartition(".")[0] for saved in chain for name in saved.selection}
    layers = {n: t for saved in chain for n, t in saved.plan.targets.items() if n in changed}
    for name in layers:
        if any(f".{module}." in f".{name}." for module in config.modules_to_save or ()):
            raise TargetError(
                f"The earlier adapter `{chain[-1].source}` changes `{name}`, which modules_to_save "
                "would train and save whole. Leave that out of modules_to_save."
            )
    links = plan.chain or [Link(a.source, a.digest) for a in chain]
    others = {
        n: replace(t, parameters={}, width=0) for n, t in layers.items() if n not in plan.targets
    }
    targets = dict(plan.targets) | others
    return replace(plan, targets=targets, chain=tuple(links), earlier=frozenset(layers))


def check_same_chain(
    reused: SavedAdapter | None, chain: Sequence[SavedAdapter], config: SFAConfig
) -> None:
    """Check that trained values of a saved selection are changes of the same base.

    Raises:
        TargetError: If they are not.
    """
    if reused is None or config.selection_values != "trained":
        return
    if [a.digest for a in reused.chain] != [a.digest for a in chain]:
        raise TargetError(
            f"selection_from={reused.source!r} with selection_values='trained': those values are "
            f"changes on top of {[a.source for a in reused.chain] or 'the plain backbone'}, here "
            f"the base is {[a.source for a in chain] or 'the plain backbone'}. Give the same "
            "continue_from, or selection_values='zero'."
        )


def attach_chain(model: nn.Module, adapter_name: str, chain: Sequence[SavedAdapter]) -> None:
    """Make earlier changes part of an adapter's base; the layers are wrapped already."""
    for saved in chain:
        name = f"earlier {saved.digest[:16]}"
        pool = _find_frozen(model, name) or _make_frozen(model, name, saved)
        for layer, parameter in pool.tensors:
            earlier = layer.entries[parameter].earlier
            earlier[adapter_name] = (*earlier.get(adapter_name, ()), name)


def _find_frozen(model: nn.Module, name: str) -> Pool | None:
    layers = (m for m in model.modules() if isinstance(m, SFALayer))
    return next((pool for layer in layers if (pool := layer.find_pool(name))), None)


def _make_frozen(model: nn.Module, name: str, saved: SavedAdapter) -> Pool:
    places = {}
    for tensor in saved.selection:
        path, _, parameter = tensor.rpartition(".")
        places[tensor] = model.get_submodule(path), parameter
    numel = sum(layer.parameter(parameter).numel() for layer, parameter in places.values())
    pool = FrozenPool(name, num_weights=numel)
    for tensor, (layer, parameter) in places.items():
        ordinal = pool.add_tensor(layer, parameter, tensor)
        layer.entries.setdefault(parameter, LiveEntries()).pools[name] = (pool, ordinal)
    pool.fill([i for i, _ in saved.selection.values()], [c for _, c in saved.selection.values()])
    return pool
