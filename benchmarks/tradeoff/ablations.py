# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations, its row beside ours. Ours are of small runs: compare within a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .experiments import Experiment, reference
from .plan import Plan
from .rows import make_rows, shown, table

#: Table 6 by budget in percent.
INTERNAL = {1: "53.5", 3: "53.8", 5: "54.3", 10: "54.7", 15: "54.8", 20: "55.0"}
BOTH = {1: "53.7", 3: "54.2", 5: "54.7", 10: "55.1", 15: "55.3", 20: "55.4"}

#: Methods that are also trained longer, and their usual experiment.
LONGER = {"frozen": "all", "lora": "5pct", "internal": "5pct", "sfa": "5pct", "full": "all"}


@dataclass(frozen=True)
class Ablation:
    """One table of the paper.

    Attributes:
        name: Of the command, and what the names of its own experiments begin with.
        title: For people.
        tasks: Task sets of ours.
        lines: What is varied, the paper's mIoU, and our experiment.
        note: What differs here.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    lines: tuple[tuple[str, str, str], ...]
    note: str

    def among(self, experiments: dict[str, Experiment]) -> dict[str, Experiment]:
        """Return its experiments, and those whose rates they take."""
        own = [experiments[experiment] for _, _, experiment in self.lines]
        return {e.id: e for e in (*own, *(reference(o, experiments) for o in own))}

    def table(self, plan: Plan) -> str:
        """Return the table; a dash where there is no result yet."""
        ids = {experiment for _, _, experiment in self.lines}
        found = {
            task: {r.experiment.id: r for r in make_rows(plan, task, lambda e: e.id in ids)}
            for task in self.tasks
        }
        head = ["", "paper", "experiment here", "trained"]
        for task in self.tasks:
            head += [f"{task}, {plan.tasks[task].header}", "step ms", "peak MB"]
        lines: list[Sequence[str]] = [head]
        for label, paper, experiment in self.lines:
            own = [rows[experiment] for rows in found.values() if experiment in rows]
            cells = [label, paper, experiment, f"{own[0].share:.1%}" if own else "-"]
            for rows in found.values():
                row = rows.get(experiment)
                cells += ["-"] * 3 if row is None else [shown(row), row.step_ms, row.peak_mb]
            lines.append(cells)
        return table(lines)

    def section(self, plan: Plan) -> list[str]:
        """Return its part of the page; nothing where no result is there yet."""
        table = self.table(plan)
        return [f"## {self.title}", self.note, table] if "±" in table else []


def _budgets(method: str, label: str, scores: dict[int, str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((f"{label} {p} %", mean, f"{method}/{p}pct") for p, mean in scores.items())


ABLATIONS = {
    ablation.name: ablation
    for ablation in (
        Ablation(
            "table4",
            "Table 4: the external adapter against AdaptFormer",
            ("segmentation", "depth"),
            (
                ("frozen", "53.2", "frozen/all"),
                ("AdaptFormer 0.9 %", "53.5", "adaptformer/1pct"),
                ("AdaptFormer 3.5 %", "53.8", "adaptformer/3pct"),
                ("AdaptFormer 6.9 %", "53.9", "adaptformer/5pct"),
                ("AdaptFormer 13.4 %", "53.9", "adaptformer/15pct"),
                ("external 3.5 %", "53.8", "external/3pct"),
                ("external 6.9 %", "54.2", "external/5pct"),
                ("external 13.4 %", "54.2", "external/15pct"),
            ),
            "The budgets here are the nearest to the paper's widths.",
        ),
        Ablation(
            "table5",
            "Table 5: update steps in a round",
            ("segmentation",),
            (
                ("0", "53.8", "sfa/table5-none"),
                ("1000", "54.6", "sfa/table5-1"),
                ("2000", "54.7", "sfa/table5-2"),
                ("5000", "54.5", "sfa/table5-6"),
                ("10000", "54.3", "sfa/table5-12"),
                ("20000", "54.2", "sfa/table5-25"),
                ("40000", "54.0", "sfa/table5-50"),
            ),
            "The paper's runs have 160,000 update steps, ours 200: s is the same share of them, "
            "5 %, picks until the last round but one as in the paper. 0 selects without looking "
            "at gradients.",
        ),
        Ablation(
            "table6",
            "Table 6: the internal part alone, and both",
            ("segmentation", "depth"),
            (
                *_budgets("internal", "internal", INTERNAL),
                *_budgets("sfa", "both", BOTH),
            ),
            "The paper's second column is printed as 2 %, but 2.58 M are 3 %.",
        ),
        Ablation(
            "criteria",
            "How weights are ranked",
            ("segmentation", "depth"),
            (
                ("accumulated gradient, the default", "-", "internal/5pct"),
                ("gradient times weight", "-", "internal/criterion-movement"),
                ("absolute gradient", "-", "internal/criterion-absolute-gradient"),
                ("squared gradient", "-", "internal/criterion-squared-gradient"),
                ("weight difference (Eq. 4)", "-", "internal/criterion-weight-difference"),
                ("largest weights", "-", "internal/criterion-magnitude"),
                ("the same share of each layer", "-", "internal/criterion-each-layer"),
                ("as many for each output", "-", "internal/criterion-each-output"),
                ("random", "-", "random/5pct"),
            ),
            "The internal part alone at 5 %. The paper has this in its supplementary only.",
        ),
        Ablation(
            "length",
            "Runs twice as long",
            ("segmentation", "depth"),
            tuple(
                (f"{method}, {steps} steps", "-", f"{method}/{name}")
                for method, usual in LONGER.items()
                for steps, name in ((200, usual), (400, "length-400"))
            ),
            "With the rates found for 200 steps.",
        ),
        Ablation(
            "table7",
            "Table 7: a selection of another data set",
            ("camvid",),
            (
                ("frozen", "77.9", "frozen/all"),
                ("selected on another data set", "82.9", "sfa/table7-scenes"),
                ("selected here", "-", "sfa/20pct"),
                ("full", "83.3", "full/all"),
            ),
            "In the paper ADE20K and Cityscapes, here rendered scenes and CamVid. The selection is "
            "made there at the same rates, then its values start at zero here.",
        ),
    )
}
