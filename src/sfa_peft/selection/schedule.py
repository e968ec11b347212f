# SPDX-License-Identifier: Apache-2.0
"""Update step to round, phase and quota (Alg. 1, lines 4 and 9). Plain Python, no state."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..errors import SelectionError

logger = logging.getLogger(__name__)

#: s where the user gives none (Sec. 3 and Table 5 of the paper).
DEFAULT_SELECTION_STEPS = 2000
#: Rounds that a run should have at least when s is not given.
DEFAULT_NUM_ROUNDS = 20

#: Share of the learning rates' sum that is left to the weights of the last pick.
LEFT_AFTER_LAST_PICK = 0.25
#: Share of a run after which no pick happens where rates are not known: right for a linear decay.
DEFAULT_SELECT_UNTIL = 0.5

#: How the selection grows from pick to pick.
SCHEDULES = ("linear", "cubic", "one_shot", "literal")


@dataclass(frozen=True)
class Schedule:
    """The picks of one run: after steps s, 2s, ..., together `quota` weights.

    Attributes:
        total_steps: T, update steps of the run.
        selection_steps: s, update steps of a round.
        quota: Weights to select in all.
        kind: "linear" picks equal shares; "cubic" picks :math:`1 - (1 - i/p)^3` of them by pick i
            of p, most of them early; "one_shot" picks once, after the first round; "literal" is the
            paper's loop as printed: n - 1 picks of 1/n, so that 1/n of the budget stays unused.
        select_until: Share of the run after which no pick happens; None for no such limit.
    """

    total_steps: int
    selection_steps: int
    quota: int
    kind: str = "linear"
    select_until: float | None = None

    @property
    def num_rounds(self) -> int:
        """n = T / s, rounded down; the last round only trains."""
        return self.total_steps // self.selection_steps

    @property
    def num_picks(self) -> int:
        """n - 1, so that the last pick still trains for s steps or more; fewer where limited."""
        most = min(1, self.num_rounds - 1) if self.kind == "one_shot" else self.num_rounds - 1
        if self.select_until is None:
            return most
        # A decimal fraction is taken as written, whatever binary floats make of it.
        limit = math.floor(Fraction(str(self.select_until)) * self.total_steps)
        return min(most, limit // self.selection_steps)

    @property
    def last_pick(self) -> int:
        """Update step after which the last pick happens."""
        return self.num_picks * self.selection_steps

    def is_pick(self, step: int) -> bool:
        """Whether a pick happens after update step `step` (counted from 1)."""
        return 0 < step <= self.last_pick and step % self.selection_steps == 0

    def is_scored(self, step: int, every: int) -> bool:
        """Whether update step `step` adds to a score if one step in `every` does.

        The last step of a round always does, whatever the length of the round.
        """
        in_round = (step - 1) % self.selection_steps + 1
        return step <= self.last_pick and (self.selection_steps - in_round) % every == 0

    def selected_after(self, step: int) -> int:
        """Return how many weights are selected after update step `step` and its pick."""
        return self._selected_by(min(step // self.selection_steps, self.num_picks))

    def _selected_by(self, pick: int) -> int:
        # Cumulative rounding: shares differ by one at most and the last pick fills the budget.
        if self.kind == "literal":
            return self.quota * pick // self.num_rounds
        if self.kind == "cubic":
            left = (self.num_picks - pick) ** 3
            return self.quota - math.ceil(Fraction(self.quota * left, self.num_picks**3))
        return self.quota * pick // self.num_picks

    def joined(self, step: int) -> list[tuple[int, int, int]]:
        """Return (first slot, last slot + 1, update step of the pick) of the picks up to `step`."""
        picks = min(step // self.selection_steps, self.num_picks)
        ends = [self._selected_by(i) for i in range(picks + 1)]
        return [
            (ends[i], ends[i + 1], (i + 1) * self.selection_steps)
            for i in range(picks)
            if ends[i] < ends[i + 1]
        ]


def share_by_rates(rates: Sequence[float] | None) -> float:
    """Return the share of a run after which a quarter of its learning rates' sum is left.

    Args:
        rates: The rate of each update step; None where they are not known.
    """
    if rates is None or sum(rates) <= 0:
        return DEFAULT_SELECT_UNTIL
    left = math.fsum(rates)
    wanted = LEFT_AFTER_LAST_PICK * left * (1 - 1e-9)  # a quarter but for rounding is one, too
    for step, rate in enumerate(rates):
        left -= rate
        if left < wanted:
            return _share(step, len(rates))
    return 1.0


def _share(step: int, total: int) -> float:
    """Return a decimal share of a run that includes a step (1/3 as a float would not)."""
    return math.ceil(10**6 * step / total) / 10**6


def make_schedule(
    total_steps: int | None,
    selection_steps: int | None,
    quota: int,
    kind: str = "linear",
    select_until: float | None = None,
    default_until: float = 1.0,
) -> Schedule:
    """Return the schedule of a run, with s chosen where it is not given.

    Args:
        total_steps: T in update steps.
        selection_steps: s in update steps; None for 2000, or a twentieth of a shorter run.
        quota: Weights to select in all.
        kind: One of `SCHEDULES`.
        select_until: Share of the run after which no pick happens; None for the default.
        default_until: The default. It leaves the first pick in any case, and "literal" as it is.

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
                "%d: using rounds of %d step%s.",
                total_steps, DEFAULT_NUM_ROUNDS, DEFAULT_SELECTION_STEPS, steps, "s" * (steps > 1),
            )  # fmt: skip
    if total_steps // steps < 2:
        raise SelectionError(
            f"selection_steps={steps} leaves no pick in a run of {total_steps} update steps: picks "
            "happen after each round but the last. Use at most half of the run "
            f"({total_steps // 2}), or None for the default."
            if total_steps >= 2
            else f"A run of {total_steps} update step has no room for a pick; 2 are needed."
        )
    if select_until is None and kind != "literal":
        select_until = max(default_until, _share(steps, total_steps))
    schedule = Schedule(total_steps, steps, quota, kind, select_until)
    if schedule.num_picks < 1:
        raise SelectionError(
            f"select_until={select_until} ends the selection before the first pick, which is after "
            f"step {steps} of {total_steps}. Use at least {steps / total_steps:.4g}, or a smaller "
            "selection_steps."
        )
    return schedule
