# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report. matplotlib is imported inside functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rows import Row

#: Methods whose lines stand out.
BOLD = {"sfa": "C3", "internal": "C1", "external": "C0"}


def draw_tradeoff(rows: Sequence[Row], path: Path) -> None:
    """Draw the score over the trained share: a line for each method, its spread as a band."""
    figure, axes = _figure()
    task = rows[0].task
    for method in dict.fromkeys(row.experiment.method for row in rows):
        own = [row for row in rows if row.experiment.method == method]
        shares, means = [100 * row.share for row in own], [row.score for row in own]
        lows, highs = [min(row.scores()) for row in own], [max(row.scores()) for row in own]
        if method in ("frozen", "full"):
            axes.axhline(
                means[0], color="0.4", ls=":" if method == "frozen" else "--", label=method
            )
            continue
        style = {"color": BOLD[method], "lw": 2.2} if method in BOLD else {"lw": 1}
        (line,) = axes.plot(shares, means, marker="o", ms=4, label=method, **style)
        if len(own) > 1:
            axes.fill_between(shares, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
        else:
            axes.vlines(shares, lows, highs, color=line.get_color())
    if not task.higher_is_better:
        axes.invert_yaxis()
    axes.set(xlabel="trained share of the backbone, %", ylabel=task.header, title=task.title)
    _save(figure, axes, path)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw validation scores while training, a line for each method."""
    figure, axes = _figure()
    for row in rows:
        key = f"valid {row.task.metric}"
        points = [m for m in row.results[0]["train_info"]["metrics"] if m.get(key) is not None]
        style = {"color": BOLD[row.experiment.method]} if row.experiment.method in BOLD else {}
        steps, scores = [m["step"] for m in points], [m[key] for m in points]
        axes.plot(steps, scores, marker=".", label=row.experiment.method, **style)
    if rows:
        axes.set(xlabel="update step", ylabel=f"validation {rows[0].task.header}")
    _save(figure, axes, path)


def draw_selection(rows: Sequence[Row], path: Path) -> None:
    """Draw the selected share of each block's weights, a line for each task set."""
    figure, axes = _figure()
    for row in rows:
        shares = row.results[0]["train_info"]["selected"]
        blocks = [block for block in shares if block != "other"]
        values = [100 * shares[block] for block in blocks]
        axes.plot([int(block) for block in blocks], values, marker="o", label=row.task.name)
    axes.set(xlabel="block", ylabel="selected weights, %", ylim=(0, None))
    _save(figure, axes, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which keeps state for the whole process

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    # Without a date and a version in it, the same results give the same bytes.
    figure.savefig(path, dpi=90, metadata={"Software": None})
