# SPDX-License-Identifier: Apache-2.0
"""Where a pool's two tensors lie: the protocol, and a place of their own beside any module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .delta import Delta
from .weight import Weight


class Store(Protocol):
    """Where a pool's two tensors lie, and whether they are still there."""

    # ruff: disable[D102]
    @property
    def values(self) -> Any: ...
    @property
    def slots(self) -> Tensor: ...
    @property
    def is_there(self) -> bool: ...
    @property
    def places(self) -> Sequence[tuple[dict[str, Any], str]]: ...

    # ruff: enable[D102]


class OwnStore:
    """Values and slots that never train and are in no module and no file.

    Args:
        deltas: The change of each weight, in the order of positions.
        starts: First position of each weight, and the end.
        weight: Whose device they follow: no module moves what is no part of it.
    """

    is_there = True
    places = ()  # nobody else can write them

    def __init__(self, deltas: Sequence[Delta], starts: Sequence[int], weight: Weight) -> None:
        positions = [d.indices + start for d, start in zip(deltas, starts, strict=False)]
        few = starts[-1] <= torch.iinfo(torch.int32).max
        self._slots = torch.cat(positions).to(torch.int32 if few else torch.int64)
        self._values = torch.cat([delta.change for delta in deltas]).float()
        self._weight = weight

    @property
    def values(self) -> Tensor:
        """The change of each weight, float32 (size,), without a gradient."""
        self._follow()
        return self._values

    @property
    def slots(self) -> Tensor:
        """Position of each value, int32 or int64 (size,)."""
        self._follow()
        return self._slots

    def _follow(self) -> None:
        device = self._weight.tensor.device
        if self._values.device != device and device.type != "meta":
            self._values, self._slots = self._values.to(device), self._slots.to(device)
