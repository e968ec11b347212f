# SPDX-License-Identifier: Apache-2.0
"""`SFASelector`: grows an adapter's selection while a training loop runs (Alg. 1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import SelectionError, UnfinishedSelectionWarning, warn
from ..selection.pick import is_unfinished
from ..selection.rounds import Rounds, check_same_weights
from ..selection.rules import SelectionRules, check_resumed
from ..selection.schedule import Schedule, make_schedule, share_by_rates
from ..selection.scores import find_score
from ..sparse.pool import Pool
from ..tuner.adapted_layers import find_adapter, refuse_reentrant_checkpointing
from ..tuner.adapter import Adapter
from ..tuner.layer import SFALayer
from ..tuner.report import stage_shares
from ..tuner.weight_storage import take_shards
from .planned_rates import planned_rates
from .state_files import check_state


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
        scaler: The gradient scaler of fp16 training (`accelerator.scaler`). Scores are unscaled,
            and a step that overflows counts neither as a step nor in a score.
        can_skip: Whether `skip` may be called. For scores that are plain sums, the default among
            them, it costs 4 bytes for each weight that may be selected until the last pick.
        lr_scheduler: The learning rate's scheduler, one step of which is made after each update
            step. Without `SFAConfig.select_until` the last pick is where a quarter of the rates'
            sum is left; not known, a linear decay is assumed, and it is half of the run.

    Raises:
        SelectionError: If there is no such adapter, T is unknown, no pick fits into T, the model is
            sharded by anything but FSDP2, or gradient checkpointing is of the reentrant kind.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        adapter_name: str | None = None,
        scaler: Any = None,
        can_skip: bool = False,
        lr_scheduler: Any = None,
    ) -> None:
        refuse_reentrant_checkpointing(model)
        self._model, self._scaler, self._can_skip = model, scaler, can_skip
        self._checked = False
        inner = model if hasattr(model, "peft_config") else getattr(model, "module", model)
        self._inner, self.adapter_name = inner, adapter_name or _active_adapter(inner)
        self._adapter = _find_adapter(inner, self.adapter_name)
        self.config, self.pool = self._adapter.config, self._adapter.pool
        self._asked = {
            "total_steps": self.config.total_steps if total_steps is None else total_steps,
            "selection_steps": self.config.selection_steps,
        }
        self._rounds: Rounds | _NoRounds = _NoRounds(self.pool, self.config.rules)
        if self.pool is None or not self.config.selects_while_training:
            return
        take_shards(model, [self.pool], selects=True)
        self._adapter.needs_selector = False
        if self.pool.is_empty:
            find_score(self.config.score)
            self._rounds = self._new_rounds(
                self._plan(self.config.rules, self.pool, lr_scheduler), self.pool
            )
            self._rounds.start()

    def _plan(self, rules: SelectionRules, pool: Pool, lr_scheduler: Any) -> Schedule:
        total, rates = self._asked["total_steps"], None
        if rules.select_until is None and isinstance(total, int):
            rates = planned_rates(lr_scheduler, total, pool.values)
        return make_schedule(
            **self._asked,
            quota=pool.size,
            kind=rules.schedule,
            select_until=rules.select_until,
            default_until=share_by_rates(rates),
        )

    def _new_rounds(self, schedule: Schedule, pool: Pool) -> Rounds:
        scaler = self._scaler
        scale = scaler.scale if scaler is not None and scaler.is_enabled() else None
        rules = replace(self.config.rules, select_until=schedule.select_until)
        return Rounds(rules, pool, schedule, scale, self._can_skip)

    @property
    def drives(self) -> bool:
        """Whether it makes the adapter's selection, and no other selector took over."""
        return self._rounds.drives

    @property
    def schedule(self) -> Schedule | None:
        """The picks of the run; None where nothing is selected while training."""
        return self._rounds.schedule

    @property
    def update_steps(self) -> int:
        """Update steps counted so far."""
        return self._rounds.update_steps

    @property
    def selected(self) -> int:
        """Number of pretrained weights selected so far (asks no device between two picks)."""
        return 0 if self.pool is None else self.pool.num_selected

    @property
    def selected_share(self) -> float:
        """Share of the weights to select that are selected so far, 0 to 1."""
        return 1.0 if self.pool is None else self.selected / self.pool.size

    @property
    def round(self) -> int:
        """Number of the present round, from 1; 0 where nothing is selected while training."""
        return self._rounds.round

    @property
    def progress(self) -> dict[str, str]:
        """Round and selected share for a progress bar: `bar.set_postfix(selector.progress)`.

        Empty where nothing is selected while training.
        """
        return self._rounds.progress

    def metrics(self) -> dict[str, float]:
        """Return how the selection stands, for a log or a tracker.

        Returns:
            `sfa_round`, `sfa_selected` (share of the weights to select, 0 to 1), for each stage of
            the backbone `sfa_share/stage1`, ... (share of the stage's weights that are selected),
            and of the last pick of this process `sfa_score/p50`, `p90`, `p99`, `max` (of the
            absolute scores that were compared, rounded down by less than 0.4 %) and `threshold`
            (the smallest that was admitted). Empty where nothing is selected while training.
        """
        found = self._rounds.metrics()
        if found and self.pool is not None:
            found |= {
                f"sfa_share/{s}": share
                for s, share in stage_shares(self._inner, self.adapter_name).items()
            }
        return found

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
            SelectionError: If the optimizer does not train the adapter's values, at a pick too few
                weights have a finite score, or another call of this was left out (with several
                processes) or came too early.
        """
        if self._rounds.schedule is not None and not self._checked:
            self._check_first_step(optimizer)
        counted = self.update_steps
        picked = self._rounds.step(optimizer)
        self._checked = self._checked or self.update_steps > counted
        return picked

    def skip(self) -> None:
        """Drop the gradients since the last update step, which the loop gives up.

        For a batch whose loss is not to count::

            if not loss.isfinite():
                selector.skip(); optimizer.zero_grad(); continue

        A gradient that is not finite counts in no score anyway.

        Raises:
            SelectionError: If they are in the sums already (see `can_skip`).
        """
        self._rounds.skip()

    def paused(self) -> AbstractContextManager[None]:
        """Leave out of the scores what belongs to no update step.

        Such as the backward of a probe's loss or of an adversarial step::

            with selector.paused():
                probe_loss.backward()
        """
        return self._rounds.paused()

    def _check_first_step(self, optimizer: Any) -> None:
        """Look at what may have been set up after the selector was made, until a step counts."""
        refuse_reentrant_checkpointing(self._model)
        inner = getattr(optimizer, "optimizer", optimizer)
        scale = getattr(inner, "loss_scale", 1)  # DeepSpeed's optimizers have it
        if self._scaler is None and isinstance(scale, (int, float)) and scale != 1:
            raise SelectionError(
                f"The loss is scaled by {type(inner).__name__}, {scale} times now, which scores do "
                "not know of: an overflow would count. Train in bf16, which needs no scale."
            )
        if self.pool is not None:
            take_shards(self._model, [self.pool], selects=True)
            scaled = getattr(getattr(optimizer, "scaler", None), "is_enabled", lambda: False)()
            if self._scaler is None and (scaled or self.pool.stepped_by_grad_scaler):
                raise SelectionError(
                    "The loss is scaled by a GradScaler, which scores must know of. Pass it: "
                    "SFASelector(model, scaler=scaler), with Accelerate scaler=accelerator.scaler."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the adapter's own tensors.

        `update_steps`, the schedule, the present round's sums over all ranks (one per eligible
        weight, not copied on a single process; empty after the last pick), and values and
        positions as they are in training, which the adapter's own file does not keep to the last
        bit and order. Under torch.distributed every rank must call it.
        """
        if self.pool is not None and not self.pool.store.is_there:
            raise SelectionError(
                f"Adapter `{self.adapter_name}` was deleted, and its selection with it. Make a new "
                "selector for another adapter."
            )
        return self._rounds.state_dict()

    def close(self) -> None:
        """End the run, also before its last pick: free the scores and select no more.

        A warning says so where the adapter holds fewer weights than the run was to select, or than
        it did select (an earlier state was loaded, such as the Trainer's best checkpoint).
        """
        self._rounds.close()

    def discard(self) -> None:
        """Free the scores without a word, before another selector begins anew."""
        self._rounds.stop()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the adapter's tensors must be loaded already.

        Raises:
            SelectionError: If the state belongs to another run or another adapter, or the
                selection was begun with other settings.
        """
        if not state or self.pool is None:
            return
        weights = zip(self.pool.names, self.pool.weights, strict=True)
        shapes = {name: weight.tensor.shape for name, weight in weights}
        check_state(state, shapes, self.config.rules.to_state()["settings"])
        if "update_steps" not in state:  # of a run that selected nothing
            _NoRounds(self.pool, self.config.rules).load_state_dict(state)
            return
        begun = check_resumed(state, self.config.rules, self._asked)
        schedule = Schedule(
            int(state["total_steps"]),
            int(state["selection_steps"]),
            self.pool.size,
            begun.schedule,
            begun.select_until,
        )
        self._rounds.stop()
        rounds = self._new_rounds(schedule, self.pool)
        rounds.load_state_dict(state)
        self._rounds = rounds


class _NoRounds:
    """What stands in the place of `Rounds` where nothing is selected while training.

    Args:
        pool: The pool as it is; None where the adapter has none.
        rules: Those of the adapter.
    """

    schedule, update_steps, round, drives = None, 0, 0, False

    def __init__(self, pool: Pool | None, rules: SelectionRules) -> None:
        self.pool, self.rules = pool, rules
        self._warned = False

    @property
    def progress(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def step(self, _optimizer: Any = None) -> bool:
        """Say once that an adapter from the middle of a run goes on without its selector state."""
        if self.pool is None or self._warned:
            return False
        self._warned = True
        selected = self.pool.num_selected
        if selected and is_unfinished(self.pool, self.rules):
            warn(
                f"Adapter `{self.pool.adapter_name}` comes from an unfinished run: {selected} of "
                f"{self.pool.size} weights are selected, and no more will be. Call load_state_dict "
                "with the selector state of that run to go on.",
                UnfinishedSelectionWarning,
            )
        return False

    def stop(self) -> None:
        """Free nothing."""

    close = skip = stop

    def paused(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return values and positions, which the adapter's file does not keep to the last bit."""
        return {} if self.pool is None else {"pool": self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; the adapter's files are loaded already."""
        if self.pool is not None and state:
            check_same_weights(self.pool, state)
            self.pool.load_state_dict(state["pool"])


def _active_adapter(model: nn.Module) -> str:
    """Return the name of the SFA adapter that is active in a model's layers.

    The layers know best: `PeftModel.active_adapter` does not hear of `base_model.set_adapter`, and
    a model with injected adapters has no such attribute.

    Raises:
        SelectionError: If there is no SFA adapter, or not exactly one is active.
    """
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    if not layers:
        raise SelectionError(
            f"{type(model).__name__} has no SFA adapter. Wrap it first, and give the wrapped model "
            "here: get_peft_model(model, SFAConfig(...))."
        )
    active = (name for m in layers for name in m.active_adapters if m.has_adapter(name))
    names = list(dict.fromkeys(active))
    if len(names) != 1:
        raise SelectionError(
            f"SFASelector needs one adapter to drive, but active are: {names}. Give adapter_name."
        )
    return names[0]


def _find_adapter(model: nn.Module, adapter_name: str) -> Adapter:
    """Return an adapter.

    Raises:
        SelectionError: If the model has no such SFA adapter.
    """
    adapter = find_adapter(model, adapter_name)
    if adapter is None:
        raise SelectionError(
            f"The model has no SFA adapter named `{adapter_name}`. Wrap it first: "
            "get_peft_model(model, SFAConfig(...))."
        )
    return adapter
