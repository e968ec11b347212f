# SPDX-License-Identifier: Apache-2.0
"""What a script shows of its training: rows that can be read, in place of dicts."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

LOG = {"loss": 1.25, "learning_rate": 3e-3, "grad_norm": 0.5, "epoch": 0.1}
SELECTED = {"sfa_round": 2, "sfa_selected": 0.25, "sfa_score/p50": 1e-5}


def show(monkeypatch: pytest.MonkeyPatch, logs: list[tuple[int, dict[str, Any]]]) -> None:
    """Log at some steps; half a second passes for each step."""
    progress = importlib.import_module("common.progress")
    state = SimpleNamespace(is_world_process_zero=True, max_steps=40, global_step=0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 100 + state.global_step / 2)
    table: Any = progress.TrainingTable()
    table.on_train_begin(None, state, None)
    for step, log in logs:
        state.global_step = step
        table.on_log(None, state, None, logs=log)
    table.on_train_end(None, state, None)


def test_losses_are_rows_below_headings_that_come_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show(monkeypatch, [(10, LOG), (20, LOG), (30, LOG | SELECTED)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["step", "loss", "rate", "gradient", "s/step"],
        ["10", "1.2500", "3.00e-03", "0.50", "0.50"],
        ["20", "1.2500", "3.00e-03", "0.50", "0.50"],
        ["step", "loss", "rate", "gradient", "round", "selected", "s/step"],
        ["30", "1.2500", "3.00e-03", "0.50", "2", "25%", "0.50"],
    ]


def test_an_evaluation_is_a_line_without_classes_and_timings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"eval_mean_iou": 0.5, "eval_iou_sky": 0.9, "eval_runtime": 3.0, "epoch": 1}
    show(monkeypatch, [(40, scores), (40, {"train_runtime": 3.0, "epoch": 1})])
    assert capsys.readouterr().out.split() == ["40", "evaluation:", "mean_iou", "0.5000"]
