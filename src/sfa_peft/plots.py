# SPDX-License-Identifier: Apache-2.0
"""Pictures of plain data (the paper's Fig. 5). matplotlib is imported inside functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files.folder import replacing

ROLES = {
    "attn_in": "attention, in",
    "attn_out": "attention, out",
    "mlp_in": "MLP, in",
    "mlp_out": "MLP, out",
    None: "other",
}
#: Colours that the colour-blind can tell apart (Okabe and Ito), and shapes for print in grey.
STYLES = dict(
    zip(
        ROLES,
        zip(("#0072B2", "#E69F00", "#009E73", "#CC79A7", "black"), "os^Dv", strict=True),
        strict=True,
    )
)


def draw_selection(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw the share of selected weights by block, a line for each role; stages are set apart.

    Args:
        rows: What `selection_summary` returned.
        path: Where to write the picture; its ending decides the format.

    Returns:
        The path.
    """
    return draw_selections({"Where the selected weights are": rows}, {}, path)


def draw_selections(
    selections: Mapping[str, Sequence[dict[str, Any]]],
    overlaps: Mapping[tuple[str, str], float],
    path: str | Path,
) -> Path:
    """Draw the selections of several tasks, one diagram each, and how they overlap.

    Args:
        selections: Rows as of `selection_summary`, by title.
        overlaps: For each two titles the share of the smaller selection that both have, 0 to 1;
            none for one task.
        path: Where to write the picture; its ending decides the format.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps state for the whole process

    path, count = Path(path), len(selections)
    figure = Figure(figsize=(7 if count == 1 else 4.5 * count + 3.5, 3.5), layout="constrained")
    columns = count + bool(overlaps)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis, (title, rows) in zip(axes, selections.items(), strict=False):
        _draw_lines(axis, rows)
        axis.set_title(title, pad=14)
        if axis is not axes[0]:
            axis.sharey(axes[0])
    axes[0].set_ylim(0, None)
    if overlaps:
        _draw_matrix(axes[-1], list(selections), overlaps)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png")
    return path


def _draw_lines(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for role in dict.fromkeys(row["role"] for row in rows):
        chosen = [row for row in rows if row["role"] == role]
        known = all(row["layer"] is not None for row in chosen)
        blocks = sorted({row["layer"] for row in chosen}) if known else range(len(chosen))
        shares = []
        for ordinal in blocks:
            same = [r for r in chosen if r["layer"] == ordinal] if known else [chosen[ordinal]]
            shares.append(100 * sum(r["selected"] for r in same) / sum(r["numel"] for r in same))
        colour, marker = STYLES.get(role, STYLES[None])
        name = ROLES.get(role, role)
        axes.plot([b + 1 for b in blocks], shares, marker=marker, color=colour, label=name)
    _mark_stages(axes, rows)
    axes.set(xlabel="block", ylabel="selected weights, %")
    if rows:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _mark_stages(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw a line before the first block of each stage but the first, and name the stages."""
    first: dict[int, int] = {}
    for row in rows:
        stage, block = row.get("stage"), row["layer"]
        if stage is not None and block is not None:
            first[stage] = min(block, first.get(stage, block))
    if len(first) < 2:
        return
    for stage, block in first.items():
        if stage > min(first):
            axes.axvline(block + 0.5, color="0.6", linestyle=":", linewidth=1, label="_stage")
        style = {"xycoords": ("data", "axes fraction"), "va": "bottom", "ha": "center"}
        axes.annotate(f"stage {stage + 1}", (block + 1, 1.0), fontsize=7, **style)


def _draw_matrix(axes: Any, names: list[str], overlaps: Mapping[tuple[str, str], float]) -> None:
    """Draw a square for each two tasks; the number is in per cent."""
    known = {**overlaps, **{(b, a): share for (a, b), share in overlaps.items()}}
    table = [[100 * known.get((a, b), 1.0) for b in names] for a in names]
    axes.imshow(table, vmin=0, vmax=100, cmap="cividis")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            colour = "black" if value > 60 else "white"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("selected by both, % of the smaller")
