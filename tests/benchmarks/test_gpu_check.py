# SPDX-License-Identifier: Apache-2.0
"""The check for a card, on the CPU with a tiny model: that it runs, finds faults and says so."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python benchmarks/gpu_check.py` does
    return importlib.import_module("gpu_check")


@pytest.mark.filterwarnings("ignore:::torch")
@pytest.mark.filterwarnings("ignore:.*User provided device_type of 'cuda'.*:UserWarning")
def test_all_checks_run_small_where_there_is_no_card(check: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "new" / "gpu.json"

    code = check.main(["--output", str(output)])

    found = json.loads(output.read_text())
    failed = {
        f"{name}: {what}": finding
        for name, findings in found["checks"].items()
        for what, finding in findings.items()
        if not finding["ok"]
    }
    assert not failed
    assert code == 0
    assert list(found["checks"]) == list(check.CHECKS)
    assert "cudnn_tf32" in found["machine"]


def test_what_is_not_as_it_must_be_fails_and_hides_nothing_behind_it(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(place):
        yield "first", {"ok": False}
        raise RuntimeError("a card that is too small")

    monkeypatch.setitem(check.CHECKS, "reload", broken)
    monkeypatch.setitem(check.CHECKS, "switching", lambda place: iter([("a", {"ok": True})]))
    output = tmp_path / "gpu.json"

    assert check.main(["--only", "reload", "switching", "--output", str(output)]) == 1
    found = json.loads(output.read_text())["checks"]
    assert found["reload"]["error"]["error"] == "RuntimeError: a card that is too small"
    assert found["switching"] == {"a": {"ok": True}}


def test_nothing_new_begins_when_the_time_is_over(check: ModuleType) -> None:
    found = check.run(check.Place("cpu"), ["switching", "repeat"], seconds=0)

    assert found["switching"]["the rest"]["not run"] == "0 s were over"
    assert found["repeat"]["time"]["not run"] == "0 s were over"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reload", "switching", "optimizers", "waits", "trainer"])
def test_a_card_passes_each_check(check: ModuleType, name: str) -> None:
    found = check.run(check.Place("cuda"), [name], seconds=120)[name]

    assert all(finding["ok"] for finding in found.values()), found
    torch.cuda.empty_cache()
