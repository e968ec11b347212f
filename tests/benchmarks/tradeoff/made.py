# SPDX-License-Identifier: Apache-2.0
"""Experiments and results made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.tradeoff.experiments import Experiment
from benchmarks.tradeoff.plan import Plan
from benchmarks.tradeoff.store import Run
from benchmarks.tradeoff.tasks import TASKS

Score = Callable[[Run], float | None]


def experiments(*ids: str) -> dict[str, Experiment]:
    """Return experiments of some ids; `frozen` trains the head only."""
    found = {}
    for text in ids:
        method, name = text.split("/")
        found[text] = Experiment(method, name, {"method": method}, {})
    return found


def result(run: Run, valid: float | None, test: float | None = None) -> dict[str, Any]:
    """Return a result as a run would write it; None is that of a run that failed."""
    metric = TASKS[run.task].metric
    end = {"step": 4, f"test {metric}": valid if test is None else test, "forgetting": 0.25}
    info = {
        "status": "failed" if valid is None else "success",
        "metrics": [
            {"step": 2, f"valid {metric}": None if valid is None else valid / 2},
            {"step": 4, f"valid {metric}": valid},
            end | {"probe images": "rendered"},
        ],
        "trained_share": {"frozen": 0.0, "full": 1.0}.get(run.experiment.split("/")[0], 0.05),
        "step_cpu_seconds": 0.1,
        "accelerator_memory_max": 5e8,
        "file_size": 1000,
        "selected": {"1": 0.5, "2": 0.25, "other": 0.1},
    }
    config = run._asdict()
    return {
        "run_info": {
            "experiment_name": run.experiment,
            "train_config": config,
            "cpu_seconds": 36.0,
        },
        "train_info": info,
    }


def work_off(
    plan: Plan, valid: Score, test: Score | None = None, only: Iterable[str] = ()
) -> list[Run]:
    """Give every run that is left its scores, one after the other; return them in order."""
    order = []
    while runs := plan.todo(tuple(only)):
        order.append(runs[0])
        made = result(runs[0], valid(runs[0]), None if test is None else test(runs[0]))
        plan.results = {**plan.results, runs[0]: made}
    return order
