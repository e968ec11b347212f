# SPDX-License-Identifier: Apache-2.0
"""The benchmark of Python's share of a forward, as a user runs it; no time is ever asserted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_model_has_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    output = tmp_path / "new" / "host_time.json"

    script = importlib.import_module("host_time")
    script.main(["--layers", "3", "--rounds", "1", "--output", str(output)])

    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == list(script.make_jobs(2))
    assert all(row[part] > 0 for row in rows for part in script.PARTS)
    assert capsys.readouterr().out.count("\n") == len(rows) + 2
