# SPDX-License-Identifier: Apache-2.0
"""The switching benchmark as a user runs it, on a tiny model; no time is ever asserted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_tables_have_every_method_and_sfa_leaves_no_bit_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    switching = importlib.import_module("switching")
    monkeypatch.setattr(switching, "CYCLES", (1, 3))
    output = tmp_path / "new" / "switching.json"
    options = "--backbone nano --resolution 64 --rounds 2 --forward_rounds 1 --budget 0.2 --output"

    assert switching.main([*options.split(), str(output)]) == 0

    printed = capsys.readouterr().out
    assert f"$ python benchmarks/switching.py {options}" in printed
    results = json.loads(output.read_text())
    rows = {row["method"]: row for row in results["switches"]}
    assert len(rows["sfa_both"]["switch"]) == len(rows["dense copy"]["switch"]) == 4
    assert "allows SHiRA" in rows["shira"]["failure"]
    exact = {row["method"]: row for row in results["exactness"]}
    assert exact["sfa_internal"]["left_3"] == exact["sfa_both"]["left_3"] == 0
    assert exact["lora"]["left_1"] > 0
    assert [row["method"] for row in results["forwards"]] == [
        "bare",
        "bare, again",
        "internal",
        "external",
        "both",
    ]
