# SPDX-License-Identifier: Apache-2.0
"""The cost benchmark as a user runs it, on a tiny model; no time is ever asserted."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--backbone", "nano", "--resolution", "64", "--threads", "1", "--steps", "1"]


SETTINGS = {
    "backbone": "nano",
    "resolution": 64,
    "batch_size": 1,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "steps": 1,
    "rounds": 2,
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python benchmarks/cost.py` does
    return importlib.import_module


@pytest.fixture
def cost(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("cost")


def test_the_table_has_what_ran_and_says_what_did_not(
    cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "cost.json"
    options = ["--methods", "full", "sfa_external", "--budget", "0.0001", "--output", str(output)]

    code = cost.main([*SMALL, "--rounds", "2", *options])

    assert code == 1  # one row failed
    printed = capsys.readouterr().out
    assert "$ python benchmarks/cost.py --backbone nano" in printed
    assert "FAILED: BudgetError: budget=0.0001" in printed
    full, external = json.loads(output.read_text())["rows"]
    assert full["trained"] == full["backbone"]
    assert full["peak_bytes"] > full["imports_bytes"] > 0
    assert [len(seconds) for seconds in full["rounds"]] == [1, 1]
    assert all(seconds > 0 for turn in full["rounds"] for seconds in turn)
    assert external["failure"] in printed


@pytest.mark.parametrize(
    "method", ["lora", "shira", "super_tuning", "sfa_internal", "sfa_both", "sfa_external"]
)
def test_methods_train_as_many_parameters(
    load: Callable[[str], ModuleType], cost: ModuleType, method: str
) -> None:
    job_class = load("cost_worker").Job
    for case in cost.make_cases([method], [0.1]):
        job = job_class(case.to_dict(), SETTINGS)

        assert len(job.steps(2)["seconds"]) == 2
        trained = load("cost_models").trained_parameters(job.model)
        # Ranks and widths are whole numbers, which is coarse on a model this small.
        assert trained == pytest.approx(0.1 * job.size, rel=0.25)


def test_a_run_in_the_middle_scores_and_one_after_the_last_pick_does_not(
    load: Callable[[str], ModuleType], cost: ModuleType
) -> None:
    job_class = load("cost_worker").Job
    scoring, after = (
        job_class(case.to_dict(), SETTINGS) for case in cost.make_cases(["sfa_internal"], [0.1])
    )

    assert 0.4 < scoring.selector.selected_share < 0.5  # 9 of 19 picks
    assert scoring.selector.state_dict()["sums"]
    assert after.selector.selected_share == 1
    assert not after.selector.state_dict()["sums"]
    for job in (scoring, after):
        slots = job.selector.pool.slots[: job.selector.selected]
        assert len(slots.unique()) == len(slots)


def test_each_pick_is_measured_beside_a_plain_topk(
    load: Callable[[str], ModuleType], cost: ModuleType
) -> None:
    (case,) = cost.make_cases(["pick"], [0.1])
    job = load("cost_worker").Job(case.to_dict(), SETTINGS)
    before = job.selector.selected

    pick = job.pick()

    assert job.selector.selected - before == pick["selected"] > 0
    assert pick["eligible"] == job.selector.pool.starts[-1]
    assert pick["topk_seconds"] > 0
    assert job.peak()["peak_bytes"] > 0


def test_options_that_do_not_exist_and_budgets_too_large_are_named(
    load: Callable[[str], ModuleType],
) -> None:
    models = load("cost_models")
    case = {"phase": "scoring", "budget": 0.9, "options": {"not_a_field": 1}}
    task = models.make_task("nano", 64, torch.float32, "cpu")

    with pytest.raises(models.NotAvailable, match="SFAConfig has no field not_a_field"):
        models.prepare(task, case | {"method": "sfa_internal"})
    with pytest.raises(models.NotAvailable, match="a layer here allows SHiRA 8"):
        models.prepare(task, case | {"method": "shira"})


def test_ratios_are_taken_within_a_round(cost: ModuleType) -> None:
    full = {"method": "full", "phase": "", "budget": None, "cycle": 1}
    full |= {"rounds": [[2.0], [4.0], [2.0]]}
    after = {"method": "sfa_internal", "phase": "after", "budget": 0.05, "cycle": 1}
    after |= {"rounds": [[1.5], [3.2], [1.5]], "peak_bytes": 1}  # load hit the second round

    cost.add_ratios([full, after])

    assert after["to_full"] == 0.75
    assert after["to_full_spread"] == [0.75, 0.8]
    assert [str(bar) for bar in cost.bars_of(after, SETTINGS)] == ["step/full<=0.7 FAIL"]


def test_bfloat16_scores_are_compared_with_exact_ones_and_memory_with_that_of_lora(
    cost: ModuleType,
) -> None:
    row = {"phase": "scoring", "budget": 0.05, "cycle": 1, "peak_bytes": 90}
    exact = row | {"method": "sfa_internal", "rounds": [[1.0], [2.0]]}
    bf16 = row | {"method": "sfa_internal_bf16", "rounds": [[1.25], [2.0]]}
    after = row | {"method": "sfa_both", "phase": "after"}
    lora = row | {"method": "lora_r16", "phase": "", "budget": None, "peak_bytes": 100}

    cost.add_ratios([lora, exact, bf16, after])

    assert bf16["to_exact"] == 1.125
    assert "step/exact<=1.05 FAIL" in map(str, cost.bars_of(bf16, SETTINGS))
    assert [str(bar) for bar in cost.bars_of(after, SETTINGS)] == ["GB/LoRA r16<=1 ok"]


def test_a_step_in_four_that_scores_counts_by_a_quarter(cost: ModuleType) -> None:
    row = {"cycle": 4, "rounds": [[1.0, 1.0, 1.0, 5.0]]}

    assert cost.turn_seconds(row) == [2.0]
    assert cost.turn_seconds(row | {"cycle": 1}) == [1.0]


def test_memory_bars_stand_only_where_they_are_meant(cost: ModuleType) -> None:
    row = {"method": "sfa_internal", "phase": "after", "budget": 0.05, "peak_bytes": 1.5e9}
    settings = SETTINGS | {"backbone": "base", "resolution": 256}

    (bar,) = cost.bars_of(row, settings)

    assert (bar.name, bar.is_met) == ("GB", False)
    assert cost.bars_of(row, settings | {"batch_size": 2}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "100"], "--resolution: 100 px"),
        (["--resolution", "32"], "--resolution: 32 px"),
        (["--budget", "1.5"], "--budget: expected shares"),
        (["--rounds", "0"], "--rounds: expected 1 or more"),
        (["--methods", "adapters"], "invalid choice: 'adapters'"),
    ],
)
def test_options_that_cannot_work_are_refused(
    cost: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cost.main(options)

    assert message in capsys.readouterr().err
