# SPDX-License-Identifier: Apache-2.0
"""Rows of `cost.py` to ratios, bars and an aligned table. Plain Python, no torch.

Ratios are taken turn by turn, between blocks of steps that ran soon after each other, and their
median is what counts: load from elsewhere then hits both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, median
from typing import Any, NamedTuple

GB, MB = 1e9, 1e6

#: Step over that of full fine-tuning, by method (the others' is the last) and phase.
STEP_TO_FULL = {
    "sfa_internal": {"scoring": 0.90, "after": 0.70},
    "sfa_both": {"scoring": 0.90, "after": 0.80},
    "": {"scoring": 0.90, "after": 0.80},
}
STEP_TO_SHIRA = 0.95
#: Step with bfloat16 scores over that with exact ones.
STEP_TO_EXACT = 1.05
PICK_EXTRA_BYTES = 64 * MB
#: Peak memory in bytes, for what `memory_bars_hold` says.
PEAK_BYTES = {
    ("sfa_internal", "after"): 1.45 * GB,
    ("sfa_internal", "scoring"): 1.80 * GB,
    ("sfa_internal_every4", "scoring"): 1.80 * GB,
    ("sfa_internal_bf16", "scoring"): 1.62 * GB,
}
MEMORY_SETTINGS = {
    "backbone": "base",
    "resolution": 256,
    "batch_size": 1,
    "dtype": "float32",
    "device": "cpu",
}
MEMORY_BUDGET = 0.05

Row = dict[str, Any]


class Bar(NamedTuple):
    """A figure and the most it may be."""

    name: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.value <= self.limit

    def __str__(self) -> str:
        """Return the bar for the table, such as `step/full<=0.9 ok`."""
        return f"{self.name}<={self.limit:g} {'ok' if self.is_met else 'FAIL'}"


def add_ratios(rows: list[Row]) -> None:
    """Give each row of a group that ran together its ratios to full and to SHiRA.

    Args:
        rows: With "rounds": for each round the seconds of its steps, and "cycle": after how many
            steps their work repeats.
    """
    for row in rows:
        references = {
            "full": _find(rows, "full"),
            "shira": None if row["budget"] is None else _find(rows, "shira", row["budget"]),
            "exact": _exact(rows, row),
        }
        for name, reference in references.items():
            if reference is None or not row.get("rounds") or not reference.get("rounds"):
                continue
            turns = zip(turn_seconds(row), turn_seconds(reference), strict=True)
            ratios = [own / other for own, other in turns]
            row[f"to_{name}"] = median(ratios)
            row[f"to_{name}_spread"] = [min(ratios), max(ratios)]
        lora = _find(rows, "lora_r16")
        if lora is not None and "peak_bytes" in lora and "peak_bytes" in row:
            row["peak_to_lora_r16"] = row["peak_bytes"] / lora["peak_bytes"]


def turn_seconds(row: Row) -> list[float]:
    """Return the typical step of each turn.

    Where only every k-th step scores, that is the mean over whole cycles: a median would show the
    steps that do not score.
    """
    return [median(turn) if row["cycle"] == 1 else mean(turn) for turn in row["rounds"]]


def _find(rows: Iterable[Row], method: str, budget: float | None = None) -> Row | None:
    return next((r for r in rows if r["method"] == method and r["budget"] == budget), None)


def _exact(rows: list[Row], row: Row) -> Row | None:
    """Return the row that scores exactly where this one does not."""
    same = (r for r in rows if r["budget"] == row["budget"] and r["phase"] == "scoring")
    is_cheaper = row["method"] == "sfa_internal_bf16"
    return next((r for r in same if is_cheaper and r["method"] == "sfa_internal"), None)


def memory_bars_hold(settings: dict[str, Any]) -> bool:
    """Whether the bars on peak memory are meant for these settings."""
    return all(settings[name] == value for name, value in MEMORY_SETTINGS.items())


def bars_of(row: Row, settings: dict[str, Any]) -> list[Bar]:
    """Return the bars that apply to a measured row."""
    if row["phase"] == "pick":
        return [
            Bar("pick/step", row["pick_seconds"] / row["step_seconds"], 1),
            Bar("MB", row["pick_extra_bytes"] / MB, PICK_EXTRA_BYTES / MB),
        ]
    bars = []
    if row["method"].startswith("sfa_") and "to_full" in row:
        limits = STEP_TO_FULL.get(row["method"], STEP_TO_FULL[""])
        bars.append(Bar("step/full", row["to_full"], limits[row["phase"]]))
    if row["method"].startswith("sfa_internal") and "to_shira" in row:
        bars.append(Bar("step/SHiRA", row["to_shira"], STEP_TO_SHIRA))
    if "to_exact" in row:
        bars.append(Bar("step/exact", row["to_exact"], STEP_TO_EXACT))
    if row["phase"] == "after" and "peak_to_lora_r16" in row:
        bars.append(Bar("GB/LoRA r16", row["peak_to_lora_r16"], 1))
    limit = PEAK_BYTES.get((row["method"], row["phase"]))
    if limit and memory_bars_hold(settings) and row["budget"] <= MEMORY_BUDGET:
        bars.append(Bar("GB", row["peak_bytes"] / GB, limit / GB))
    return bars


def render(rows: list[Row], settings: dict[str, Any]) -> str:
    """Return both tables: training steps, and picks."""
    steps = [r for r in rows if r["phase"] != "pick"]
    picks = [r for r in rows if r["phase"] == "pick"]
    parts = []
    if steps:
        heads = ["method", "phase", "budget", "trained", "step s", "/full", "/SHiRA", "peak GB"]
        parts.append(align([*heads, "bars"], [_step_cells(r, settings) for r in steps]))
    if picks:
        heads = ["pick at budget", "selects", "of", "pick s", "topk s", "step s", "pick MB"]
        heads += ["topk MB", "run GB", "bars"]
        parts.append(align(heads, [_pick_cells(r, settings) for r in picks]))
    return "\n\n".join(parts)


def _step_cells(row: Row, settings: dict[str, Any]) -> list[str]:
    start = [row["method"], row["phase"], _budget(row)]
    if "failure" in row:
        return [*start, *["-"] * 5, row["failure"]]
    return [
        *start,
        f"{row['trained']:,}",
        f"{row['step_seconds']:.4f}",
        *(_ratio(row, key) for key in ("to_full", "to_shira")),
        f"{row['peak_bytes'] / GB:.3f}",
        _bars(row, settings),
    ]


def _pick_cells(row: Row, settings: dict[str, Any]) -> list[str]:
    if "failure" in row:
        return [_budget(row), *["-"] * 8, row["failure"]]
    return [
        _budget(row),
        f"{row['selected']:,}",
        f"{row['eligible']:,}",
        *(f"{row[f'{key}_seconds']:.4f}" for key in ("pick", "topk", "step")),
        *(f"{row[f'{key}_extra_bytes'] / MB:.1f}" for key in ("pick", "topk")),
        f"{row['peak_bytes'] / GB:.3f}",
        _bars(row, settings),
    ]


def _ratio(row: Row, key: str) -> str:
    """Return a ratio and half of what it varied by between rounds."""
    if key not in row:
        return "-"
    low, high = row[f"{key}_spread"]
    return f"{row[key]:.3f} ±{(high - low) / 2:.2f}"


def _budget(row: Row) -> str:
    return "-" if row["budget"] is None else f"{100 * row['budget']:g} %"


def _bars(row: Row, settings: dict[str, Any]) -> str:
    return ", ".join(map(str, bars_of(row, settings)))


def align(heads: list[str], table: list[list[str]]) -> str:
    """Return lines with columns of equal width: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    names = {"method", "phase", "bars"}
    lines = []
    for cells in [heads, *table]:
        padded = [
            cell.ljust(width) if head in names else cell.rjust(width)
            for head, cell, width in zip(heads, cells, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
