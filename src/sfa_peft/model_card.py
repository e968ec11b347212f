# SPDX-License-Identifier: Apache-2.0
"""What the model card of a saved adapter says: how to load it, its budget, its metrics.

The section stands between two marks, first in the card; saving again replaces it and leaves the
rest of the card.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import SFAError
from .files.folder import replacing

_START, _END = "<!-- sfa_peft: written anew on every save -->", "<!-- sfa_peft: end -->"

#: How files with bytes that are not UTF-8 are read and written: with the same bytes.
_KEEP = "surrogateescape"


def html_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as notebooks show it: first column to the left, others to the right.

    Args:
        headings: Of the columns.
        rows: Cells; integers get commas.
    """

    def line(kind: str, cells: Sequence[object]) -> str:
        texts = [f"{c:,}" if type(c) is int else escape(str(c)) for c in cells]
        sides = ["left", *["right"] * (len(texts) - 1)]
        pairs = zip(sides, texts, strict=True)
        return "".join(f'<{kind} style="text-align:{side}">{t}</{kind}>' for side, t in pairs)

    lines = [line("th", headings), *(line("td", row) for row in rows)]
    return "<table>" + "".join(f"<tr>{content}</tr>" for content in lines) + "</table>"


@dataclass(frozen=True)
class StageFacts:
    """One stage of the backbone.

    Attributes:
        stage: Ordinal from 0, None where the backbone is not known.
        eligible: Pretrained weights that might be selected.
        selected: Those that are.
        widths: Widths of the external adapters.
    """

    stage: int | None
    eligible: int
    selected: int
    widths: Sequence[int]


@dataclass(frozen=True)
class CardFacts:
    """What a card says about an adapter.

    Attributes:
        budget: The paper's beta, as it was asked for.
        backbone: Parameters of the backbone.
        external: Parameters of the external adapters.
        to_select: Weights to select in the end.
        stages: One entry for each stage with adapted layers.
    """

    budget: float
    backbone: int
    external: int
    to_select: int
    stages: Sequence[StageFacts]

    @property
    def selected(self) -> int:
        """Selected weights of all stages."""
        return sum(stage.selected for stage in self.stages)


def set_card_metrics(
    model: Any, metrics: Mapping[str, float | str], adapter_name: str = "default"
) -> None:
    """Put results into the model card that `save_pretrained` writes; call it before saving.

    They stay with the adapter in memory until they are replaced; `{}` removes them. They are in no
    file but the card, so an adapter that is trained further elsewhere does not inherit them.

    Args:
        model: The model with the adapter.
        metrics: Value by name, such as `{"mIoU (ADE20K val)": 0.452}`. Numbers, or text.
        adapter_name: The adapter.

    Raises:
        SFAError: If there is no such adapter, or a value is neither a finite number nor text.
    """
    if not isinstance(metrics, Mapping):
        raise SFAError(
            f"set_card_metrics: expected a dict of numbers (or text) by name, got {metrics!r}."
        )
    configs = getattr(model, "peft_config", {})
    configs = {name: c for name, c in configs.items() if hasattr(c, "remember")}  # ours
    if adapter_name not in configs:
        raise SFAError(
            f"set_card_metrics: the model has no adapter `{adapter_name}`; it has "
            f"{sorted(configs) or 'none'}."
        )
    for name, value in metrics.items():
        number = isinstance(value, Real) and math.isfinite(value)
        if not isinstance(name, str) or not (number or isinstance(value, str)):
            raise SFAError(
                "set_card_metrics: expected finite numbers (or text) by name, got "
                f"{name!r}: {value!r}. Give a tensor's value with .item()."
            )
    configs[adapter_name].remember(metrics={n: _plain(value) for n, value in metrics.items()})


def _plain(value: Any) -> float | str:
    """Return a number of NumPy as Python's own; others as they are."""
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def make_section(
    *,
    base: str | None = None,
    base_class: str | None = None,
    facts: CardFacts | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> str:
    """Return the section about an adapter.

    Args:
        base: Hub id or path of the base model, if known.
        base_class: Its class in transformers, if known.
        facts: What its budget became; None leaves that out.
        metrics: Results.
    """
    parts = [_START, *_usage(base, base_class)]
    if facts is not None:
        parts += ["", *_facts(facts)]
    if metrics:
        rows = [(name, _number(value)) for name, value in metrics.items()]
        parts += ["", "### Results", "", *_table(("metric", "value"), rows)]
    return "\n".join([*parts, "", _END]) + "\n"


def with_section(card: str, section: str) -> str:
    """Return a card with a section in the place of the one that it has, or first."""
    start = card.find(_START)
    end = card.find(_END, start)
    if start < 0 or end < 0:
        place = _after_title(card)
        before, after = card[:place].rstrip(), card[place:].strip()
        return "\n\n".join(part for part in (before, section.rstrip(), after) if part) + "\n"
    return card[:start] + section + card[end + len(_END) :].removeprefix("\n")


def write_section(folder: Path, section: str) -> None:
    """Write a section into the card in a folder (made if there is none)."""
    card = folder / "README.md"
    # Bytes that are not UTF-8 go through unharmed.
    text = card.read_text(encoding="utf-8", errors=_KEEP) if card.is_file() else ""
    with replacing(card) as partial:
        partial.write_text(with_section(text, section), encoding="utf-8", errors=_KEEP)


def _after_title(card: str) -> int:
    """Return where the metadata, comments and title end that a card begins with."""
    lines = card.splitlines(keepends=True)
    place, in_comment = 0, False
    if lines and lines[0].rstrip() == "---":
        place = next((n for n, line in enumerate(lines[1:], 2) if line.rstrip() == "---"), 0)
    for count, line in enumerate(lines[place:], place + 1):
        in_comment = in_comment or line.startswith("<!--")
        if line.strip() and not in_comment:
            place = count if line.startswith("# ") else place
            break
        in_comment = in_comment and "-->" not in line
    return sum(map(len, lines[:place]))


def _usage(base: str | None, base_class: str | None) -> Iterator[str]:
    yield from (
        "## Loading this Selective Feature Adapter",
        "",
        "`import sfa_peft` must come first: it registers the method with PEFT. Without it,",
        "loading ends in `KeyError: 'SFA'`.",
        "",
        "```python",
        "import sfa_peft  # registers SFA with PEFT",
        "from peft import PeftModel",
    )
    if base and base_class and base_class.isascii() and base_class.isidentifier():
        yield f"from transformers import {base_class}"
        yield ""
        yield f"base_model = {base_class}.from_pretrained({_literal(base)})"
    else:
        yield ""
        yield f"base_model = ...  # the model it was trained on{_named(base)}"
    yield 'model = PeftModel.from_pretrained(base_model, "path/or/hub-id/of/this/folder").eval()'
    yield "```"


def _literal(text: str) -> str:
    """Return Python's literal of a text that nobody vouches for, without what markdown might read.

    Neither quotes, line ends, fences and marks nor characters that look like others end it early.
    """
    escaped = text.encode("unicode_escape").decode("ascii")
    for char in '"<`':
        escaped = escaped.replace(char, f"\\x{ord(char):02x}")
    return f'"{escaped}"'


def _named(base: str | None) -> str:
    return f", {_literal(base)}" if base else ""


def _facts(facts: CardFacts) -> Iterator[str]:
    trained = facts.external + facts.selected
    rows = [
        ("backbone", f"{facts.backbone:,}", ""),
        ("external adapters", f"{facts.external:,}", _share(facts.external, facts.backbone)),
        ("selected weights", f"{facts.selected:,}", _share(facts.selected, facts.backbone)),
        ("trained together", f"{trained:,}", _share(trained, facts.backbone)),
    ]
    yield from ("### Budget", "", f"Asked for: {facts.budget:.6g} of the backbone.", "")
    yield from _table(("", "parameters", "share of the backbone"), rows)
    if facts.selected < facts.to_select:  # as after early stopping
        yield ""
        yield (
            "Only a part of the budget was selected when this was saved: "
            f"{facts.selected:,} of {facts.to_select:,} weights."
        )
    yield from ("", "### Selected weights by stage", "")
    rows = [
        (
            "unknown" if stage.stage is None else f"{stage.stage + 1}",
            f"{stage.selected:,} of {stage.eligible:,}",
            _share(stage.selected, stage.eligible),
            ", ".join(str(width) for width in sorted(set(stage.widths))) or "none",
        )
        for stage in facts.stages
    ]
    yield from _table(("stage", "selected", "share", "widths of external adapters"), rows)


def _share(count: int, total: int) -> str:
    return f"{count / total:.2%}" if total else ""


def _number(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        cells = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in row)
        cells = (" ".join(cell.split()) for cell in cells)
        yield f"| {' | '.join(cells)} |"
