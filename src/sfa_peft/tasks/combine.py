# SPDX-License-Identifier: Apache-2.0
"""Makes one adapter of several that were trained on the same backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike, fspath
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import AdapterFileError, SFAError
from ..files.adapter_config import Resolved
from ..sparse.delta import METHODS, Deltas, count, unite
from ..tuner.adapted_layers import find_adapter, find_pool
from ..tuner.adapter import check_name
from ..tuner.load_adapter import SavedAdapter, check_function, read_saved
from ..tuner.upstream.failed_load import unchanged_on_error
from ..tuner.upstream.save_and_load import fill_adapter
from ..tuner.weighted_adapter import union_config

OVERLAPS = ("error", "first")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PairOverlap:
    """What two adapters share.

    Attributes:
        first: One adapter.
        second: The other.
        shared: Weights that both select.
        share: `shared` over the size of the smaller selection, 0 to 1.
        same_sign: Share of the shared weights that both move the same way (0 counts as a way of
            its own); None where none is shared.
    """

    first: str
    second: str
    shared: int
    share: float
    same_sign: float | None


@dataclass(frozen=True)
class CombineReport:
    """Where the selections of several adapters overlap.

    Attributes:
        counts: Selected weights of each adapter.
        union: Weights that at least one selects.
        num_shared: Weights that more than one selects.
        pairs: What each two share.
    """

    counts: dict[str, int]
    union: int
    num_shared: int
    pairs: tuple[PairOverlap, ...]

    def __str__(self) -> str:
        lines = [f"{name}: {count:,} weights" for name, count in self.counts.items()]
        lines.append(f"together {self.union:,}, of which {self.num_shared:,} in several")
        for pair in self.pairs:
            sign = "" if pair.same_sign is None else f", {pair.same_sign:.1%} the same way"
            names = f"{pair.first} and {pair.second}"
            lines.append(f"  {names}: {pair.shared:,} ({pair.share:.1%} of the smaller){sign}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """One of the adapters.

    Attributes:
        source: Its folder, Hub id or name.
        config: Its config.
        resolved: Its layers and tensors, by the names of the model.
        selection: Its selected entries.
        others: Its external adapters and head, by key as `set_peft_model_state_dict` takes them.
    """

    source: str
    config: SFAConfig
    resolved: Resolved
    selection: Deltas
    others: Mapping[str, Tensor]

    @property
    def external(self) -> int:
        """Number of parameters of the external adapters."""
        parts = (".sfa_down.", ".sfa_up.")
        return sum(t.numel() for k, t in self.others.items() if any(p in k for p in parts))


def combine(
    model: nn.Module,
    adapters: Sequence[str | PathLike[str]],
    *,
    method: str = "sum",
    weights: Sequence[float] | None = None,
    overlaps: str = "error",
    keep: str | PathLike[str] | None = None,
    name: str = "combined",
) -> tuple[PeftModel, CombineReport]:
    """Make one adapter of several of the same backbone; its selection is the union of theirs.

    Only sparse changes can be combined. External adapters are not linear and heads belong to their
    tasks: `keep` says whose the new adapter takes.

    Args:
        model: The plain task model, or a `PeftModel`, which gets the new adapter beside its own.
        adapters: Folders or Hub ids, or names of adapters that the `PeftModel` holds.
        method: "sum": weighted sum of the changes. "larger": where several change a weight, the
            change of the largest absolute value (the first of equal ones). "disjoint": they should
            not overlap; see `overlaps`.
        weights: For "sum" the factor of each adapter; None for 1 each.
        overlaps: For "disjoint": "error" refuses adapters that share a weight; "first" gives a
            shared weight the change of the adapter that is named first, and the report counts them.
        keep: The one of `adapters` whose external adapters and head the new one takes. None takes
            neither.
        name: Name of the new adapter.

    Returns:
        The model with the new adapter (active only if `model` was plain), and the report.

    Raises:
        SFAError: If fewer than two adapters are given, arguments contradict each other, adapters
            overlap that must not, or there are external adapters and `keep` is None. The model is
            unchanged then.
        AdapterFileError: If a folder's adapter is damaged or of another model or base.
    """
    sources = [fspath(adapter) for adapter in adapters]
    kept_source = None if keep is None else fspath(keep)
    _check(sources, method, weights, overlaps, kept_source)
    check_name(name)
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise SFAError(f"combine: the model has an adapter `{name}` already. Give another name.")
    parts = [_read(model, source) for source in sources]
    kept = next((p for p in parts if p.source == kept_source), None)
    _check_parts(parts, kept)
    report = count_overlaps({p.source: p.selection for p in parts})
    if method == "disjoint" and overlaps == "error":
        _refuse_shared(report)
    factors = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
    selection = unite([p.selection for p in parts], factors, method)
    with unchanged_on_error(model, name):
        return _add(model, name, parts, kept, selection), report


def _add(
    model: nn.Module, name: str, parts: Sequence[Part], kept: Part | None, selection: Deltas
) -> PeftModel:
    """Put the new adapter into the model."""
    config = _config(_plain(model), parts, kept, selection)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        peft_model = model
    else:
        peft_model = get_peft_model(model, config, adapter_name=name)
    pool = find_pool(peft_model, name)
    if pool is not None:
        pool.fill(selection, with_values=True)
    if kept is not None:
        _take_over(peft_model, name, kept)
    return peft_model


def _config(
    model: nn.Module, parts: Sequence[Part], kept: Part | None, selection: Deltas
) -> SFAConfig:
    """Return the config of an adapter that is as large as the union."""
    source = kept or parts[0]
    return union_config(
        model,
        [source.resolved, *(p.resolved for p in parts)],
        selection,
        source.config,
        widths=kept.resolved.widths if kept else None,
        external=kept.external if kept else 0,
        modules_to_save=source.config.modules_to_save if kept else None,
    )


def _refuse_shared(report: CombineReport) -> None:
    if report.num_shared:
        pair = next(p for p in report.pairs if p.shared)
        raise SFAError(
            f"combine: method='disjoint', but {report.num_shared} weights belong to several "
            f"adapters (`{pair.first}` and `{pair.second}` share {pair.shared}). Use method='sum' "
            "or 'larger', or overlaps='first'."
        )


def _check(
    sources: Sequence[str],
    method: str,
    weights: Sequence[float] | None,
    overlaps: str,
    keep: str | None,
) -> None:
    if method not in METHODS or overlaps not in OVERLAPS:
        raise SFAError(
            f"combine: expected method one of {', '.join(METHODS)} and overlaps one of "
            f"{', '.join(OVERLAPS)}, got {method!r} and {overlaps!r}."
        )
    if len(sources) < 2 or len(set(sources)) < len(sources):
        raise SFAError(f"combine: expected two or more different adapters, got {sources}.")
    if weights is not None and (method != "sum" or len(weights) != len(sources)):
        raise SFAError(
            f"combine: weights={list(weights)} with method={method!r} and {len(sources)} adapters. "
            "Weights belong to method='sum', one for each adapter."
        )
    if keep is not None and keep not in sources:
        raise SFAError(f"combine: keep={keep!r} is none of the adapters {list(sources)}.")


def _check_parts(parts: Sequence[Part], kept: Part | None) -> None:
    """Refuse adapters whose effect is more than a change of the pretrained weights."""
    with_external = [p.source for p in parts if p.resolved.widths]
    if with_external and kept is None:
        raise SFAError(
            f"combine: {', '.join(f'`{s}`' for s in with_external)} has external adapters, which "
            "are not linear and cannot be combined. Say whose the new adapter takes: "
            f"keep={with_external[0]!r}."
        )
    later = next((p for p in parts if p.resolved.chain), None)
    if later is not None:
        raise SFAError(
            f"combine: `{later.source}` continues `{later.resolved.chain[-1].source}`, so its "
            "change is not one of the pretrained weights. Combine adapters of the plain backbone."
        )


def _read(model: nn.Module, source: str) -> Part:
    """Return one of the adapters; the model stays as it is."""
    if isinstance(model, PeftModel) and source in model.peft_config:
        return _loaded(model, source)
    saved = read_saved(_plain(model), source)
    check_function(source, saved.plan, strict=True)
    return _saved(saved)


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _loaded(model: PeftModel, name: str) -> Part:
    config = model.peft_config[name]
    adapter = find_adapter(model, name)
    if not isinstance(config, SFAConfig) or adapter is None:
        raise SFAError(f"combine: `{name}` is not an SFA adapter. Give SFA adapters.")
    state = cast(dict[str, Tensor], get_peft_model_state_dict(model, adapter_name=name))
    others = {k: t.detach().clone() for k, t in state.items() if not _is_selection(k)}
    deltas = adapter.pool.deltas() if adapter.pool else {}
    return Part(name, config, adapter.record, deltas, others)


def _saved(saved: SavedAdapter) -> Part:
    others = {
        _renamed(k, saved.plan.renamed): t for k, t in saved.state.items() if not _is_selection(k)
    }
    return Part(saved.source, saved.config, saved.plan.record, saved.deltas, others)


def _is_selection(key: str) -> bool:
    return key.endswith((".sfa_packed", ".sfa_slots", ".sfa_pool"))


def _renamed(key: str, renamed: Mapping[str, str]) -> str:
    path, dot, rest = key.removeprefix(_PREFIX).partition(".sfa_")
    return f"{_PREFIX}{renamed.get(path, path)}{dot}{rest}" if dot else key


def count_overlaps(selections: Mapping[str, Deltas]) -> CombineReport:
    """Return what selections share, by adapter."""
    counts = {name: count(selection) for name, selection in selections.items()}
    union = shared = 0
    for tensor in dict.fromkeys(t for selection in selections.values() for t in selection):
        found = [selection[tensor][0] for selection in selections.values() if tensor in selection]
        _, times = torch.cat(found).unique(return_counts=True)
        union += times.numel()
        shared += int((times > 1).sum())
    pairs = tuple(_pair(a, b, selections) for a, b in combinations(selections, 2))
    return CombineReport(counts, union, shared, pairs)


def _pair(first: str, second: str, selections: Mapping[str, Deltas]) -> PairOverlap:
    one, two = selections[first], selections[second]
    shared = same = 0
    for tensor in one.keys() & two.keys():
        (a, a_change), (b, b_change) = one[tensor], two[tensor]
        inside = torch.isin(a, b, assume_unique=True)
        places = torch.searchsorted(b, a[inside])
        shared += places.numel()
        same += int((a_change[inside].sign() == b_change[places].sign()).sum())
    smaller = min(count(one), count(two))
    share = shared / smaller if smaller else 0.0
    return PairOverlap(first, second, shared, share, same / shared if shared else None)


def _take_over(model: PeftModel, name: str, kept: Part) -> None:
    """Load the external adapters and the head of one of the adapters."""
    try:
        fill_adapter(model, name, {**kept.others, **_selection_state(model, name)})
    except AdapterFileError as error:
        raise SFAError(
            f"combine: the head of `{kept.source}` does not fit the model ({error}). Give the task "
            "model that it was trained with."
        ) from error


def _selection_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return the selection that an adapter has, by key as in a file."""
    adapter = find_adapter(model, name)
    if adapter is None or adapter.pool is None or adapter.store is None:
        return {}
    pool, start = adapter.pool, f"{_PREFIX}{adapter.store.layer.name}"
    values = pool.values.detach()
    return {f"{start}.sfa_pool": values.clone(), f"{start}.sfa_slots": pool.slots.clone()}
