# SPDX-License-Identifier: Apache-2.0
"""Update step to round, phase and quota (Alg. 1, lines 4 and 9). Plain Python, no state."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..errors import SelectionError

logger = logging.getLogger(__name__)

#: s where the user gives none (Sec. 3 and Table 5 of the paper).
DEFAULT_SELECTION_STEPS = 2000
#: Rounds that a run should have at least when s is not given.
DEFAULT_NUM_ROUNDS = 20


@dataclass(frozen=True)
class Schedule:
    """The picks of one run: after steps s, 2s, ..., (n-1)s, together `quota` weights.

    Attributes:
        total_steps: T, update steps of the run.
        selection_steps: s, update steps of a round.
        quota: Weights to select in all.
    """

    total_steps: int
    selection_steps: int
    quota: int

    @property
    def num_rounds(self) -> int:
        """n = T / s, rounded down; the last round only trains."""
        return self.total_steps // self.selection_steps

    @property
    def num_picks(self) -> int:
        """n - 1: the last pick still trains for s steps or more."""
        return self.num_rounds - 1

    @property
    def last_pick(self) -> int:
        """Update step after which the last pick happens."""
        return self.num_picks * self.selection_steps

    def is_pick(self, step: int) -> bool:
        """Whether a pick happens after update step `step` (counted from 1)."""
        return 0 < step <= self.last_pick and step % self.selection_steps == 0

    def selected_after(self, step: int) -> int:
        """Return how many weights are selected after update step `step` and its pick."""
        picks = min(step // self.selection_steps, self.num_picks)
        # Cumulative rounding: shares differ by one at most and the last pick fills the budget.
        return self.quota * picks // self.num_picks

    def joined(self, step: int) -> list[tuple[int, int, int]]:
        """Return (first slot, last slot + 1, update step of the pick) of the picks up to `step`."""
        picks = min(step // self.selection_steps, self.num_picks)
        ends = [self.selected_after(i * self.selection_steps) for i in range(picks + 1)]
        return [
            (ends[i], ends[i + 1], (i + 1) * self.selection_steps)
            for i in range(picks)
            if ends[i] < ends[i + 1]
        ]


def make_schedule(total_steps: int | None, selection_steps: int | None, quota: int) -> Schedule:
    """Return the schedule of a run, with s chosen where it is not given.

    Args:
        total_steps: T in update steps.
        selection_steps: s in update steps; None for 2000, or a twentieth of a shorter run.
        quota: Weights to select in all.

    Raises:
        SelectionError: If T is unknown, or no pick fits into it.
    """
    if total_steps is None:
        raise SelectionError(
            "The length of the run is unknown, so rounds cannot be planned. Give total_steps (in "
            "optimizer updates) to SFASelector or SFAConfig; with transformers.Trainer use "
            "SFACallback, which takes it from there."
        )
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise SelectionError(
            f"total_steps: expected a number of update steps of at least 1, got {total_steps!r}."
        )
    steps = selection_steps
    if steps is None:
        steps = min(DEFAULT_SELECTION_STEPS, max(1, total_steps // DEFAULT_NUM_ROUNDS))
        if steps < DEFAULT_SELECTION_STEPS:
            logger.warning(
                "selection_steps is not given and a run of %d steps is too short for %d rounds of "
                "%d: using rounds of %d steps.",
                total_steps, DEFAULT_NUM_ROUNDS, DEFAULT_SELECTION_STEPS, steps,
            )  # fmt: skip
    if total_steps // steps < 2:
        raise SelectionError(
            f"selection_steps={steps} leaves no pick in a run of {total_steps} update steps: picks "
            "happen after each round but the last. Use at most half of the run "
            f"({total_steps // 2}), or None for the default."
            if total_steps >= 2
            else f"A run of {total_steps} update step has no room for a pick; 2 are needed."
        )
    return Schedule(total_steps, steps, quota)
