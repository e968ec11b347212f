# SPDX-License-Identifier: Apache-2.0
"""Figures that a guide computes from another page's are those of that page."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT

#: Row of the guide, section of the scores, and the column of its score.
TASKS = {
    "semantic segmentation": ("Semantic segmentation", 2),
    "depth": ("Depth", 2),
    "object detection": ("Object detection", 2),
}
METHODS = ("external 5%", "internal 5%", "SFA 5%", "SFA 20%")
WANTED = {"frozen", "full", *METHODS}


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the rows of a page's tables by their first cell."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return {row[0]: row for row in rows if row}


def test_the_guide_to_budgets_has_the_shares_that_the_scores_give() -> None:
    scores = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    guide = rows_of((ROOT / "docs" / "choosing-a-budget.md").read_text(encoding="utf-8"))
    for task, (section, column) in TASKS.items():
        text = re.split(rf"^## {section}$", scores, flags=re.MULTILINE)[1].split("\n## ")[0]
        found = {name: float(row[column]) for name, row in rows_of(text).items() if name in WANTED}
        gap = found["full"] - found["frozen"]
        shares = [f"{(found[name] - found['frozen']) / gap:.0%}" for name in METHODS]
        ends = [f"{found[name]:.3f}" for name in ("frozen", "full")]
        assert [cell.replace(" ", "") for cell in guide[task][2:]] == ends + shares
