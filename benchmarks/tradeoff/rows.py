# SPDX-License-Identifier: Apache-2.0
"""What is reported of an experiment on a task set: the runs at its chosen rates, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .experiments import Experiment
from .plan import SEEDS, Plan
from .store import Run, score
from .tasks import TaskSet


@dataclass(frozen=True)
class Row:
    """The results of one experiment on one task set, one for each seed.

    Attributes:
        task: The task set.
        experiment: The experiment.
        results: Those of the runs at the chosen rates that have been made and did not fail.
        run: The first of these runs.
    """

    task: TaskSet
    experiment: Experiment
    results: tuple[dict[str, Any], ...]
    run: Run

    def scores(self, split: str = "test") -> list[float]:
        """Return the score of each seed."""
        found = (score(result, split, self.task.metric) for result in self.results)
        return [value for value in found if value is not None]

    def mean(self, key: str) -> float:
        """Return the mean of a number of `train_info`."""
        return fmean(result["train_info"][key] for result in self.results)

    def last(self, key: str) -> float:
        """Return the mean of a number that was measured at the end of training."""
        return fmean(result["train_info"]["metrics"][-1][key] for result in self.results)

    @property
    def share(self) -> float:
        """Trained share of the backbone."""
        return self.mean("trained_share")

    @property
    def score(self) -> float:
        """Mean score on test data."""
        return fmean(self.scores())

    @property
    def validation(self) -> float:
        """Mean score on validation data."""
        return fmean(self.scores("valid"))

    @property
    def spread(self) -> float:
        """Half of the range of the scores."""
        scores = self.scores()
        return (max(scores) - min(scores)) / 2

    @property
    def step_ms(self) -> str:
        """CPU time of a step, milliseconds."""
        return f"{1e3 * self.mean('step_cpu_seconds'):.0f}"

    @property
    def peak_mb(self) -> str:
        """Most memory in use, millions of bytes."""
        return f"{self.mean('accelerator_memory_max') / 1e6:.0f}"

    @property
    def is_complete(self) -> bool:
        """Whether all seeds are there, so that it can be compared."""
        return len(self.scores()) == len(SEEDS)

    def beats(self, other: Row) -> bool:
        """Whether it is better than another by more than the two spreads together."""
        apart = abs(self.score - other.score) > self.spread + other.spread
        return apart and self.task.better(self.score, other.score)


def make_rows(plan: Plan, task: str, takes: Callable[[Experiment], bool]) -> list[Row]:
    """Return the rows of those experiments whose rates are chosen, by the share they train."""
    rows = []
    for experiment in filter(takes, plan.experiments.values()):
        runs = [run for run in plan.chosen(task, experiment) if run in plan.results]
        made = tuple(plan.results[run] for run in runs)
        good = tuple(r for r in made if r["train_info"]["status"] == "success")
        if good:
            rows.append(Row(plan.tasks[task], experiment, good, runs[0]))
    return sorted(rows, key=lambda row: row.share)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown; the first line is its head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def shown(row: Row) -> str:
    """Return score and spread, and how many seeds there are if some are missing."""
    text = f"{row.score:.3f}" + (f" ± {row.spread:.3f}" if len(row.scores()) > 1 else "")
    return text if row.is_complete else f"{text} ({len(row.scores())} of {len(SEEDS)} seeds)"
