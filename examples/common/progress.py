# SPDX-License-Identifier: Apache-2.0
"""What is seen while a script trains: a bar with the time left, and a table of losses."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# Of a row: its heading, the key of the Trainer's log, and how it is written.
COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("rate", "learning_rate", "{:.2e}"),
    ("gradient", "grad_norm", "{:.2f}"),
    ("round", "sfa_round", "{:.0f}"),
    ("selected", "sfa_selected", "{:.0%}"),
)
WIDTH = 10


class TrainingTable(ProgressCallback):
    """The Trainer's bar; what it logs becomes rows above the bar and not dicts.

    Everything is in `trainer.state.log_history` and in what reporters get, as without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._headings: list[str] = []
        self._last = (0, 0.0)  # step and time of the last row

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; it is seen on a terminal only, and not in a file."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step = 0
        self._headings, self._last = [], (state.global_step, time.perf_counter())

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far an evaluation is, on a terminal."""
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a row of a training log, and a line of an evaluation's scores."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.write("\n".join(self._rows(state.global_step, logs)))
        elif any(name.startswith("eval_") for name in logs):
            self.training_bar.write(scores_line(state.global_step, logs))

    def _rows(self, step: int, logs: dict[str, Any]) -> list[str]:
        """Return the row of a log, after headings where it has others than the row before."""
        before, now = self._last, time.perf_counter()
        self._last = (step, now)
        shown = [column for column in COLUMNS if column[1] in logs]
        cells = [str(step), *(form.format(float(logs[key])) for _, key, form in shown)]
        cells.append(f"{(now - before[1]) / max(1, step - before[0]):.2f}")
        headings = ["step", *(heading for heading, _, _ in shown), "s/step"]
        rows = [cells] if headings == self._headings else [headings, cells]
        self._headings = headings
        return ["".join(cell.rjust(WIDTH) for cell in row) for row in rows]


def scores_line(step: int, logs: dict[str, Any]) -> str:
    """Return an evaluation's scores that are neither of one class nor a timing."""
    names = {name: name.removeprefix("eval_") for name in logs}
    timings = ("runtime", "per_second", "preparation_time", "epoch")
    shown = [
        f"{name} {float(logs[key]):.4f}"
        for key, name in names.items()
        if not name.endswith(timings) and not name.startswith(("iou_", "accuracy_"))
    ]
    return f"{step:>{WIDTH}}  evaluation: {', '.join(shown)}"
