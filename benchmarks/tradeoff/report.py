# SPDX-License-Identifier: Apache-2.0
"""The page `docs/tradeoff.md`: tables and pictures, from results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from . import figures
from .ablations import ABLATIONS
from .experiments import Experiment
from .plan import Plan, is_first
from .rows import Row, make_rows, shown, table
from .store import score
from .tasks import BACKBONE_RATES, HEAD_FACTORS, TaskSet

PAGE, PICTURES = "tradeoff.md", "pictures"
INTRO = Path(__file__).with_name("intro.md")
PROBES = {"rendered": "rendered scenes", "classes": "images of the pretraining's classes"}
OWN = ("sfa", "internal", "external", "random")  # methods of this project, and its control
#: A system of the paper that trains more than this share is no rival at 5 %.
MOST_SHARE = 0.135


def write_report(plan: Plan, folder: Path) -> str:
    """Write the page and its pictures; return what was written.

    Args:
        plan: The results, and the experiments that they are of.
        folder: Where the page goes; pictures go into a folder in it.
    """
    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    found = {name: make_rows(plan, name, lambda e: not e.is_ablation) for name in plan.tasks}
    by_task = {name: rows for name, rows in found.items() if rows}
    parts = [_intro(by_task), "## How far it is", _progress(plan), *_open_searches(plan)]
    if by_task:
        parts += ["## Within 5 %", _summary(by_task, is_first)]
        parts += ["## Within 20 %", _summary(by_task, lambda e: e.percent == 20)]
        parts += ["## Where the goals are met", _verdicts(by_task)]
    for name, rows in by_task.items():
        parts += _section(plan.tasks[name], rows, pictures)
    parts += _candidates(by_task)
    parts += _selection(by_task, pictures)
    parts += [part for ablation in ABLATIONS.values() for part in ablation.section(plan)]
    page = folder / PAGE
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", "utf-8")
    return f"{page}: {len(by_task)} task sets, {len(plan.results)} runs"


def _progress(plan: Plan) -> str:
    """Return how many runs there are, and of how many experiments the rates are chosen."""
    lines = [["task set", "data", "runs so far", "experiments with chosen rates", "all"]]
    for name, task in plan.tasks.items():
        runs = sum(run.task == name for run in plan.results)
        own = [e for e in plan.experiments.values() if not e.is_ablation]
        chosen = sum(bool(plan.chosen(name, e)) for e in own)
        lines.append([name, task.title, str(runs), str(chosen), str(len(own))])
    return table(lines)


def _open_searches(plan: Plan) -> list[str]:
    """Return the part on searches that have begun: the best validation scores so far."""
    lines = [["task set", "experiment", "points tried", "best validation so far", "rates"]]
    for name, task in plan.tasks.items():
        for experiment in plan.experiments.values():
            search = plan.search(name, experiment)
            best = plan.run(name, experiment, search.best, 0)
            if search.has_begun and search.missing and best in plan.results:
                tried = sum(r[:2] == (name, experiment.id) and r.seed == 0 for r in plan.results)
                value = score(plan.results[best], "valid", task.metric)
                shown_value = "failed" if value is None else f"{value:.3f}"
                rates = f"{best.backbone_rate:g}, {best.head_rate:g}"
                lines.append([name, experiment.id, str(tried), shown_value, rates])
    if len(lines) == 1:
        return []
    return [
        "Searches that have not ended. One seed, rates not chosen: nothing to compare yet.",
        table(lines),
    ]


def _intro(by_task: dict[str, list[Row]]) -> str:
    seen = {row.results[0]["train_info"]["metrics"][-1]["probe images"]
            for rows in by_task.values() for row in rows}  # fmt: skip
    return INTRO.read_text("utf-8").format(
        backbone=", ".join(f"{rate:g}" for rate in BACKBONE_RATES),
        head=", ".join(f"{factor:g}" for factor in HEAD_FACTORS),
        probe=" or ".join(PROBES[source] for source in sorted(seen)) or "not measured yet",
    )


def best_of(rows: Sequence[Row]) -> set[str]:
    """Return the ids of the best row and of those that it does not beat."""
    limited = [row for row in rows if row.experiment.method != "full" and row.is_complete]
    if not limited:
        return set()
    pick = max if limited[0].task.higher_is_better else min
    best = pick(limited, key=lambda row: row.score)
    return {row.experiment.id for row in limited if not best.beats(row)}


def _summary(by_task: dict[str, list[Row]], takes: Callable[[Experiment], bool]) -> str:
    chosen = {n: [row for row in rows if takes(row.experiment)] for n, rows in by_task.items()}
    chosen = {name: rows for name, rows in chosen.items() if rows}
    if not chosen:
        return "No results yet."
    methods = {row.experiment.method: row.share for rows in chosen.values() for row in rows}
    lines = [["method", "trained", *(f"{n}, {rows[0].task.header}" for n, rows in chosen.items())]]
    for method in sorted(methods, key=lambda m: methods[m]):
        cells = []
        for rows in chosen.values():
            own = next((row for row in rows if row.experiment.method == method), None)
            cells.append(
                "-" if own is None else _bold(shown(own), own.experiment.id in best_of(rows))
            )
        lines.append([method, f"{methods[method]:.1%}", *cells])
    return table(lines)


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _verdicts(by_task: dict[str, list[Row]]) -> str:
    """Compare SFA with the others at 5 % and full fine-tuning at 20 %, in one line a task set."""
    lines = [
        ["task set", "SFA 5 % beats", "no difference", "is beaten by", "SFA 20 % against full"]
    ]
    for name, every in by_task.items():
        rows = [row for row in every if row.is_complete]
        ours = {r.experiment.percent: r for r in rows if r.experiment.method == "sfa"}
        others = [
            r for r in rows
            if is_first(r.experiment) and r.experiment.method not in OWN and r.share <= MOST_SHARE
        ]  # fmt: skip
        full = next((r for r in rows if r.experiment.method == "full"), None)
        cells: list[list[str]] = [[], [], []]
        for other in others if 5 in ours else []:
            place = 0 if ours[5].beats(other) else 2 if other.beats(ours[5]) else 1
            cells[place].append(other.experiment.method)
        against = "-"
        if 20 in ours and full is not None:
            against = "worse" if full.beats(ours[20]) else "level or better"
        lines.append([name, *(", ".join(cell) or "-" for cell in cells), against])
    return table(lines)


def _section(task: TaskSet, rows: list[Row], pictures: Path) -> list[str]:
    """Return the part of the page on one task set, and draw its pictures."""
    plain = [r for r in rows if r.experiment.percent is not None or r.experiment.name == "all"]
    tradeoff, curves = f"tradeoff_{task.name}.png", f"curves_{task.name}.png"
    figures.draw_tradeoff(plain, pictures / tradeoff)
    figures.draw_curves([r for r in rows if is_first(r.experiment)], pictures / curves)
    head = ["experiment", "trained", f"{task.header}, test", "validation", "forgetting",
            "step ms", "peak MB", "bytes", "rate", "head's rate"]  # fmt: skip
    best = best_of([row for row in plain if is_first(row.experiment)])
    lines = [head, *(_cells(row, row.experiment.id in best) for row in rows)]
    return [
        f"## {task.title}",
        f"![{task.header} over the trained share]({PICTURES}/{tradeoff})",
        table(lines),
        "Validation scores of seed 0 while it trains, within 5 %:",
        f"![validation {task.header} by update step]({PICTURES}/{curves})",
    ]


def _cells(row: Row, is_best: bool) -> list[str]:
    return [
        row.experiment.id,
        f"{row.share:.1%}",
        _bold(shown(row), is_best),
        f"{row.validation:.3f}",
        f"{row.last('forgetting'):.3f}",
        row.step_ms,
        row.peak_mb,
        f"{row.mean('file_size'):,.0f}",
        _marked(row.run.backbone_rate, BACKBONE_RATES),
        _marked(row.run.head_rate, [row.task.head_rate * factor for factor in HEAD_FACTORS]),
    ]


def _marked(rate: float, grid: Sequence[float]) -> str:
    """Return a rate, with a star at an end of its grid."""
    return f"{rate:g}" + "*" * any(
        math.isclose(rate, end, rel_tol=0.01) for end in (grid[0], grid[-1])
    )


def _candidates(by_task: dict[str, list[Row]]) -> list[str]:
    """Return the part on changes of SFA's default, each beside what it would change."""
    found = {
        name: {row.experiment.id: row for row in rows if _is_candidate(row.experiment)}
        for name, rows in by_task.items()
    }
    ids = list(dict.fromkeys(experiment for rows in found.values() for experiment in rows))
    if not any("/try-" in experiment for experiment in ids):
        return []
    lines = [["experiment", *found]]
    for experiment in ids:
        cells = []
        for rows in found.values():
            own, usual = rows.get(experiment), rows.get(f"{experiment.split('/')[0]}/5pct")
            known = own is not None and usual is not None
            cells.append(
                f"{own.validation:.3f} ({own.validation - usual.validation:+.3f})" if known else "-"
            )
        lines.append([experiment, *cells])
    return [
        "## Candidates for the default",
        "*Validation* scores at 5 %, with the default's rates, and the difference to the default.",
        table(lines),
    ]


def _is_candidate(experiment: Experiment) -> bool:
    return experiment.name.startswith("try-") or experiment.id in ("sfa/5pct", "internal/5pct")


def _selection(by_task: dict[str, list[Row]], pictures: Path) -> list[str]:
    """Return the part on where the selected weights are (the paper's Fig. 5)."""
    chosen = [
        row
        for rows in by_task.values()
        for row in rows
        if row.experiment.id == "internal/5pct" and "selected" in row.results[0]["train_info"]
    ]
    if not chosen:
        return []
    figures.draw_selection(chosen, pictures / "selection.png")
    return [
        "## Where the selected weights are",
        "As the paper's Fig. 5: the selected share of each block's weights, internal part, 5 %.",
        f"![selected share by block]({PICTURES}/selection.png)",
    ]
