# SPDX-License-Identifier: Apache-2.0
"""`SFASelector`: grows an adapter's selection while a training loop runs (Alg. 1)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..config import SFAConfig
from ..errors import SelectionError
from ..selection.schedule import Schedule, make_schedule
from ..selection.scores import (
    AccumulatedGradient,
    gather_sums,
    non_finite,
    reduce_over_ranks,
    scatter_sums,
)
from ..selection.topk import streaming_topk
from ..tuner.delta import Pool
from ..tuner.model import find_pool
from .late_entries import correct_late_entries, supports_late_entries, torch_optimizer

logger = logging.getLogger(__name__)


class SFASelector:
    """The state of one run: counts update steps, scores, and picks at the end of each round.

    Call `step` once after every `optimizer.step()`, before the learning rate and the gradients
    change::

        selector = SFASelector(model, total_steps=T)
        loss.backward(); optimizer.step(); selector.step(optimizer); optimizer.zero_grad()

    Where nothing is to be selected while training (external adapters only, a score that needs no
    data, or a finished selection that trains on) it does nothing, and `schedule` is None.

    Args:
        model: A model with an SFA adapter (also inside DistributedDataParallel).
        total_steps: T, update steps of the run; None takes it from the config.
        adapter_name: The adapter; None for the active one.

    Raises:
        SelectionError: If there is no such adapter, T is unknown, or no pick fits into T.
    """

    def __init__(
        self, model: nn.Module, *, total_steps: int | None = None, adapter_name: str | None = None
    ) -> None:
        inner = model if hasattr(model, "peft_config") else getattr(model, "module", model)
        self.adapter_name = adapter_name or _active_adapter(inner)
        self.config = _config(inner, self.adapter_name)
        self.pool = find_pool(inner, self.adapter_name)
        self._run: _Run | None = None
        self._warned = False
        if self.pool is None or not self.config.selects_while_training:
            return
        self.pool.needs_selector = False
        if self.pool.is_empty:
            total = self.config.total_steps if total_steps is None else total_steps
            size = self.pool.values.numel()
            schedule = make_schedule(total, self.config.selection_steps, size)
            self._run = _Run(self.adapter_name, self.pool, schedule)
            self._run.observe()

    @property
    def schedule(self) -> Schedule | None:
        """The picks of the run; None where nothing is selected while training."""
        return self._run.schedule if self._run else None

    @property
    def update_steps(self) -> int:
        """Update steps counted so far."""
        return self._run.update_steps if self._run else 0

    @property
    def selected(self) -> int:
        """Number of pretrained weights selected so far."""
        return 0 if self.pool is None else self.pool.num_assigned

    @property
    def selected_share(self) -> float:
        """Share of the weights to select that are selected so far, 0 to 1."""
        return 1.0 if self.pool is None else self.selected / self.pool.values.numel()

    @property
    def round(self) -> int:
        """Number of the present round, from 1; 0 where nothing is selected while training."""
        if self._run is None:
            return 0
        schedule = self._run.schedule
        return min(self.update_steps // schedule.selection_steps + 1, schedule.num_rounds)

    def step(self, optimizer: Any = None) -> bool:
        """Count one update step; pick at the end of a round.

        Args:
            optimizer: The optimizer that just stepped. A call after which it did not really step
                (inside Accelerate's `accumulate`, or skipped by a gradient scaler) does not count.
                With Adam or AdamW, weights that joined late get the bias correction of their own
                age. None counts every call and leaves the correction out.

        Returns:
            Whether this step ended with a pick.

        Raises:
            SelectionError: If the optimizer does not train the adapter's values, or at a pick no
                gradient has arrived or too few weights have a finite one.
        """
        if self._run is not None:
            return self._run.step(optimizer)
        self._warn_of_unfinished_selection()
        return False

    def _warn_of_unfinished_selection(self) -> None:
        """Say once that an adapter from the middle of a run goes on without its selector state."""
        if self._warned or self.pool is None:
            return
        self._warned = True
        if 0 < self.selected < self.pool.values.numel():
            logger.warning(
                "Adapter `%s` comes from an unfinished run: %d of %d weights are selected, and no "
                "more will be. Call load_state_dict with the selector state of that run to go on.",
                self.adapter_name,
                self.selected,
                self.pool.values.numel(),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the adapter's own tensors.

        `update_steps`, the schedule, and the present round's sums over all ranks (fp32, one per
        eligible weight, not copied on a single process; empty after the last pick). Under
        torch.distributed every rank must call it.
        """
        return self._run.state_dict() if self._run else {}

    def close(self) -> None:
        """End the run, also before its last pick: free the scores and select no more."""
        if self._run is not None:
            self._run.stop_observing()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the adapter's tensors must be loaded already.

        Raises:
            SelectionError: If the state belongs to another run or another adapter.
        """
        if not state or self.pool is None:
            return
        size = self.pool.values.numel()
        schedule = Schedule(int(state["total_steps"]), int(state["selection_steps"]), size)
        run = _Run(self.adapter_name, self.pool, schedule)
        run.load_state_dict(state)
        self._run = run


class _Run:
    """One growing selection: a pool, the schedule of its picks, and the scores of a round."""

    def __init__(self, adapter_name: str, pool: Pool, schedule: Schedule) -> None:
        self.adapter_name, self.pool, self.schedule = adapter_name, pool, schedule
        self.update_steps = 0
        self.optimizer_steps = pool.optimizer_steps
        self.accumulators: dict[str, AccumulatedGradient] = {}
        self.warned = False

    def observe(self) -> None:
        """Let every eligible layer add its weight's gradient to a score."""
        for name, layer in zip(self.pool.names, self.pool.layers, strict=True):
            accumulator = AccumulatedGradient(layer.base_weight)
            self.accumulators[name] = layer.entries.observers[self.adapter_name] = accumulator

    def stop_observing(self) -> None:
        """Free the scores (not those of a selector that took over)."""
        for name, layer in zip(self.pool.names, self.pool.layers, strict=True):
            observers = layer.entries.observers
            if observers.get(self.adapter_name) is self.accumulators.get(name):
                observers.pop(self.adapter_name, None)
        self.accumulators.clear()

    def step(self, optimizer: Any) -> bool:
        """See `SFASelector.step`."""
        if optimizer is not None and not self._has_stepped(torch_optimizer(optimizer)):
            return False
        self.update_steps += 1
        if optimizer is not None:
            self._correct(torch_optimizer(optimizer))
        if not self.schedule.is_pick(self.update_steps) or not self.accumulators:
            return False  # no accumulators before the last pick: closed
        self._pick()
        return True

    def _has_stepped(self, optimizer: Any) -> bool:
        """Whether the optimizer took a step since the last call."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            return True  # not torch's: its steps cannot be seen
        if not self.pool.is_trained_by(optimizer):
            raise SelectionError(
                f"The optimizer does not train the values of adapter `{self.adapter_name}`. Build "
                "it from the parameters with requires_grad of the wrapped model."
            )
        stepped = self.pool.optimizer_steps > self.optimizer_steps
        self.optimizer_steps = self.pool.optimizer_steps
        return stepped

    def _correct(self, optimizer: torch.optim.Optimizer) -> None:
        joined = self.schedule.joined(self.update_steps - 1)
        if joined and supports_late_entries(optimizer):
            correct_late_entries(optimizer, self.pool.values, joined, self.update_steps)
        elif joined and not self.warned:
            self.warned = True
            logger.warning(
                "%s: weights that join late get no bias correction of their own age; that is known "
                "for torch's Adam and AdamW only.",
                type(optimizer).__name__,
            )

    def _pick(self) -> None:
        """Admit the weights with the largest scores (Eq. 5, Alg. 1 lines 10 to 12)."""
        reduce_over_ranks(self.accumulators)
        if not any(bool(a.sum.any()) for a in self.accumulators.values()):
            raise SelectionError(
                f"Update step {self.update_steps}: no gradient has reached any weight that adapter "
                f"`{self.adapter_name}` may select. Is the adapter active and not merged, does "
                "another selector or callback drive it, or is gradient checkpointing on with "
                "use_reentrant=True (which needs use_reentrant=False)?"
            )
        for name in non_finite(self.accumulators):
            logger.warning("`%s`: gradients were NaN or infinite; those weights are skipped.", name)
        quota = self.schedule.selected_after(self.update_steps) - self.pool.num_assigned
        sums = [a.sum for a in self.accumulators.values()]
        selected = [self.pool.indices(i).sort().values for i in range(len(self.pool.layers))]
        self.pool.assign(streaming_topk(sums, quota, selected))
        logger.info("Step %d: %d weights selected.", self.update_steps, self.pool.num_assigned)
        if self.update_steps == self.schedule.last_pick:
            self.stop_observing()
        for accumulator in self.accumulators.values():
            accumulator.reset()

    def state_dict(self) -> dict[str, Any]:
        return {
            "update_steps": self.update_steps,
            "total_steps": self.schedule.total_steps,
            "selection_steps": self.schedule.selection_steps,
            "sums": gather_sums(self.accumulators),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update_steps = int(state["update_steps"])
        expected = self.schedule.selected_after(self.update_steps)
        if self.pool.num_assigned != expected:
            raise SelectionError(
                f"Adapter `{self.adapter_name}` has {self.pool.num_assigned} selected weights, but "
                f"after update step {self.update_steps} of this run it should have {expected}. "
                "Load adapter and selector state from the same checkpoint."
            )
        self.stop_observing()
        if self.update_steps < self.schedule.last_pick:
            self.observe()
        if set(state["sums"]) != set(self.accumulators):
            raise SelectionError(
                "The selector state holds scores of other layers than the model. Load adapter and "
                "selector state from the same checkpoint."
            )
        scatter_sums(self.accumulators, state["sums"])


def _active_adapter(model: nn.Module) -> str:
    active: Any = getattr(model, "active_adapter", None)
    if callable(active):  # transformers' own adapter mixin
        active = active()
    names = [active] if isinstance(active, str) else list(active or [])
    if not isinstance(getattr(model, "peft_config", None), dict):
        raise SelectionError(
            f"{type(model).__name__} has no SFA adapter. Wrap it first, and give the wrapped model "
            "here: get_peft_model(model, SFAConfig(...))."
        )
    if len(names) != 1:
        raise SelectionError(
            f"SFASelector needs one adapter to drive, but active are: {names}. Give adapter_name."
        )
    return names[0]


def _config(model: nn.Module, adapter_name: str) -> SFAConfig:
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, SFAConfig):
        raise SelectionError(
            f"The model has no SFA adapter named `{adapter_name}`. Wrap it first: "
            "get_peft_model(model, SFAConfig(...))."
        )
    return config
