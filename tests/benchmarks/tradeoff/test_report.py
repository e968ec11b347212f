# SPDX-License-Identifier: Apache-2.0
"""The page from a few results made by hand."""

import pytest

from benchmarks.tradeoff.plan import Plan
from benchmarks.tradeoff.report import write_report
from benchmarks.tradeoff.rows import make_rows
from tests.benchmarks.tradeoff.made import experiments, result, work_off

#: Test scores by experiment, for seeds 0, 1 and 2.
SCORES = {
    "frozen/all": (0.5, 0.5, 0.5),
    "full/all": (0.66, 0.66, 0.66),
    "internal/5pct": (0.6, 0.6, 0.6),
    "lora/5pct": (0.55, 0.56, 0.57),
    "sfa/5pct": (0.59, 0.60, 0.61),
    "sfa/20pct": (0.65, 0.66, 0.67),
    "sfa/try-more": (0.7, 0.7, 0.7),
}


@pytest.fixture
def plan():
    plan = Plan(experiments(*SCORES), {})
    work_off(
        plan,
        lambda run: 0.5 - abs(run.backbone_rate - 4e-3) - abs(run.head_rate - 6e-3),
        lambda run: SCORES[run.experiment][run.seed],
        only=["segmentation"],
    )
    return plan


def line_of(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return line


def test_scores_are_means_of_test_data_and_half_of_their_range(plan, tmp_path):
    write_report(plan, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    assert "0.560 ± 0.010" in line_of(page, "lora")
    assert "0.560 ± 0.010" in line_of(page, "lora/5pct")
    assert "| 0.004 | 0.006 |" in line_of(page, "lora/5pct")


def test_a_rate_at_an_end_of_the_grid_is_marked(tmp_path):
    plan = Plan(experiments("sfa/5pct"), {})
    work_off(plan, lambda run: run.backbone_rate - run.head_rate, only=["segmentation"])
    write_report(plan, tmp_path)
    line = line_of((tmp_path / "tradeoff.md").read_text(), "sfa/5pct")
    assert line.endswith("| 0.025* | 0.00096* |")


def test_bold_are_the_best_and_those_that_are_not_beaten(plan, tmp_path):
    write_report(plan, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    within = page.split("## Within 5 %")[1].split("##")[0]
    bold = [line.split("|")[1].strip() for line in within.splitlines() if "**" in line]
    assert bold == ["internal", "sfa"]


def test_a_difference_inside_the_spread_is_called_none(plan, tmp_path):
    write_report(plan, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    verdict = page.split("## Where the goals are met")[1]
    assert "| segmentation | frozen, lora | - | - | level or better |" in verdict
    rows = {row.experiment.id: row for row in make_rows(plan, "segmentation", lambda _: True)}
    assert not rows["internal/5pct"].beats(rows["sfa/5pct"])
    assert not rows["sfa/5pct"].beats(rows["internal/5pct"])


def test_without_all_seeds_nothing_is_compared(plan, tmp_path):
    lost = next(r for r in plan.results if r.experiment == "internal/5pct" and r.seed == 2)
    plan.results = {k: v for k, v in plan.results.items() if k != lost}
    write_report(plan, tmp_path)
    within = (tmp_path / "tradeoff.md").read_text().split("## Within 5 %")[1].split("##")[0]
    assert line_of(within, "internal") == "| internal | 5.0% | 0.600 ± 0.000 (2 of 3 seeds) |"
    assert "**" in line_of(within, "sfa")


def test_experiments_whose_rates_are_still_searched_are_left_out(plan, tmp_path):
    unfinished = next(r for r in plan.results if r[1:3] == ("lora/5pct", 1e-2))
    plan.results = {k: v for k, v in plan.results.items() if k != unfinished}
    write_report(plan, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    assert "| segmentation | lora/5pct | 4 | 0.500 | 0.004, 0.006 |" in page
    assert "lora" not in page[page.index("## Within") : page.index("## Table 4")]
    assert (
        "| segmentation | Semantic segmentation, rendered scenes | 38 | 6 | 7 |" in page
    )  # of 39 runs


def test_candidates_are_compared_by_validation_scores(plan, tmp_path):
    tried = {r: v for r, v in plan.results.items() if r.experiment == "sfa/try-more"}
    plan.results = {**plan.results, **{run: result(run, 0.52, 0.1) for run in tried}}
    write_report(plan, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    assert "| sfa/try-more | 0.520 (+0.020) |" in page


def test_pictures_are_drawn_and_named_in_the_page(plan, tmp_path):
    write_report(plan, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    drawn = sorted(tmp_path.glob("pictures/*.png"))
    assert len(drawn) == 3
    for path in drawn:
        assert f"(pictures/{path.name})" in page


def test_the_same_results_give_the_same_bytes(plan, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_report(plan, tmp_path / name)
    files = [sorted(p for p in (tmp_path / n).rglob("*.*")) for n in ("one", "other")]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_without_results_the_page_says_so(tmp_path):
    assert "0 runs" in write_report(Plan(experiments(*SCORES), {}), tmp_path)
    assert "not measured yet" in (tmp_path / "tradeoff.md").read_text()
