# SPDX-License-Identifier: Apache-2.0
"""That weights hold what they should, remembered: asked by each layer in each forward.

To find it out takes longer than to see that nothing was written since, which is looked up where
the tensors themselves lie.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .weight import Weight

#: Where a tensor or module lies: a module's dict, and the name there.
Place = tuple[dict[str, Any], str]


class Settled:
    """What is known of a layer's weights.

    Attributes:
        names: The adapters whose changes they hold; None where that is not known.
    """

    def __init__(self) -> None:
        self.names: Sequence[str] | None = None
        self._home: tuple[dict[str, Any], str, Any] = ({}, "", None)
        self._weights: list[tuple[Weight, Any]] = []
        self._pools: list[tuple[Any, int, int]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int, int]] = []

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of a layer finds it out anew

    def forget(self) -> None:
        """Find it out anew next time."""
        self.names = None

    def remember(self, names: Sequence[str], weights: Collection[Weight], home: Place) -> None:
        """Take down that weights hold changes, unless more than writes can change that.

        Args:
            names: The adapters whose changes they hold now.
            weights: All weights of a layer.
            home: Where their module lies.
        """
        self.names = None
        if any(weight.candidates or weight.earlier or weight.shard for weight in weights):
            return
        slices: list[Any] = [w.slices[name] for w in weights for name in names if name in w.slices]
        pools = dict.fromkeys(part.pool for part in slices)
        module: Any = home[0][home[1]]
        every = [(module._parameters, weight.parameter) for weight in weights]
        every += [place for pool in pools for place in pool.store.places]
        tensors = [(table, key, table.get(key)) for table, key in every]
        if not all(_tells_writes(tensor) for _, _, tensor in tensors):
            return
        self._tensors = [(*found, found[2]._version, found[2].data_ptr()) for found in tensors]
        self._weights = [(weight, weight.stamp) for weight in weights]
        self._pools = [(pool, pool.optimizer_steps, pool.foreign_writes) for pool in pools]
        self._home = (*home, module)
        self.names = names

    def look(self) -> Sequence[str] | None:
        """Return `names`; None where somebody has written or replaced anything since."""
        return self.names if self.names is not None and self._is_unwritten() else None

    def _is_unwritten(self) -> bool:
        modules, key, module = self._home
        if modules[key] is not module:
            return False
        for table, key, tensor, version, address in self._tensors:
            if (
                table.get(key) is not tensor
                or tensor._version != version
                or tensor.data_ptr() != address
            ):
                return False
        for weight, stamp in self._weights:
            if weight.stamp is not stamp or weight.candidates or weight.earlier:
                return False
        for pool, steps, writes in self._pools:
            if pool.optimizer_steps != steps or pool.foreign_writes != writes:
                return False
        return True


def _tells_writes(tensor: Any) -> bool:
    """Whether a tensor is a plain one with a counter of writes."""
    return type(tensor) in (Tensor, nn.Parameter) and not (tensor.is_inference() or tensor.is_meta)
