# SPDX-License-Identifier: Apache-2.0
"""Experiments: folders as in PEFT's `method_comparison`, `experiments/<method>/<name>`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent / "experiments"
CONFIG_NAME, PARAMS_NAME = "adapter_config.json", "training_params.json"
_BUDGET = re.compile(r"(\d+)pct")


@dataclass(frozen=True)
class Experiment:
    """One way to adapt a backbone.

    Attributes:
        method: The folder's first part; all experiments of a method share its rates.
        name: The folder's second part: `5pct` is a budget of 5 %.
        config: `adapter_config.json`: a config of PEFT's (with `peft_type`), or options of the
            example scripts (`method`, `budget`).
        params: `training_params.json`: what differs from the task set's way to train. Options of
            the scripts; `own_rates` for rates of its own; `external_lr_ratio`, the rate of new
            layers over that of pretrained weights; `selection_of`, a task set on which the
            weights are selected before, at the same rates.
    """

    method: str
    name: str
    config: dict[str, Any]
    params: dict[str, Any]

    @property
    def id(self) -> str:
        """Method and name."""
        return f"{self.method}/{self.name}"

    @property
    def percent(self) -> int | None:
        """The budget that its name says; None for variants, and where a method has none."""
        found = _BUDGET.fullmatch(self.name)
        return int(found[1]) if found else None

    @property
    def is_ablation(self) -> bool:
        """Whether it is a line of an ablation, and of no other table."""
        return self.name.startswith(("table", "criterion", "length"))

    @property
    def trains_backbone(self) -> bool:
        """Whether it needs a rate beside the head's."""
        return self.config.get("method") != "frozen"


def load_experiments(folder: Path = EXPERIMENTS) -> dict[str, Experiment]:
    """Return all experiments by id."""
    found = {}
    for path in sorted(folder.glob(f"*/*/{CONFIG_NAME}")):
        params = path.with_name(PARAMS_NAME)
        experiment = Experiment(
            path.parts[-3],
            path.parts[-2],
            json.loads(path.read_text("utf-8")),
            json.loads(params.read_text("utf-8")) if params.exists() else {},
        )
        found[experiment.id] = experiment
    return found


def reference(experiment: Experiment, experiments: dict[str, Experiment]) -> Experiment:
    """Return the experiment whose rates another takes: its method's at 5 %, or of one size."""
    if experiment.params.get("own_rates"):
        return experiment
    own = (f"{experiment.method}/{name}" for name in ("5pct", "all"))
    return next((experiments[i] for i in own if i in experiments), experiment)
