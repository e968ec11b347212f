# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cheaper scores, with few steps: exact scores select the same each time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_an_exact_run_finds_all_of_itself_and_less_on_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    output = tmp_path / "scores.json"
    options = ["--steps", "4", "--selection_steps", "2", "--batch_size", "2", "--every", "2"]

    importlib.import_module("scores").main([*options, "--threads", "1", "--output", str(output)])

    rows = {row["run"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["exact, again"]["recall_first"] == 1
    assert rows["exact, again"]["recall_end"] == 1
    assert 0 < rows["exact, other images"]["recall_first"] < 1
    for name in ("score_dtype=bfloat16", "score_every=2"):
        assert "recall_first" in rows[name] or "failure" in rows[name]
