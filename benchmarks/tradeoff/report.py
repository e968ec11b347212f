# SPDX-License-Identifier: Apache-2.0
"""The page `docs/tradeoff.md`: tables and pictures, from results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import figures
from .ablations import ABLATIONS
from .experiments import Experiment
from .plan import Plan, is_first
from .rows import Row, make_rows, shown, table
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
    found = {name: make_rows(plan, name, _is_no_ablation) for name in plan.tasks}
    by_task = {name: rows for name, rows in found.items() if rows}
    parts = [_intro(by_task)]
    if by_task:
        parts += ["## Within 5 %", _summary(by_task, is_first)]
        parts += ["## Within 20 %", _summary(by_task, lambda e: e.percent == 20)]
        parts += ["## Where the goals are met", _verdicts(by_task)]
    for name, rows in by_task.items():
        parts += _section(plan.tasks[name], rows, pictures)
    parts += _selection(by_task, pictures)
    parts += [part for ablation in ABLATIONS.values() for part in ablation.section(plan)]
    page = folder / PAGE
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", "utf-8")
    return f"{page}: {len(by_task)} task sets, {len(plan.results)} runs"


def _is_no_ablation(experiment: Experiment) -> bool:
    return not experiment.name.startswith("table")


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
    limited = [row for row in rows if row.experiment.method != "full"]
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
    for name, rows in by_task.items():
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
            "step ms", "peak MB", "bytes", "rates"]  # fmt: skip
    lines, best = [head], best_of([row for row in plain if is_first(row.experiment)])
    for row in rows:
        validation = sum(row.scores("valid")) / len(row.scores("valid"))
        lines.append(
            [
                row.experiment.id,
                f"{row.share:.1%}",
                _bold(shown(row), row.experiment.id in best),
                f"{validation:.3f}",
                f"{row.last('forgetting'):.3f}",
                row.step_ms,
                row.peak_mb,
                f"{row.mean('file_size'):,.0f}",
                f"{row.run.backbone_rate:g}, {row.run.head_rate:g}",
            ]
        )
    return [
        f"## {task.title}",
        f"![{task.header} over the trained share]({PICTURES}/{tradeoff})",
        table(lines),
        "Validation scores of seed 0 while it trains, within 5 %:",
        f"![validation {task.header} by update step]({PICTURES}/{curves})",
    ]


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
