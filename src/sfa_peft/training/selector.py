# SPDX-License-Identifier: Apache-2.0
"""`SFASelector`: grows an adapter's selection while a training loop runs (Alg. 1)."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..analysis.stats import stage_shares
from ..errors import SelectionError
from ..selection.rounds import Run
from ..selection.rules import check_settings, settings_state
from ..selection.schedule import Schedule, make_schedule
from ..selection.scores import find_score
from ..selection.unfinished import is_unfinished
from ..tuner.model import find_pool
from .active import active_adapter, adapter_config
from .guards import refuse_reentrant_checkpointing, refuse_sharded
from .state_files import check_state

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
        scaler: The gradient scaler of fp16 training (`accelerator.scaler`). Scores are unscaled,
            and a step that overflows counts neither as a step nor in a score.

    Raises:
        SelectionError: If there is no such adapter, T is unknown, no pick fits into T, the model is
            sharded (FSDP, ZeRO-3), or gradient checkpointing is of the reentrant kind.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        adapter_name: str | None = None,
        scaler: Any = None,
    ) -> None:
        refuse_reentrant_checkpointing(model)
        self._model, self._scaler, self._checked = model, scaler, False
        self._total_steps = total_steps
        inner = model if hasattr(model, "peft_config") else getattr(model, "module", model)
        self.adapter_name = adapter_name or active_adapter(inner)
        self.config = adapter_config(inner, self.adapter_name)
        self.pool = find_pool(inner, self.adapter_name)
        self._run: Run | None = None
        self._warned = False
        if self.pool is None or not self.config.selects_while_training:
            return
        refuse_sharded(model, self.pool)
        self.pool.needs_selector = False
        if self.pool.is_empty:
            find_score(self.config.score)
            schedule = make_schedule(
                self.config.total_steps if total_steps is None else total_steps,
                self.config.selection_steps,
                self.pool.values.numel(),
                self.config.schedule,
                self.config.select_until,
            )
            self._run = self._new_run(schedule)
            self._run.start()

    def _new_run(self, schedule: Schedule) -> Run:
        scaler = self._scaler
        enabled = scaler is not None and scaler.is_enabled()
        return Run(self.config, self.pool, schedule, scaler.get_scale if enabled else None)  # pyright: ignore

    @property
    def drives(self) -> bool:
        """Whether it makes the adapter's selection, and no other selector took over."""
        return self._run is not None and self._run.pool.driver is self._run

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
        """Number of pretrained weights selected so far (asks no device between two picks)."""
        if self.pool is None:
            return 0
        return sum(self.pool.count(i) for i in range(len(self.pool.tensors)))

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

    @property
    def progress(self) -> dict[str, str]:
        """Round and selected share for a progress bar: `bar.set_postfix(selector.progress)`.

        Empty where nothing is selected while training.
        """
        if self._run is None:
            return {}
        rounds = f"{self.round}/{self._run.schedule.num_rounds}"
        return {"round": rounds, "selected": f"{self.selected_share:.1%}"}

    def metrics(self) -> dict[str, float]:
        """Return how the selection stands, for a log or a tracker.

        Returns:
            `sfa_round`, `sfa_selected` (share of the weights to select, 0 to 1), for each stage of
            the backbone `sfa_share/stage1`, ... (share of the stage's weights that are selected),
            and of the last pick of this process `sfa_score/p50`, `p90`, `p99`, `max` (of the
            absolute scores that were compared, rounded down by less than 0.4 %) and `threshold`
            (the smallest that was admitted). Empty where nothing is selected while training.
        """
        if self._run is None or self.pool is None:
            return {}
        found: dict[str, float] = {"sfa_round": self.round, "sfa_selected": self.selected_share}
        found |= {f"sfa_share/{stage}": share for stage, share in stage_shares(self.pool).items()}
        return found | {f"sfa_score/{name}": value for name, value in self._run.scores.items()}

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
            if not self._checked:
                self._check_first_step(optimizer)
            counted = self._run.update_steps
            picked = self._run.step(optimizer)
            self._checked = self._checked or self._run.update_steps > counted
            return picked
        self._warn_of_unfinished_selection()
        return False

    def _check_first_step(self, optimizer: Any) -> None:
        """Look at what may have been set up after the selector was made, until a step counts."""
        refuse_reentrant_checkpointing(self._model)
        if self.pool is not None:
            refuse_sharded(self._model, self.pool)
            scaled = getattr(getattr(optimizer, "scaler", None), "is_enabled", lambda: False)()
            if self._scaler is None and (scaled or self.pool.stepped_by_grad_scaler):
                raise SelectionError(
                    "The loss is scaled by a GradScaler, which scores must know of. Pass it: "
                    "SFASelector(model, scaler=scaler), with Accelerate scaler=accelerator.scaler."
                )

    def _warn_of_unfinished_selection(self) -> None:
        """Say once that an adapter from the middle of a run goes on without its selector state."""
        if self._warned or self.pool is None:
            return
        self._warned = True
        if self.selected and is_unfinished(self.pool, self.config):
            logger.warning(
                "Adapter `%s` comes from an unfinished run: %d of %d weights are selected, and no "
                "more will be. Call load_state_dict with the selector state of that run to go on.",
                self.adapter_name,
                self.selected,
                self.pool.values.numel(),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the adapter's own tensors.

        `update_steps`, the schedule, the present round's sums over all ranks (one per eligible
        weight, not copied on a single process; empty after the last pick), and values and
        positions as they are in training, which the adapter's own file does not keep to the last
        bit and order. Under torch.distributed every rank must call it.
        """
        if self.pool is not None and not self.pool.is_there:
            raise SelectionError(
                f"Adapter `{self.adapter_name}` was deleted, and its selection with it. Make a new "
                "selector for another adapter."
            )
        if self._run is not None:
            return self._run.state_dict()
        return {} if self.pool is None else {"pool": self.pool.state_dict()}

    def close(self) -> None:
        """End the run, also before its last pick: free the scores and select no more.

        A warning says so where the adapter holds fewer weights than the run was to select, or than
        it did select (an earlier state was loaded, such as the Trainer's best checkpoint).
        """
        if self._run is None:
            return
        chosen = self._run.joined[-1][1] if self._run.joined else 0
        if self._run.accumulators:
            logger.warning(
                "The run ended at update step %d, before its last pick after step %d: %d of %d "
                "weights are selected. The adapter works, with that part of its budget.",
                self.update_steps,
                self._run.schedule.last_pick,
                self.selected,
                self.pool.size if self.pool else 0,
            )
        elif self.selected < chosen:
            logger.warning(
                "Adapter `%s` holds %d of the %d weights that the run selected: a checkpoint from "
                "before the last pick was loaded. It works, with that part of its budget.",
                self.adapter_name,
                self.selected,
                chosen,
            )
        self._run.stop()

    def discard(self) -> None:
        """Free the scores without a word, before another selector begins anew."""
        if self._run is not None:
            self._run.stop()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the adapter's tensors must be loaded already.

        Raises:
            SelectionError: If the state belongs to another run or another adapter, or the
                selection was begun with other settings.
        """
        if not state or self.pool is None:
            return
        shapes = {name: self.pool.weight(i).shape for i, name in enumerate(self.pool.names)}
        check_state(state, shapes, settings_state(self.config)["settings"])
        if "update_steps" not in state:  # of a run that selected nothing
            if not self.pool.fits(state["pool"]):
                raise SelectionError(
                    f"Adapter `{self.adapter_name}` has other weights selected than the selector "
                    "state. Load adapter and selector state from the same checkpoint."
                )
            self.pool.load_state_dict(state["pool"])
            return
        check_settings(state, self.config, self._total_steps)
        schedule = Schedule(
            int(state["total_steps"]),
            int(state["selection_steps"]),
            self.pool.values.numel(),
            self.config.schedule,
            self.config.select_until,
        )
        if self._run is not None:
            self._run.stop()
        run = self._new_run(schedule)
        run.load_state_dict(state)
        self._run = run
