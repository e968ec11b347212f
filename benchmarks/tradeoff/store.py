# SPDX-License-Identifier: Apache-2.0
"""Results, one file for each run, and claims, so that nothing is run twice."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TextIO

RESULTS = Path(__file__).parent / "results"


class Run(NamedTuple):
    """What makes a run different from all others.

    Attributes:
        task: Name of the task set.
        experiment: Id of the experiment.
        backbone_rate: Learning rate of what is trained in the backbone; 0 where nothing is.
        head_rate: Learning rate of the head.
        seed: Of head, data order and augmentation.
    """

    task: str
    experiment: str
    backbone_rate: float
    head_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        method = self.experiment.replace("/", "--")
        return f"{method}--b{self.backbone_rate:g}-h{self.head_rate:g}-s{self.seed}"


class Store:
    """The results in a folder.

    Args:
        folder: It has a folder for each task set.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._known: dict[Path, dict[str, Any]] = {}
        self._claims: dict[Run, TextIO] = {}

    def path(self, run: Run) -> Path:
        """Return the file of a run's result."""
        return self.folder / run.task / f"{run.name}.json"

    def read(self) -> dict[Run, dict[str, Any]]:
        """Return all results; a file that was read before is not read again."""
        found = {}
        for path in sorted(self.folder.glob("*/*.json")):
            if path not in self._known:
                self._known[path] = json.loads(path.read_text("utf-8"))
            result = self._known[path]
            found[run_of(result)] = result
        return found

    def write(self, run: Run, result: dict[str, Any]) -> None:
        """Write a result, whole or not at all."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(result) + "\n", "utf-8")
        partial.replace(path)

    def claim(self, run: Run) -> bool:
        """Claim a run; False if it is done, or somebody else is at it.

        A claim is a lock on a file, so it ends with the processes that hold it.
        """
        path = self.path(run).with_suffix(".claim")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._claims[run] = file
        if self.path(run).exists():  # finished between two looks
            self.give_up(run)
            return False
        return True

    def give_up(self, run: Run) -> None:
        """Take a claim back."""
        file = self._claims.pop(run)
        Path(file.name).unlink(missing_ok=True)
        file.close()


def run_of(result: dict[str, Any]) -> Run:
    """Return the run that a result is of."""
    info = result["run_info"]
    config = info["train_config"]
    return Run(
        config["task"],
        info["experiment_name"],
        config["backbone_rate"],
        config["head_rate"],
        config["seed"],
    )


def score(result: dict[str, Any], split: str, metric: str) -> float | None:
    """Return the last score of a split, `valid` or `test`; None where the run failed."""
    key, metrics = f"{split} {metric}", result["train_info"]["metrics"]
    return next((m[key] for m in reversed(metrics) if m.get(key) is not None), None)
