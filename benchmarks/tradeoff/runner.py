# SPDX-License-Identifier: Apache-2.0
"""Runs what is left, one process for each run, with a bar that says how long it takes."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from .experiments import Experiment
from .plan import Plan
from .store import Run, Store

#: Seconds between two looks at the processes.
_PAUSE = 0.5


class Runner:
    """Works a plan off.

    Args:
        store: Where results are read from and written to.
        experiments: By id.
        execute: Makes the result of a run; called in a process of its own.
        warm: Called before with the run, in this process, of which the others are forked.
        only: Names of task sets; all if empty.
        jobs: Processes at a time.
        budget_minutes: No run begins that is expected to end later; None for no limit.
    """

    def __init__(
        self,
        store: Store,
        experiments: dict[str, Experiment],
        execute: Callable[[Run, Experiment], dict[str, Any]],
        *,
        warm: Callable[[Run], None] = lambda _: None,
        only: Sequence[str] = (),
        jobs: int = 1,
        budget_minutes: float | None = None,
    ) -> None:
        self.store, self.experiments, self.execute = store, experiments, execute
        self.warm, self.only, self.jobs = warm, only, jobs
        self.end = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
        self.failed: set[Run] = set()  # without a result: a mistake in the code, or killed
        self._running: dict[Run, BaseProcess] = {}

    def work(self) -> int:
        """Run until nothing is left or the time is up; return how many runs ended."""
        # Forked: torch and the scripts are imported once. No thread of torch's has begun yet.
        context, tqdm.monitor_interval = multiprocessing.get_context("fork"), 0
        # Nor may it have asked a card for anything but its presence: a fork could not use it then.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        ended: list[Run] = []
        with tqdm(
            bar_format="{percentage:3.0f}%|{bar:20}| {elapsed} < {remaining}{postfix}"
        ) as bar:
            while True:
                plan = Plan(self.experiments, self.store.read())
                for run in self._startable(plan):
                    self._start(run, context)
                if not self._running:
                    return len(ended)
                self._show(bar, plan, ended)
                ended += self._wait()

    def _startable(self, plan: Plan) -> Iterator[Run]:
        """Yield and claim runs while a process is free."""
        for run in plan.todo(self.only):
            if len(self._running) >= self.jobs:
                return
            late = self.end is not None and time.monotonic() + plan.seconds(run.task) > self.end
            if late or run in self.failed or run in self._running or not self.store.claim(run):
                continue
            yield run

    def _start(self, run: Run, context: Any) -> None:
        """Start the process of a run that is claimed."""
        try:
            self.warm(run)
        except Exception:  # such as of data that cannot be read; other task sets go on
            traceback.print_exc()
            self.failed.add(run)
            self.store.give_up(run)
            return
        self._running[run] = context.Process(target=self._execute, args=(run,))
        self._running[run].start()

    def _execute(self, run: Run) -> None:
        """Make a result and write it (in the new process)."""
        try:
            self.store.write(run, self.execute(run, self.experiments[run.experiment]))
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None

    def _wait(self) -> list[Run]:
        """Wait until a process ends; return the runs that did."""
        while all(process.is_alive() for process in self._running.values()):
            time.sleep(_PAUSE)
        over = [run for run, process in self._running.items() if not process.is_alive()]
        for run in over:
            if self._running.pop(run).exitcode != 0:
                self.failed.add(run)
            self.store.give_up(run)
        return over

    def _show(self, bar: Any, plan: Plan, ended: list[Run]) -> None:
        """Draw the bar: by the seconds that runs take, of the runs that are known now."""
        left = [run for run in plan.todo(self.only) if run not in self.failed]
        seconds = {task: plan.seconds(task) for task in {run.task for run in (*ended, *left)}}
        bar.n = sum(seconds[run.task] for run in ended)
        bar.total = bar.n + sum(seconds[run.task] for run in left)
        now = ", ".join(f"{run.task} {run.experiment}" for run in self._running)
        bar.set_postfix_str(f"{len(ended)} of {len(ended) + len(left)} runs; {now}")
