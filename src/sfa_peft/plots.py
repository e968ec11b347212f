# SPDX-License-Identifier: Apache-2.0
"""Pictures of plain data (the paper's Fig. 5). matplotlib is imported inside functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files.folder import replacing


def draw_selection(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw the share of selected weights by block, a line for each role.

    Args:
        rows: What `selection_summary` returned.
        path: Where to write the picture; its ending decides the format.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps state for the whole process

    path = Path(path)
    roles = list(dict.fromkeys(row["role"] for row in rows))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for role in roles:
        chosen = [row for row in rows if row["role"] == role]
        known = all(row["layer"] is not None for row in chosen)
        blocks = sorted({row["layer"] for row in chosen}) if known else range(len(chosen))
        shares = []
        for ordinal in blocks:
            same = [r for r in chosen if r["layer"] == ordinal] if known else [chosen[ordinal]]
            shares.append(100 * sum(r["selected"] for r in same) / sum(r["numel"] for r in same))
        axes.plot([b + 1 for b in blocks], shares, marker="o", label=role or "other")
    axes.set(xlabel="block", ylabel="selected weights, %", ylim=(0, None))
    axes.set_title("Where the selected weights are")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png")
    return path
