# SPDX-License-Identifier: Apache-2.0
"""Dense training of all candidates inside a round, for a score that is dense (Eq. 4).

Inside a round every weight that may be selected trains with an optimizer like the user's. At its
end those that moved furthest are selected, and all return to their pretrained values.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import SelectionError
from ..sparse.optimizer import (
    LR_RATIOS,
    add_decay,
    inner_optimizer,
    is_decoupled,
    ratios_by_weight,
)
from ..sparse.pool import Pool
from .accumulators import Accumulator


class Candidates:
    """The change of every weight that may be selected, and an optimizer for it.

    Costs what full fine-tuning costs: for each weight a change, the pretrained value, a gradient
    and the optimizer's state.

    Args:
        pool: Its selected entries are left to it.
        accumulators: One per tensor of the pool, of a dense score: they hold the changes and bring
            the gradient of an update step.
    """

    def __init__(self, pool: Pool, accumulators: Sequence[Accumulator]) -> None:
        self.pool, self.accumulators = pool, accumulators
        self.changes = [a.change for a in accumulators if a.change is not None]
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] | None = None

    def attach(self) -> None:
        """Let the next forward write weights with the changes, and picks rank them."""
        for ordinal, change in enumerate(self.changes):
            self.accumulators[ordinal].state = change.detach()
            self.pool.weights[ordinal].candidates[self.pool.adapter_name] = change.detach()
        self.pool.withdraw()

    def step(self, optimizer: Any) -> None:
        """Make the step that the user's optimizer would have made on every candidate."""
        group = self.pool.group_of(optimizer) if optimizer is not None else None
        if group is None:
            raise SelectionError(
                'score="weight_difference" trains all candidates with an optimizer like yours: '
                "call SFASelector.step(optimizer), with one of torch's optimizers."
            )
        if self._optimizer is None:
            self._optimizer = _like(inner_optimizer(optimizer), self.changes)
            if self._saved:  # the settings are those of the user's optimizer, at each step
                own = self._optimizer.state_dict()
                self._optimizer.load_state_dict(own | {"state": self._saved["state"]})
        settings = {k: v for k, v in group.items() if k not in ("params", LR_RATIOS)}
        rates = [float(group["lr"]) * ratio for ratio in ratios_by_weight(self.pool, group)]
        for own, rate in zip(self._optimizer.param_groups, rates, strict=True):
            own.update(settings, lr=rate)
        decay = settings.get("weight_decay", 0) if self.pool.decay_weight else 0
        coupled = not is_decoupled(inner_optimizer(optimizer), settings)
        self.pool.withdraw()  # so that weights are the pretrained ones
        weights = [
            self.pool.weights[i].scored(self.pool.adapter_name).detach()
            for i in range(len(self.changes))
        ]
        for change, weight in zip(self.changes, weights, strict=True):
            if decay and coupled:
                add_decay(change, weight, settings)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for ordinal, (change, weight) in enumerate(zip(self.changes, weights, strict=True)):
                if decay and not coupled:
                    change.sub_(weight, alpha=rates[ordinal] * decay)
                selected = self.pool.slices[ordinal].indices().to(change.device)
                change.view(-1).index_fill_(0, selected, 0)

    def restart(self) -> None:
        """Begin a round: the changes are zero again, and so is the optimizer's state."""
        self._optimizer, self._saved = None, None
        self.pool.withdraw()

    def remove(self) -> None:
        """End the dense training: weights hold pretrained values and selected changes only."""
        self.pool.withdraw()
        for ordinal, change in enumerate(self.changes):
            candidates = self.pool.weights[ordinal].candidates
            mine = candidates.get(self.pool.adapter_name)
            if mine is not None and mine.data_ptr() == change.data_ptr():
                del candidates[self.pool.adapter_name]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state (the changes are the accumulators' states)."""
        return self._optimizer.state_dict() if self._optimizer else {}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up the optimizer's state at the next step."""
        self._optimizer, self._saved = None, state or None


def _like(optimizer: Any, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return a fresh optimizer of the same kind and settings, with a group for each parameter."""
    accepted = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    try:
        return type(optimizer)([{"params": [p]} for p in parameters], **options)
    except (TypeError, ValueError) as error:
        raise SelectionError(
            f'score="weight_difference": cannot make a second {type(optimizer).__name__} for the '
            f"candidates ({error}). Use one of torch.optim's, or another score."
        ) from error
