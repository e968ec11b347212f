# SPDX-License-Identifier: Apache-2.0
"""Numbers of an adapter in a model: what its budget became, and where its selected weights are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import SFAConfig
from ..errors import TargetError
from ..model_card import CardFacts, StageFacts, html_table
from ..plots import draw_selection
from .adapted_layers import adapter_layers, find_pool
from .layer import SFALayer

_SHOWN = ("name", "parameter", "role", "numel", "selected")
#: Classes of the head that the paper's backbone sizes (88 M, 197 M) include.
_PAPER_CLASSES = 1000


@dataclass(frozen=True)
class BudgetReport:
    """What a budget was solved to, counted on the live model.

    Attributes:
        backbone: Parameters of the backbone without any head, the budget's denominator.
        allowed: Most parameters the budget allows.
        external: Parameters of the external adapters.
        internal: Pretrained weights that are or will be selected.
        selected: Pretrained weights selected so far.
        head: Parameters trained and saved whole; not counted.
        adapter_dim: Common width d, 0 without external adapters.
        widths: Widths of the external adapters by stage (None: no known stage).
        paper_backbone: Backbone with a 1000-class head, as the paper counts; None where the width
            of the last stage is not known.
    """

    backbone: int
    allowed: int
    external: int
    internal: int
    selected: int
    head: int
    adapter_dim: int
    widths: dict[int | None, list[int]]
    paper_backbone: int | None

    @property
    def share(self) -> float:
        """Trainable share of the backbone, head not counted."""
        return (self.external + self.internal) / self.backbone

    def _repr_html_(self) -> str:
        counts = {
            "backbone": self.backbone,
            "budget": self.allowed,
            f"external adapters, d = {self.adapter_dim}": self.external,
            f"selected weights, {self.selected:,} so far": self.internal,
            "external and selected": self.external + self.internal,
        }
        rows = [(name, n, f"{n / self.backbone:.2%}") for name, n in counts.items()]
        return html_table(
            ("", "parameters", "of the backbone"), [*rows, ("task head", self.head, "not counted")]
        )

    def __str__(self) -> str:
        trained = self.external + self.internal
        lines = [
            f"backbone            {self.backbone:>14,}",
            _line("budget", self.allowed, self.backbone),
            _line("  external adapters", self.external, self.backbone, f"d = {self.adapter_dim}"),
            _line("  selected weights", self.internal, self.backbone, f"{self.selected:,} so far"),
            _line("  together", trained, self.backbone),
            f"task head           {self.head:>14,}  (not counted)",
        ]
        if self.paper_backbone:
            lines.append(
                f"counted as in the paper, with a {_PAPER_CLASSES}-class head: "
                f"{trained / self.paper_backbone:.3%} of {self.paper_backbone:,}"
            )
        for stage, widths in self.widths.items():
            where = "widths" if stage is None else f"widths, stage {stage + 1}"
            lines.append(f"{where}: {len(widths)} x {_range(widths)}")
        return "\n".join(lines)


def budget_report(model: nn.Module, adapter_name: str = "default") -> BudgetReport:
    """Return what the budget of an adapter was solved to; print it for a table.

    Raises:
        TargetError: If the model has no such SFA adapter.
    """
    layers = _layers(model, adapter_name)
    resolved = layers[0].adapters[adapter_name].record
    stages = count_stages(model, adapter_name)
    pool = find_pool(model, adapter_name)
    return BudgetReport(
        backbone=resolved.total,
        allowed=resolved.allowed,
        external=_external(layers, adapter_name),
        internal=0 if pool is None else pool.size,
        selected=sum(stage.selected for stage in stages),
        head=_head_parameters(model, adapter_name),
        adapter_dim=resolved.adapter_dim,
        widths={s.stage: list(s.widths) for s in stages if s.widths},
        paper_backbone=_paper_backbone(layers, resolved.total),
    )


def card_facts(model: nn.Module, config: SFAConfig, adapter_name: str) -> CardFacts:
    """Return what the model card says of an adapter."""
    layers = adapter_layers(model, adapter_name)
    pool = find_pool(model, adapter_name)
    return CardFacts(
        budget=config.budget,
        backbone=layers[0].adapters[adapter_name].record.total,
        external=_external(layers, adapter_name),
        to_select=0 if pool is None else pool.size,
        stages=count_stages(model, adapter_name),
    )


class SelectionSummary(list[dict[str, Any]]):
    """Rows of `selection_summary`; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        shown = [(*(row[k] for k in _SHOWN), f"{row['share']:.2%}") for row in self]
        return html_table((*_SHOWN, "share"), shown)


def selection_summary(model: nn.Module, adapter_name: str = "default") -> SelectionSummary:
    """Return one row per weight tensor that may be selected from, in model order.

    Each row has `name` (of the layer), `parameter` ("weight", "bias"), `role` (attn_in, attn_out,
    mlp_in, mlp_out or None), `layer` and `stage` (ordinals of the block and its stage, None if
    unknown), `numel`, `selected` (entries) and `share` (selected / numel).

    Raises:
        TargetError: If the model has no such SFA adapter.
    """
    _layers(model, adapter_name)
    return SelectionSummary(row for _, row in _count(model, adapter_name))


def plot_selection(
    source: nn.Module | Sequence[dict[str, Any]], path: str | Path, adapter_name: str = "default"
) -> Path:
    """Draw the share of selected weights by block, a line for each role (needs matplotlib).

    Args:
        source: A model, or what `selection_summary` returned.
        path: Where to write the picture; its ending decides the format.
        adapter_name: The adapter of a model.

    Returns:
        The path.

    Raises:
        TargetError: If the model has no such SFA adapter.
    """
    is_model = isinstance(source, nn.Module)
    return draw_selection(selection_summary(source, adapter_name) if is_model else source, path)


def stage_shares(model: nn.Module, adapter_name: str) -> dict[str, float]:
    """Return the share of each stage's weights that is selected, of those that may be.

    Keys are `stage1`, `stage2`, ... (a plain vision transformer is one stage), and `other` for
    layers whose stage is not known.
    """
    return {
        "other" if s.stage is None else f"stage{s.stage + 1}": s.selected / s.eligible
        for s in count_stages(model, adapter_name)
        if s.eligible
    }


def count_stages(model: nn.Module, adapter_name: str) -> list[StageFacts]:
    """Return an adapter's counts by stage of the backbone, layers of no known stage first."""
    eligible: dict[int | None, int] = defaultdict(int)
    selected: dict[int | None, int] = defaultdict(int)
    widths: dict[int | None, list[int]] = defaultdict(list)
    for stage, row in _count(model, adapter_name):
        eligible[stage] += row["numel"]
        selected[stage] += row["selected"]
    for layer in adapter_layers(model, adapter_name):
        if adapter_name in layer.sfa_down:
            widths[layer.stage].append(layer.sfa_down[adapter_name].weight.shape[0])  # pyright: ignore
    stages = sorted({*eligible, *widths}, key=lambda stage: -1 if stage is None else stage)
    return [StageFacts(s, eligible[s], selected[s], widths[s]) for s in stages]


def _count(model: nn.Module, adapter_name: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield stage and row of each tensor that may be selected from: all counts come from here."""
    pool = find_pool(model, adapter_name)
    if pool is None:
        return
    for i, weight in enumerate(pool.weights):
        layer, parameter = cast(SFALayer, weight.owner), weight.parameter
        numel, selected = weight.tensor.numel(), pool.count(i)
        yield (
            layer.stage,
            {
                "name": pool.names[i].removesuffix(f".{parameter}"),
                "parameter": parameter,
                "role": layer.role,
                "layer": layer.block,
                "stage": layer.stage,
                "numel": numel,
                "selected": selected,
                "share": selected / numel,
            },
        )


def _external(layers: list[SFALayer], adapter_name: str) -> int:
    """Return the number of parameters of an adapter's external adapters."""
    holders = [part for layer in layers for part in (layer.sfa_down, layer.sfa_up)]
    found = [holder[adapter_name] for holder in holders if adapter_name in holder]
    return sum(p.numel() for part in found for p in part.parameters())


def _line(name: str, count: int, total: int, note: str = "") -> str:
    return f"{name:<19} {count:>14,}  {count / total:8.3%}" + (f"  ({note})" if note else "")


def _layers(model: nn.Module, adapter_name: str) -> list[SFALayer]:
    layers = adapter_layers(model, adapter_name)
    if not layers:
        names = sorted({n for m in model.modules() if isinstance(m, SFALayer) for n in m.adapters})
        raise TargetError(
            f"The model has no SFA adapter named `{adapter_name}`; it has {names or 'none'}. Give "
            "adapter_name, or wrap the model first: get_peft_model(model, SFAConfig(...))."
        )
    return layers


def _head_parameters(model: nn.Module, adapter_name: str) -> int:
    return sum(
        p.numel()
        for m in model.modules()
        if isinstance(m, AuxiliaryTrainingWrapper)
        for n, p in m.named_parameters()
        if f".{adapter_name}." in f".{n}."
    )


def _paper_backbone(layers: list[SFALayer], total: int) -> int | None:
    last = [layer for layer in layers if layer.role == "mlp_out"]
    if not last:
        return None
    features = last[-1].base_weight.shape[0]
    return total + _PAPER_CLASSES * (features + 1)


def _range(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low} to {high}"
