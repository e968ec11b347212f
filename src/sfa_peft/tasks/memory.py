# SPDX-License-Identifier: Apache-2.0
"""What one task costs in memory beside the backbone that all share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..tuner.adapted_layers import adapter_layers, find_pool


@dataclass(frozen=True)
class TaskMemory:
    """Bytes of one task.

    Attributes:
        values: Changes of the selected weights.
        positions: Where they belong.
        external: External adapters.
        head: Everything of the task model outside the shared backbone.
        switching: What is kept to switch fast: original entries and positions by weight. It is made
            when the task is activated for the first time. What leads from one task to another in
            one pass is neither's: `limit_switch_memory` bounds it for all together.
    """

    values: int
    positions: int
    external: int
    head: int
    switching: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.values + self.positions + self.external + self.head + self.switching


def measure(model: nn.Module, name: str, shared: nn.Module) -> TaskMemory:
    """Return what a task costs beside the shared backbone.

    Args:
        model: The task's model.
        name: Its adapter.
        shared: The backbone, with the adapters of all tasks in it.
    """
    pool = find_pool(model, name)
    values = positions = 0
    switching: list[Tensor] = []
    external: list[Tensor] = []
    own_parts: list[Tensor] = []
    if pool is not None:
        values, positions = pool.values.nbytes, pool.slots.nbytes
        own_parts += [pool.values, pool.slots]
    for layer in adapter_layers(model, name):
        if name in layer.sfa_down:
            external += [*layer.sfa_down[name].parameters(), *layer.sfa_up[name].parameters()]
        for entries in layer.weights.values():
            switching += entries.kept(name)
    # The adapter may also change layers of the head: count nothing twice.
    counted = {id(t) for t in [*own_parts, *external, *tensors_of(shared)]}
    head = [t for t in tensors_of(model) if id(t) not in counted]
    # Entries of all weights may lie in one piece of memory, of which each has its part.
    pieces = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in switching)}
    kept = sum(pieces.values())
    return TaskMemory(values, positions, count_bytes(external), count_bytes(head), kept)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum({id(t): t.nbytes for t in tensors}.values())
