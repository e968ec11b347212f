# SPDX-License-Identifier: Apache-2.0
"""Makes one adapter of several that were trained on the same backbone."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import AdapterFileError, SFAError
from ..sparse.delta import METHODS, Deltas, unite
from ..tuner.adapter import check_name
from ..tuner.layer import find_adapter, find_pool
from ..tuner.upstream.files import fill_adapter
from ..tuner.upstream.rollback import unchanged_on_error
from ..tuner.weighted import union_config
from .overlaps import CombineReport, count_overlaps
from .parts import Part, read_parts

OVERLAPS = ("error", "first")


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
    parts = read_parts(model, sources)
    kept = next((p for p in parts if p.source == kept_source), None)
    _check_external(parts, kept)
    _check_chains(parts)
    report = count_overlaps({p.source: p.selection for p in parts})
    if method == "disjoint" and overlaps == "error" and report.num_shared:
        pair = next(p for p in report.pairs if p.shared)
        raise SFAError(
            f"combine: method='disjoint', but {report.num_shared} weights belong to several "
            f"adapters (`{pair.first}` and `{pair.second}` share {pair.shared}). Use method='sum' "
            "or 'larger', or overlaps='first'."
        )
    factors = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
    selection = unite([p.selection for p in parts], factors, method)
    config = _config(model, parts, kept, selection)
    with unchanged_on_error(model, name):
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
    return peft_model, report


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
    pool, layer = adapter.pool, adapter.store.layer
    start = f"base_model.model.{layer.name}"
    values = pool.values.detach()
    return {f"{start}.sfa_pool": values.clone(), f"{start}.sfa_slots": pool.slots.clone()}


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


def _check_external(parts: Sequence[Part], kept: Part | None) -> None:
    with_external = [p.source for p in parts if p.resolved.widths]
    if with_external and kept is None:
        raise SFAError(
            f"combine: {', '.join(f'`{s}`' for s in with_external)} has external adapters, which "
            "are not linear and cannot be combined. Say whose the new adapter takes: "
            f"keep={with_external[0]!r}."
        )


def _check_chains(parts: Sequence[Part]) -> None:
    later = next((p for p in parts if p.resolved.chain), None)
    if later is not None:
        raise SFAError(
            f"combine: `{later.source}` continues `{later.resolved.chain[-1].source}`, so its "
            "change is not one of the pretrained weights. Combine adapters of the plain backbone."
        )


def _config(
    model: nn.Module, parts: Sequence[Part], kept: Part | None, selection: Deltas
) -> SFAConfig:
    """Return the config of an adapter that is as large as the union."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    source = kept or parts[0]
    return union_config(
        inner,
        [source.resolved, *(p.resolved for p in parts)],
        selection,
        source.config,
        widths=kept.resolved.widths if kept else None,
        external=kept.external if kept else 0,
        modules_to_save=source.config.modules_to_save if kept else None,
    )
