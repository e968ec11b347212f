# SPDX-License-Identifier: Apache-2.0
"""What saved adapters hold, read off their files alone: no model, no base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks import stage_of
from ..files.adapter_config import Resolved, read_resolved
from ..files.folder import selection_of
from ..files.packing import PackedSelection
from ..plots import draw_selections
from ..tuner.adapter_chain import SavedFiles, Search, packed_key
from .task_folder import pretrained_source

_DOWN, _UP = ".sfa_down.", ".sfa_up."


@dataclass(frozen=True)
class SavedPart:
    """What an adapter changes in the layers of one role and stage.

    Attributes:
        stage: Ordinal of the stage from 0, None if unknown.
        role: Role of the layers, None if unknown.
        layers: Number of layers.
        eligible: Pretrained weights that might be selected.
        selected: Those that are.
        external: Parameters of external adapters.
    """

    stage: int | None
    role: str | None
    layers: int
    eligible: int
    selected: int
    external: int


@dataclass(frozen=True)
class SavedReport:
    """What a saved adapter holds.

    Attributes:
        source: Folder or Hub id.
        base: Name of the base model, or of its backbone where a `task.json` says; None if none
            does.
        backbone: Model type of the backbone, None if unknown.
        budget: The share that was asked for.
        total: Parameters of the backbone.
        parts: By stage and role.
        head: Parameters that are saved whole.
        nbytes: Bytes of all tensors.
        selection_nbytes: Of those, bytes of the packed selection.
        values: How changes are stored, None where no weight is changed.
        position_bits: Bits of a position.
        value_bits: Bits of a change.
        chain: Sources of earlier adapters that it builds on, the oldest first.
        dtypes: Types of the pretrained tensors.
        digest: SHA-256 of the packed selection, hexadecimal.
    """

    source: str
    base: str | None
    backbone: str | None
    budget: float
    total: int
    parts: tuple[SavedPart, ...]
    head: int
    nbytes: int
    selection_nbytes: int
    values: str | None
    position_bits: float
    value_bits: float
    chain: tuple[str, ...]
    dtypes: tuple[str, ...]
    digest: str
    rows: tuple[dict[str, Any], ...] = field(repr=False, default=())

    @property
    def selected(self) -> int:
        """Selected weights of all parts."""
        return sum(part.selected for part in self.parts)

    @property
    def external(self) -> int:
        """Parameters of all external adapters."""
        return sum(part.external for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it, totals included."""
        fields = asdict(self)
        del fields["rows"]
        return {**fields, "selected": self.selected, "external": self.external}

    def __str__(self) -> str:
        share = (self.selected + self.external) / max(self.total, 1)
        lines = [
            f"{self.source}",
            f"base               {self.base or 'not said'}",
            f"backbone           {self.backbone or 'unknown'}, {self.total:,} parameters",
            f"tensors            {', '.join(self.dtypes) or 'none is changed'}",
            f"budget             {self.budget:g}, used {share:.3%}",
            f"selected weights   {self.selected:>12,}",
            f"external adapters  {self.external:>12,}",
            f"head, saved whole  {self.head:>12,}",
            f"bytes              {self.nbytes:>12,}  (selection {self.selection_nbytes:,})",
        ]
        if self.selected:
            lines.append(
                f"a changed weight   {self.position_bits:.2f} bits of position, "
                f"{self.value_bits:.2f} of change ({self.values})"
            )
        lines += [f"builds on          {source}" for source in self.chain]
        lines.append(
            f"{'stage':<7}{'role':<10}{'layers':>7}{'eligible':>14}{'selected':>12}"
            f"{'share':>9}{'external':>12}"
        )
        for part in self.parts:
            stage = "-" if part.stage is None else str(part.stage + 1)
            lines.append(
                f"{stage:<7}{part.role or 'other':<10}{part.layers:>7}{part.eligible:>14,}"
                f"{part.selected:>12,}{part.selected / max(part.eligible, 1):>9.2%}"
                f"{part.external:>12,}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class DiffReport:
    """How two saved adapters differ.

    Attributes:
        first: One adapter.
        second: The other.
        config: Fields of the configs that differ, with both values.
        shared: Weights that both select.
        only_first: Weights that only the first selects.
        only_second: Weights that only the second selects.
        tensors: Of all that is stored: names that only one has, or whose values differ.
    """

    first: str
    second: str
    config: dict[str, tuple[Any, Any]]
    shared: int
    only_first: int
    only_second: int
    tensors: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether configs, selections and all tensors are equal, changes included."""
        return not (self.config or self.only_first or self.only_second or self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "same": self.same}

    def __str__(self) -> str:
        if self.same:
            return f"{self.first} and {self.second} hold the same"
        lines = [f"{n}: {a!r} and {b!r}" for n, (a, b) in self.config.items()]
        share = self.shared / max(self.shared + min(self.only_first, self.only_second), 1)
        lines += [
            f"selected by both            {self.shared:,}, {share:.1%} of the smaller",
            f"selected by the first only  {self.only_first:,}",
            f"selected by the second only {self.only_second:,}",
        ]
        lines += [f"{name}: {how}" for name, how in self.tensors.items()]
        return "\n".join(lines)


def inspect(source: str | PathLike[str]) -> SavedReport:
    """Return what a saved adapter holds, by stage and role; print it for a table.

    Args:
        source: Folder or Hub id.

    Raises:
        AdapterFileError: If there is none, or it is damaged.
    """
    files = Search().read(fspath(source))
    config, record = files.config, read_resolved(files.config.resolved)
    key, packed = packed_key(files.state), _selection(files)
    positions = _positions(record, packed)
    rows = _rows(record, positions)
    selection = None if packed is None else packed.blob
    places = 0 if selection is None else selection.index_nbytes
    values = 0 if selection is None else sum(selection.section_nbytes) - places
    count = max(sum(p.numel() for p in positions.values()), 1)
    dtypes = {tensor.dtype for tensor in record.tensors}
    return SavedReport(
        source=files.source,
        base=config.base_model_name_or_path or pretrained_source(files.source),
        backbone=record.backbone,
        budget=config.budget,
        total=record.total,
        parts=tuple(_parts(files, record, rows)),
        head=sum(t.numel() for n, t in files.state.items() if ".sfa_" not in n),
        nbytes=sum(t.nbytes for t in files.state.values()),
        selection_nbytes=0 if key is None else files.state[key].nbytes,
        values=None if selection is None else selection.mode.name.lower(),
        position_bits=8 * places / count,
        value_bits=8 * values / count,
        chain=tuple(link.source for link in files.links),
        dtypes=tuple(sorted(dtype for dtype in dtypes if dtype)),
        digest=files.digest,
        rows=tuple(rows),
    )


def diff(first: str | PathLike[str], second: str | PathLike[str]) -> DiffReport:
    """Return how two saved adapters differ.

    Args:
        first: Folder or Hub id.
        second: Another one.

    Raises:
        AdapterFileError: If one is missing or damaged.
    """
    search = Search()
    a, b = search.read(fspath(first)), search.read(fspath(second))
    ones, twos = _selected(a), _selected(b)
    shared = _shared(ones, twos)
    fields = [{**f.config.to_dict(), "resolved": None} for f in (a, b)]
    config = {n: (v, fields[1].get(n)) for n, v in fields[0].items() if v != fields[1].get(n)}
    return DiffReport(
        first=a.source,
        second=b.source,
        config=config,
        shared=shared,
        only_first=sum(p.numel() for p in ones.values()) - shared,
        only_second=sum(p.numel() for p in twos.values()) - shared,
        tensors=_differing(a.state, b.state),
    )


def overlaps(sources: Sequence[str | PathLike[str]]) -> dict[tuple[str, str], float]:
    """Return for each two adapters the share of the smaller selection that both select, 0 to 1.

    Args:
        sources: Folders or Hub ids.

    Raises:
        AdapterFileError: If one is missing or damaged.
    """
    search = Search()
    names = [fspath(source) for source in sources]
    return _overlaps({name: _selected(search.read(name)) for name in names})


def _overlaps(found: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], float]:
    shares = {}
    for a, b in combinations(found, 2):
        smaller = min(sum(p.numel() for p in found[name].values()) for name in (a, b))
        shares[a, b] = _shared(found[a], found[b]) / max(smaller, 1)
    return shares


def plot_saved(
    sources: Sequence[str | PathLike[str]], path: str | Path
) -> dict[tuple[str, str], float]:
    """Draw where saved adapters select, and how much any two overlap (needs matplotlib).

    Args:
        sources: Folders or Hub ids; their last parts are the titles, if they differ.
        path: Where to write the picture; its ending decides the format.

    Returns:
        What `overlaps` returns.

    Raises:
        AdapterFileError: If one is missing or damaged.
    """
    names = [fspath(source) for source in sources]
    short = {name: Path(name).name for name in names}
    titles = (
        short if len(set(short.values())) == len(names) else dict(zip(names, names, strict=True))
    )
    search, found, rows = Search(), {}, {}
    for name in names:
        files = search.read(name)
        found[name] = _selected(files)
        rows[titles[name]] = _rows(read_resolved(files.config.resolved), found[name])
    shares = _overlaps(found)
    draw_selections(rows, {(titles[a], titles[b]): s for (a, b), s in shares.items()}, path)
    return shares


def _selection(files: SavedFiles) -> PackedSelection | None:
    key = packed_key(files.state)
    return None if key is None else selection_of(files.state[key], f"{files.source}: {key}")


def _selected(files: SavedFiles) -> dict[str, Tensor]:
    return _positions(read_resolved(files.config.resolved), _selection(files))


def _positions(record: Resolved, packed: PackedSelection | None) -> dict[str, Tensor]:
    """Return the selected positions by full name of a weight."""
    if packed is None:
        return {}
    sizes = [torch.Size(tensor.shape).numel() for tensor in record.tensors]
    return dict(zip([t.name for t in record.tensors], packed.positions(sizes), strict=True))


def _rows(record: Resolved, positions: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return a row for each tensor, as `selection_summary` does of a model."""
    rows = []
    for tensor in record.tensors:
        path, _, parameter = tensor.name.rpartition(".")
        layer, numel = record.layers[path], torch.Size(tensor.shape).numel()
        selected = positions[tensor.name].numel() if tensor.name in positions else 0
        rows.append(
            {
                "name": path,
                "parameter": parameter,
                "role": layer.role,
                "layer": layer.block,
                "stage": stage_of(path) if layer.role else None,
                "numel": numel,
                "selected": selected,
                "share": selected / max(numel, 1),
            }
        )
    return rows


def _parts(
    files: SavedFiles, record: Resolved, rows: Sequence[Mapping[str, Any]]
) -> list[SavedPart]:
    external: dict[str, int] = dict.fromkeys(record.layers, 0)
    for key, tensor in files.state.items():
        for mark in (_DOWN, _UP):
            if mark in key:
                path = key.partition(mark)[0].removeprefix("base_model.model.")
                external[path] = external.get(path, 0) + tensor.numel()
    groups: dict[tuple[int | None, str | None], list[str]] = {}
    for path, layer in record.layers.items():
        stage = stage_of(path) if layer.role else None
        groups.setdefault((stage, layer.role), []).append(path)
    parts = []
    for (stage, role), paths in groups.items():
        inside = set(paths)
        own = [row for row in rows if row["name"] in inside]
        parts.append(
            SavedPart(
                stage,
                role,
                len(paths),
                sum(row["numel"] for row in own),
                sum(row["selected"] for row in own),
                sum(external[path] for path in paths),
            )
        )
    return sorted(parts, key=lambda p: (p.stage is None, p.stage or 0))


def _shared(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    return sum(
        int(torch.isin(one[name], other[name], assume_unique=True).sum())
        for name in one.keys() & other.keys()
    )


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, str]:
    found = {}
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            found[name] = "only in the first" if name in one else "only in the second"
        elif one[name].shape != other[name].shape and not name.endswith("sfa_packed"):
            found[name] = f"{list(one[name].shape)} and {list(other[name].shape)}"
        elif not torch.equal(one[name], other[name]):
            found[name] = "other values"
    return found
