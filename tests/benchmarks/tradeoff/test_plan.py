# SPDX-License-Identifier: Apache-2.0
"""What is run, in which order, and how rates are chosen."""

import math

import pytest

from benchmarks.tradeoff.experiments import load_experiments, reference
from benchmarks.tradeoff.plan import STAGES, Plan
from benchmarks.tradeoff.tasks import BACKBONE_RATES, HEAD_FACTORS, TASKS
from tests.benchmarks.tradeoff.made import experiments, result, work_off

SEGMENTATION = ["segmentation"]


def peak_at(backbone, head):
    """A score with one peak on the grid, for the task set's own head rates."""

    def score(run):
        away = abs(math.log(run.backbone_rate / backbone)) if run.backbone_rate else 0.0
        return 1 - 0.1 * away - 0.1 * abs(math.log(run.head_rate / head))

    return score


@pytest.mark.parametrize("backbone", BACKBONE_RATES)
@pytest.mark.parametrize("factor", HEAD_FACTORS)
def test_the_search_finds_the_best_rates_wherever_they_are(backbone, factor):
    head = float(f"{6e-3 * factor:.3g}")
    plan = Plan(experiments("sfa/5pct"), {})
    order = work_off(plan, peak_at(backbone, head), only=SEGMENTATION)
    chosen = plan.chosen("segmentation", plan.experiments["sfa/5pct"])
    assert {run[2:4] for run in chosen} == {(backbone, head)}
    assert [run.seed for run in chosen] == [0, 1, 2]
    assert len(order) == len(set(order)) < len(BACKBONE_RATES) * len(HEAD_FACTORS)
    assert order[-2:] == chosen[1:]


def test_a_smaller_error_is_better():
    plan = Plan(experiments("sfa/5pct"), {})
    peak = peak_at(1.5e-3, 6e-3)
    work_off(plan, lambda run: 10 - peak(run), only=["depth"])
    assert plan.chosen("depth", plan.experiments["sfa/5pct"])[0].backbone_rate == 1.5e-3


def test_test_scores_choose_nothing():
    orders = []
    for test in (lambda run: 0.5, lambda run: run.backbone_rate, lambda run: -run.backbone_rate):
        plan = Plan(experiments("sfa/5pct", "sfa/20pct", "lora/5pct"), {})
        orders.append(work_off(plan, peak_at(1e-2, 6e-3), test, only=SEGMENTATION))
    assert orders[0] == orders[1] == orders[2]


def test_other_seeds_choose_nothing():
    plan = Plan(experiments("sfa/5pct"), {})
    work_off(plan, peak_at(4e-3, 6e-3), only=SEGMENTATION)
    before = plan.chosen("segmentation", plan.experiments["sfa/5pct"])
    better = {run._replace(backbone_rate=2.5e-2, seed=1): result(run, 9.0) for run in before}
    plan.results = {**plan.results, **better}
    assert plan.chosen("segmentation", plan.experiments["sfa/5pct"]) == before


def test_runs_that_failed_are_the_worst():
    plan = Plan(experiments("sfa/5pct"), {})
    score = peak_at(2.5e-2, 6e-3)
    work_off(plan, lambda r: None if r.backbone_rate > 2e-2 else score(r), only=SEGMENTATION)
    assert plan.chosen("segmentation", plan.experiments["sfa/5pct"])[0].backbone_rate == 1e-2


def test_where_only_the_head_is_trained_only_its_rate_is_searched():
    plan = Plan(experiments("frozen/all"), {})
    order = work_off(plan, peak_at(1, 6e-3), only=SEGMENTATION)
    assert {run.backbone_rate for run in order} == {0.0}
    assert len(order) == 3 + 2


def test_all_begin_before_one_goes_on_and_seeds_come_last():
    plan = Plan(experiments("sfa/5pct", "lora/5pct"), {})
    order = work_off(plan, peak_at(4e-3, 6e-3), only=SEGMENTATION)
    assert {run.experiment for run in order[:2]} == {"sfa/5pct", "lora/5pct"}
    assert order[0][2:] == order[1][2:]
    assert [run.seed for run in order] == [0] * 10 + [1, 1, 2, 2]


def test_other_budgets_take_the_rates_of_five_percent():
    plan = Plan(experiments("sfa/5pct", "sfa/20pct"), {})
    order = work_off(plan, peak_at(1e-2, 6e-3), only=SEGMENTATION)
    others = [run for run in order if run.experiment == "sfa/20pct"]
    assert {run[2:4] for run in others} == {(1e-2, 6e-3)}
    assert [run.seed for run in others] == [0, 1, 2]


def test_what_is_left_is_counted_once_and_ends_at_nothing():
    plan = Plan(experiments("sfa/5pct", "sfa/20pct", "full/all"), {})
    first = list(plan.status(SEGMENTATION))
    assert sum(done for *_, done, _ in first) == 0
    order = work_off(plan, peak_at(4e-3, 6e-3), only=SEGMENTATION)
    last = list(plan.status(SEGMENTATION))
    assert sum(done for *_, done, _ in last) == len(order)
    assert sum(left for *_, left in last) == 0
    assert sum(left for *_, left in first) >= len(order)


def test_a_run_costs_what_those_before_cost():
    plan = Plan(experiments("full/all"), {})
    assert plan.seconds("segmentation") == TASKS["segmentation"].cpu_seconds
    work_off(plan, peak_at(4e-3, 6e-3), only=SEGMENTATION)
    assert plan.seconds("segmentation") == 36


def test_data_that_is_not_here_is_left_to_another_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("TRADEOFF_CAMVID", raising=False)
    plan = Plan(experiments("full/all"), {})
    assert not plan.todo(["camvid"])
    monkeypatch.setenv("TRADEOFF_CAMVID", str(tmp_path))
    assert plan.todo(["camvid"])


def test_every_experiment_has_a_stage_and_a_known_method():
    found = load_experiments()
    assert {"frozen/all", "full/all", "sfa/5pct", "lora/5pct"} <= set(found)
    for experiment in found.values():
        assert any(stage.takes(experiment) for stage in STAGES), experiment.id
        assert "peft_type" in experiment.config or experiment.config["method"], experiment.id
        assert reference(experiment, found).id in found
        budget = experiment.config.get("budget")
        assert experiment.percent is None or budget == experiment.percent / 100
