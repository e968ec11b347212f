# SPDX-License-Identifier: Apache-2.0
"""The rounds of one run: a pool that is filled, the schedule of its picks, and a round's scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import (
    GradientWarning,
    OptimizerWarning,
    SelectionError,
    UnfinishedSelectionWarning,
    warn,
)
from ..sparse.gradient import Observer
from ..sparse.optimizer import LateEntries, check_unseen_step
from ..sparse.pool import Pool
from .accumulators import Accumulator, check_scores, num_ranks
from .candidates import Candidates
from .pick import BLOCKS, pick, row_sizes
from .rules import SelectionRules
from .schedule import Schedule
from .score_distribution import ScoreDistribution
from .scores import find_score

logger = logging.getLogger(__name__)


class Rounds:
    """The state behind a selector.

    Args:
        rules: How to score and pick.
        pool: The pool that is filled.
        schedule: When to pick how many.
        loss_scale: Multiplies a tensor by the present factor of a gradient scaler, without looking
            at it; None without one.
        can_skip: Whether a step's gradients are kept apart, so that `skip` can drop them.
    """

    def __init__(
        self,
        rules: SelectionRules,
        pool: Pool,
        schedule: Schedule,
        loss_scale: Callable[[Tensor], Tensor] | None = None,
        can_skip: bool = False,
    ) -> None:
        self.rules, self.pool, self.schedule = rules, pool, schedule
        self.loss_scale, self.can_skip = loss_scale, can_skip
        self.update_steps = 0
        self.optimizer_steps = pool.optimizer_steps
        self.accumulators: dict[str, Accumulator] = {}
        self.observers: dict[str, Observer] = {}  # kept: a new one makes a compiled model anew
        self.candidates: Candidates | None = None
        self.joined: list[tuple[int, int, int]] = []  # (first slot, last + 1, update step) by pick
        self.late_entries = LateEntries(pool) if rules.late_bias_correction else None
        self.scores: dict[str, float] = {}  # distribution of those that the last pick compared
        self._is_paused = self._has_seen = False  # a gradient
        self._is_late = False  # made between a backward and the step after it
        #: Whether scores are of this rank's part of each weight; None where there were none.
        self.is_cut: bool | None = None
        self._has_warned = False  # of steps that are not seen

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"observers": {}, "drives": self.drives}

    def __setstate__(self, state: dict[str, Any]) -> None:
        drives = state.pop("drives")
        self.__dict__.update(state)
        if drives:
            self._attach()

    @property
    def drives(self) -> bool:
        """Whether it fills the pool; another selector may have taken over."""
        return self.pool.driver is self

    @property
    def round(self) -> int:
        """Number of the present round, from 1."""
        return min(self.update_steps // self.schedule.selection_steps + 1, self.schedule.num_rounds)

    @property
    def progress(self) -> dict[str, str]:
        """Round and selected share for a progress bar."""
        share = self.pool.num_selected / self.pool.size
        return {"round": f"{self.round}/{self.schedule.num_rounds}", "selected": f"{share:.1%}"}

    @property
    def chosen(self) -> int:
        """Number of weights that this run selected so far."""
        return self.joined[-1][1] if self.joined else 0

    def metrics(self) -> dict[str, float]:
        """Return round, selected share and the scores of the last pick (see `SFASelector`)."""
        found = {"sfa_round": self.round, "sfa_selected": self.pool.num_selected / self.pool.size}
        return found | {f"sfa_score/{name}": value for name, value in self.scores.items()}

    # --- scores --------------------------------------------------------------------------------

    def start(self) -> None:
        """Make room for the scores and let the next step add to them."""
        score = find_score(self.rules.score)
        for ordinal, name in enumerate(self.pool.names):
            self.accumulators[name] = Accumulator(
                score,
                partial(self.pool.weights[ordinal].scored, self.pool.adapter_name),
                dtype=self.rules.score_dtype,
                key=name,
                loss_scale=self.loss_scale,
                can_drop=self.can_skip,
                shard=self.pool.weights[ordinal].shard,
            )
        self._is_late = self.pool.values.grad is not None
        self.is_cut = self.pool.shard is not None
        is_lacking = self.rules.ranking == "output" or self.rules.granularity in BLOCKS
        if self.is_cut and is_lacking:
            raise SelectionError(
                "SFAConfig.ranking='output' and blocks are not there under fully_shard (FSDP2). "
                "Select 'weight' or 'row', 'global' or by 'layer', or train with "
                "DistributedDataParallel."
            )
        if self.is_cut and not score.elementwise:
            raise SelectionError(
                f"score={score.name!r}: under fully_shard (FSDP2) the function sees this process's "
                "part of each weight. If it needs no more, say so: "
                f"register_score({score.name!r}, function, elementwise=True). Else train with "
                "DistributedDataParallel."
            )
        if score.dense:
            self.candidates = Candidates(self.pool, list(self.accumulators.values()))
        self._attach()

    def _attach(self) -> None:
        """Take over the pool."""
        self.pool.driver, self.pool.is_growing = self, bool(self.accumulators)
        self.observers = {
            name: Observer(partial(self._receive, accumulator))
            for name, accumulator in self.accumulators.items()
        }
        if self.candidates is not None:
            self.candidates.attach()
        self._observe_next_step()

    def stop(self) -> None:
        """Free the scores (not those of a selector that took over)."""
        self._observe(False)
        if self.drives:
            self.pool.is_growing = False
        if self.candidates is not None:
            self.candidates.remove()
            self.candidates = None
        self.accumulators, self.observers = {}, {}

    def _observe_next_step(self) -> None:
        step = self.update_steps + 1
        self._observe(self.schedule.is_scored(step, self.rules.score_every))

    def _observe(self, wanted: bool) -> None:
        """Let every eligible weight hand its gradient to its score, or no longer."""
        if not self.drives:
            return
        for ordinal, name in enumerate(self.pool.names):
            observers = self.pool.weights[ordinal].observers
            if wanted and name in self.observers:
                observers[self.pool.adapter_name] = self.observers[name]
            else:
                observers.pop(self.pool.adapter_name, None)

    def _receive(self, accumulator: Accumulator, gradient: Tensor) -> None:
        """Show an accumulator the gradient of a backward, if that belongs to the present step."""
        if not self._is_paused:
            self._check_calls(missed=self.pool.optimizer_steps - self.optimizer_steps)
            self._has_seen = True
            accumulator(gradient)

    def _check_calls(self, missed: int) -> None:
        """Notice on several ranks, which must pick together, that this one left out a call."""
        if missed > 0 and num_ranks() > 1:
            raise SelectionError(
                f"Process {dist.get_rank()}: SFASelector.step was not called after update step "
                f"{self.update_steps + 1}, before the next backward. All processes must call it "
                "after each optimizer.step(), or they pick at different times; a backward that "
                "belongs to no step goes into `with selector.paused():`."
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no gradient count that comes meanwhile."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def skip(self) -> None:
        """Forget the gradients since the last step."""
        if not all(a.can_drop for a in self.accumulators.values()):
            raise SelectionError(
                f"score={self.rules.score!r} adds gradients up as they come, so those of this step "
                "cannot be dropped any more. Make the selector with can_skip=True, which keeps a "
                "step apart (4 bytes for each weight that may be selected)."
            )
        for accumulator in self.accumulators.values():
            accumulator.drop_step()

    def close(self) -> None:
        """End the run, also before its last pick, and say what it lacks then."""
        selected = self.pool.num_selected
        if self.accumulators:
            warn(
                f"The run ended at update step {self.update_steps}, before its last pick after "
                f"step {self.schedule.last_pick}: {selected} of {self.pool.size} weights are "
                "selected. The adapter works, with that part of its budget.",
                UnfinishedSelectionWarning,
            )
        elif selected < self.chosen:
            warn(
                f"Adapter `{self.pool.adapter_name}` holds {selected} of the {self.chosen} weights "
                "that the run selected: a checkpoint from before the last pick was loaded. It "
                "works, with that part of its budget.",
                UnfinishedSelectionWarning,
            )
        self.stop()

    # --- steps ---------------------------------------------------------------------------------

    def step(self, optimizer: Any = None) -> bool:
        """Count one update step; pick at the end of a round (see `SFASelector.step`)."""
        if not self.drives:
            raise SelectionError(
                f"Adapter `{self.pool.adapter_name}` is driven by another selector or callback, "
                "which was made later. Make one for each run, and call the step of no other."
            )
        torch_optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not self._has_stepped(torch_optimizer, due=_ends_update_step(optimizer)):
            # With a scaler it was an overflow, whose gradients do not count; else a micro-batch.
            if self.loss_scale is not None and _ends_update_step(optimizer):
                self.skip()
            return False
        self._check_calls(missed=self.pool.optimizer_steps - self.optimizer_steps - 1)
        if self.pool.optimizer_steps == self.optimizer_steps:
            self._take_unseen_step()
        self.optimizer_steps = self.pool.optimizer_steps
        self.update_steps += 1
        if isinstance(torch_optimizer, torch.optim.Optimizer) and self.late_entries is not None:
            self.late_entries.correct(torch_optimizer, self.joined, self.update_steps)
        picked = bool(self.accumulators) and self._score(torch_optimizer)
        self.pool.settle()
        return picked

    def _take_unseen_step(self) -> None:
        """Count a step that no hook saw: weights are written anew, as if the values moved."""
        check_unseen_step(self.pool)
        self.pool.foreign_writes += 1
        late = self.joined and self.late_entries is not None and not self._has_warned
        if late and bool(self.pool.held.any()):  # somebody did step them
            self._has_warned = True
            warn(
                f"Adapter `{self.pool.adapter_name}`: what steps its values is no torch optimizer "
                "on the model's own parameters (DeepSpeed ZeRO, Apex and Megatron step copies), "
                "so weights that join late get no bias correction of their own age. Everything "
                "else works.",
                OptimizerWarning,
            )

    def _score(self, optimizer: Any) -> bool:
        """Finish the scores of an update step; pick at the end of a round."""
        if self.schedule.is_scored(self.update_steps, self.rules.score_every):
            if self._is_late and self.update_steps == 1 and not self._has_seen:
                raise SelectionError(
                    "The selector was made between a backward and the optimizer's step, so it "
                    "missed the gradient of the first step. Make it before the first backward."
                )
            for accumulator in self.accumulators.values():
                accumulator.end_step()
        if self.candidates is not None:
            self.candidates.step(optimizer)
        picked = self.schedule.is_pick(self.update_steps)
        if picked:
            self._end_round()
        if self.accumulators:
            self._observe_next_step()
        return picked

    def _has_stepped(self, optimizer: Any, *, due: bool) -> bool:
        """Whether the optimizer took a step since the last call."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            return due  # not torch's: its steps cannot be seen
        if not self.pool.is_trained_by(optimizer):
            raise SelectionError(
                f"The optimizer does not train the values of adapter `{self.pool.adapter_name}`. "
                "Build it from the parameters with requires_grad of the wrapped model. If it steps "
                "copies of them (Apex O2, Megatron), call SFASelector.step() without it."
            )
        return self.pool.optimizer_steps > self.optimizer_steps

    def _end_round(self) -> None:
        """Pick by the scores of the round, if there are any, and begin the next one."""
        for accumulator in self.accumulators.values():
            accumulator.reduce()
        if self._is_anywhere(check_scores(self.accumulators)):
            self._pick(list(self.accumulators.values()))
        else:
            self._warn_of_no_scores()
        for accumulator in self.accumulators.values():
            accumulator.reset()
        if self.candidates is not None:
            self.candidates.restart()
        if self.update_steps == self.schedule.last_pick:
            self.stop()

    def _is_anywhere(self, has_scores: bool) -> bool:
        """Whether any rank has scores."""
        ranks = self.pool.ranks
        return has_scores if ranks is None else bool(ranks.table([int(has_scores)]).any())

    def _pick(self, accumulators: list[Accumulator]) -> None:
        """Admit the weights with the largest scores (Eq. 5, Alg. 1 lines 10 to 12)."""
        pool, first = self.pool, self.pool.num_selected
        if first != self.chosen:
            raise SelectionError(
                f"Update step {self.update_steps}: adapter `{pool.adapter_name}` has {first} "
                f"selected weights, but this run selected {self.chosen}. Was the adapter loaded "
                "anew meanwhile? Load the selector's state of that moment too, or make a new "
                "selector."
            )
        for ordinal, accumulator in enumerate(accumulators):
            accumulator.exclude(pool.slices[ordinal].indices())
        distribution = ScoreDistribution()
        pool.assign(
            pick(
                [accumulator.source() for accumulator in accumulators],
                self.schedule.selected_after(self.update_steps) - first,
                [pool.count(ordinal) for ordinal in range(len(accumulators))],
                ranking=self.rules.ranking,
                granularity=self.rules.granularity,
                row_sizes=row_sizes([weight.tensor for weight in pool.weights]),
                distribution=distribution,
                ranks=pool.ranks,
            )
        )
        self.scores = distribution.summary()
        if pool.num_selected > first:
            self.joined.append((first, pool.num_selected, self.update_steps))
        logger.info(
            "Step %d: %d weights selected; smallest score admitted: %.4g (median of all: %.4g).",
            self.update_steps,
            pool.num_selected,
            self.scores.get("threshold", float("nan")),
            self.scores["p50"],
        )

    def _warn_of_no_scores(self) -> None:
        is_last = self.update_steps == self.schedule.last_pick
        share = self.schedule.selected_after(self.update_steps) - self.chosen
        open_ = f"This was the last pick: {share} weights of the budget stay unselected."
        later = f"Its {share} weights are left to the next pick."
        warn(
            f"Update step {self.update_steps}: no gradient has reached any weight that adapter "
            f"`{self.pool.adapter_name}` may select, so this round selects nothing. "
            f"{open_ if is_last else later} Is the adapter active and not merged, or is gradient "
            "checkpointing on with use_reentrant=True (which needs use_reentrant=False)?",
            GradientWarning,
        )

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs (see `SFASelector.state_dict`)."""
        return self.rules.to_state() | {
            "update_steps": self.update_steps,
            "total_steps": self.schedule.total_steps,
            "selection_steps": self.schedule.selection_steps,
            "joined": list(self.joined),
            "pool": self.pool.state_dict(),
            "sums": {name: a.gather() for name, a in self.accumulators.items()},
            "num_added": {name: a.num_added for name, a in self.accumulators.items()},
            "candidates": self.candidates.state_dict() if self.candidates else None,
            "late_entries": self.late_entries.state_dict() if self.late_entries else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; the adapter's files are loaded already."""
        self.update_steps = int(state["update_steps"])
        self.joined = [tuple(entry) for entry in state["joined"]]
        found = self.pool.num_assigned
        if found != self.chosen:
            raise SelectionError(
                f"Adapter `{self.pool.adapter_name}` has {found} selected weights, but after "
                f"update step {self.update_steps} of this run it should have {self.chosen}. Load "
                "adapter and selector state from the same checkpoint."
            )
        check_same_weights(self.pool, state)
        self.pool.load_state_dict(state["pool"])
        self.stop()
        self.pool.driver = self
        if state["sums"]:
            self.start()
        if set(state["sums"]) != set(self.accumulators):
            raise SelectionError(
                "The selector state holds scores of other layers than the model. Load adapter and "
                "selector state from the same checkpoint."
            )
        for name, accumulator in self.accumulators.items():
            accumulator.scatter(state["sums"][name])
            accumulator.num_added = int(state["num_added"][name])
        if self.candidates is not None:
            self.candidates.load_state_dict(state["candidates"])
        if self.late_entries is not None and state["late_entries"] is not None:
            self.late_entries.load_state_dict(state["late_entries"])


def _ends_update_step(optimizer: Any) -> bool:
    """Whether an update step was due (Accelerate holds it back while it accumulates)."""
    return getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True)


def check_same_weights(pool: Pool, state: dict[str, Any]) -> None:
    """Check that a selector's state is of the weights that are selected in a pool.

    Raises:
        SelectionError: If it is not.
    """
    if not pool.fits(state["pool"]):
        raise SelectionError(
            f"Adapter `{pool.adapter_name}` has other weights selected than the selector "
            "state. Load adapter and selector state from the same checkpoint."
        )
