# SPDX-License-Identifier: Apache-2.0
"""The commands as a user types them."""

import pytest

from benchmarks.tradeoff.__main__ import main
from benchmarks.tradeoff.ablations import ABLATIONS
from benchmarks.tradeoff.experiments import load_experiments, reference
from benchmarks.tradeoff.plan import Plan
from benchmarks.tradeoff.store import Run, Store
from tests.benchmarks.tradeoff.made import result, work_off


def test_status_prints_what_is_done_and_left_in_cpu_hours(tmp_path, capsys):
    run = Run("segmentation", "lora/5pct", 4e-3, 6e-3, 0)
    Store(tmp_path).write(run, result(run, 0.5))
    main(["--results", str(tmp_path), "status", "--task", "segmentation"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["stage", "task", "set", "done", "left", "CPU", "h", "left"]
    assert last.split()[:2] == ["all", "1"]
    assert float(last.split()[-1]) > 1


def test_report_writes_the_page_where_it_is_told(tmp_path, capsys):
    main(["--results", str(tmp_path / "none"), "report", "--output", str(tmp_path)])
    assert "0 runs" in capsys.readouterr().out
    assert (tmp_path / "tradeoff.md").exists()


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_runs_what_its_lines_name_and_the_search_before(name):
    ablation, every = ABLATIONS[name], load_experiments()
    own = ablation.among(every)
    assert {experiment for _, _, experiment in ablation.lines} <= set(own)
    assert all(
        reference(experiment, own).id == reference(experiment, every).id
        for experiment in own.values()
    )


def test_the_papers_line_stands_beside_ours():
    ablation = ABLATIONS["table6"]
    plan = Plan(ablation.among(load_experiments()), {})
    assert "±" not in ablation.table(plan)
    assert ablation.section(plan) == []
    work_off(plan, lambda run: 0.5 + run.seed / 100, only=["segmentation"])
    line = next(x for x in ablation.table(plan).splitlines() if x.startswith("| both 10 % |"))
    assert line.startswith(
        "| both 10 % | 55.1 | sfa/10pct | 5.0% | 0.510 ± 0.010 | 100 | 500 | - |"
    )


def test_a_task_set_that_is_none_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path), "run", "--task", "chess"])
