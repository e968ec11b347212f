# SPDX-License-Identifier: Apache-2.0
"""Which runs there are, in which order, and at which rates: decided by validation scores only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from .experiments import Experiment, reference
from .store import Run, score
from .tasks import BACKBONE_RATES, HEAD_FACTORS, START, TASKS, TaskSet

Results = Mapping[Run, dict[str, Any]]
Point = tuple[int, int]  # places in BACKBONE_RATES and HEAD_FACTORS

SEEDS = (0, 1, 2)
#: Runs of a search that has not begun, for estimates: the start, what is around it, one step more.
USUAL_SEARCH = 7
#: How urgent the runs of a stage are: the start of each search, its points, then other seeds.
AFTER_SEARCH = 5


class Stage(NamedTuple):
    """A part of the plan; earlier ones tell more.

    Attributes:
        title: For people.
        tasks: Names of task sets.
        takes: Whether an experiment belongs to it.
    """

    title: str
    tasks: tuple[str, ...]
    takes: Callable[[Experiment], bool]


class Search(NamedTuple):
    """A search for rates.

    Attributes:
        best: The best point so far.
        missing: Points to be tried before it is chosen.
        has_begun: Whether the first one has been tried.
    """

    best: Point
    missing: list[Point]
    has_begun: bool


def _at(*percents: int) -> Callable[[Experiment], bool]:
    return lambda e: e.percent in percents


def is_first(e: Experiment) -> bool:
    return e.percent == 5 or e.name == "all"


def is_named(prefix: str) -> Callable[[Experiment], bool]:
    return lambda e: e.name.startswith(prefix)


STAGES = (
    Stage("segmentation at 5 %", ("segmentation",), is_first),
    Stage("depth at 5 %", ("depth",), is_first),
    Stage("candidates", ("segmentation", "depth"), is_named("try-")),
    Stage("20 %", ("segmentation", "depth"), _at(20)),
    Stage("real images at 5 %", ("camvid", "redkitchen"), is_first),
    Stage("ablations", ("segmentation",), is_named("table5")),
    Stage("objects at 5 %", ("detection", "instances"), is_first),
    Stage("runs twice as long", ("segmentation", "depth"), is_named("length")),
    Stage("how weights are ranked", ("segmentation", "depth"), is_named("criterion")),
    Stage("a selection of another data set", ("camvid",), is_named("table7")),
    Stage("candidates on real images", ("camvid", "redkitchen"), is_named("try-")),
    Stage("other budgets", ("segmentation", "depth"), _at(1, 3, 10, 15)),
    Stage("20 % elsewhere", ("camvid", "redkitchen", "detection", "instances"), _at(20)),
    Stage("other budgets elsewhere", ("camvid", "redkitchen"), _at(1, 3, 10, 15)),
)


class Plan:
    """What is to be run, given what has been run.

    Args:
        experiments: By id.
        results: Those there are.
        tasks: Task sets by name.
    """

    def __init__(
        self,
        experiments: Mapping[str, Experiment],
        results: Results,
        tasks: Mapping[str, TaskSet] = TASKS,
    ) -> None:
        self.experiments, self.results, self.tasks = dict(experiments), results, tasks

    # --- rates ---------------------------------------------------------------------------------

    def search(self, task: str, experiment: Experiment) -> Search:
        """Return how the search for an experiment's rates stands.

        It climbs on a grid, alike for all methods: from one start to the best of the points next to
        it, until all around are worse. With seed 0, on validation data.
        """
        axes = (len(BACKBONE_RATES) if experiment.trains_backbone else 1, len(HEAD_FACTORS))
        start = START if experiment.trains_backbone else (0, START[1])
        found = {}
        for point in ((i, j) for i in range(axes[0]) for j in range(axes[1])):
            result = self.results.get(self.run(task, experiment, point, 0))
            if result is not None:
                found[point] = self._validation(task, result)
        best = max(found, key=lambda p: found[p]) if start in found else start
        around = [best, *_next_to(best, axes)]
        return Search(best, [point for point in around if point not in found], start in found)

    def _validation(self, task: str, result: dict[str, Any]) -> float:
        """Return the validation score, larger is better; a failed run's is the worst."""
        value = score(result, "valid", self.tasks[task].metric)
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.tasks[task].higher_is_better else -value

    def run(self, task: str, experiment: Experiment, point: Point, seed: int) -> Run:
        """Return a run at a point of the grid."""
        backbone = BACKBONE_RATES[point[0]] if experiment.trains_backbone else 0.0
        head = self.tasks[task].head_rate * HEAD_FACTORS[point[1]]
        return Run(task, experiment.id, backbone, float(f"{head:.3g}"), seed)

    def chosen(self, task: str, experiment: Experiment) -> list[Run]:
        """Return the runs that are reported, by seed; none while the rates are searched."""
        search = self.search(task, reference(experiment, self.experiments))
        if search.missing:
            return []
        return [self.run(task, experiment, search.best, seed) for seed in SEEDS]

    # --- order ---------------------------------------------------------------------------------

    def missing(self, stage: Stage, only: Sequence[str] = ()) -> Iterator[Run]:
        """Yield the runs of a stage that can be run now and have not been, the first ones first.

        Args:
            stage: The stage.
            only: Names of task sets; all of them if empty.
        """
        waves: dict[int, list[Run]] = {}
        for task in (t for t in stage.tasks if not only or t in only):
            for experiment in filter(stage.takes, self.experiments.values()):
                for wave, run in self._next(task, experiment):
                    if run not in self.results:
                        waves.setdefault(wave, []).append(run)
        yield from dict.fromkeys(run for wave in sorted(waves) for run in waves[wave])

    def _next(self, task: str, experiment: Experiment) -> Iterator[tuple[int, Run]]:
        """Yield the runs of an experiment that can be run, and which are as urgent as others'."""
        base = reference(experiment, self.experiments)
        search = self.search(task, base)
        for wave, point in enumerate(search.missing, start=int(search.has_begun)):
            yield wave, self.run(task, base, point, 0)
        for wave, run in enumerate(self.chosen(task, experiment), start=AFTER_SEARCH):
            yield wave, run

    def todo(self, only: Sequence[str] = ()) -> list[Run]:
        """Return all runs that can be run now, the most telling first, of data that is here."""
        runs = (run for stage in STAGES for run in self.missing(stage, only))
        return [run for run in dict.fromkeys(runs) if self.tasks[run.task].is_there]

    # --- costs ---------------------------------------------------------------------------------

    def seconds(self, task: str) -> float:
        """Return what a run takes, CPU seconds: the mean of those there are."""
        known = [
            result["run_info"]["cpu_seconds"]
            for run, result in self.results.items()
            if run.task == task and result["run_info"].get("cpu_seconds")
        ]
        return fmean(known) if known else self.tasks[task].cpu_seconds

    def status(self, only: Sequence[str] = ()) -> Iterator[tuple[Stage, str, int, int]]:
        """Yield stage, task set, and how many runs are done and left, each counted once.

        Of searches that have not ended, and of seeds after them, the usual number is taken.
        """
        counted: set[tuple[str, str]] = set()
        for stage in STAGES:
            for task in (t for t in stage.tasks if not only or t in only):
                done = left = 0
                for experiment in filter(stage.takes, self.experiments.values()):
                    base = reference(experiment, self.experiments)
                    for own in {base.id: base, experiment.id: experiment}.values():
                        if (task, own.id) not in counted:
                            counted.add((task, own.id))
                            tried = sum(run[:2] == (task, own.id) for run in self.results)
                            done, left = done + tried, left + self._left(task, own, tried)
                yield stage, task, done, left

    def _left(self, task: str, experiment: Experiment, tried: int) -> int:
        base = reference(experiment, self.experiments)
        missing = self.search(task, base).missing
        if not missing:
            return sum(run not in self.results for run in self.chosen(task, experiment))
        if experiment is not base:
            return len(SEEDS)
        return max(len(missing), USUAL_SEARCH - tried) + len(SEEDS) - 1


def _next_to(point: Point, axes: Point) -> list[Point]:
    """Return the points of a grid beside one, above and below it."""
    i, j = point
    around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
    return [(a, b) for a, b in around if 0 <= a < axes[0] and 0 <= b < axes[1]]
