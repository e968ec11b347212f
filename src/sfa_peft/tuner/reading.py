# SPDX-License-Identifier: Apache-2.0
"""Saved adapters read against a model that they are not loaded into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import AdapterFileError, SFAError, TargetError
from ..files.folder import check_selection
from ..files.packing import adapt, unpack
from ..files.record import read_resolved
from ..sparse.pool import Pool
from .plan import Plan, Reused, make_plan
from .saving import State, base_reader, by_tensor, check_base, pretrained_tensor
from .targets import is_excluded

#: By full name of a tensor: flat positions (int64, strictly increasing) and change (float32).
Selection = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's files say about a model.

    Attributes:
        source: Folder or Hub id.
        config: Its config.
        plan: Its layers and tensors, found in the model.
        selection: Its selected entries by the names of this model, in the file's order; tensors
            without any are left out.
        state: All its tensors by key, as in the file.
        digest: SHA-256 of the stored selection, hexadecimal.
        chain: Earlier adapters that it builds on, the oldest first.
    """

    source: str
    config: SFAConfig
    plan: Plan
    selection: Selection
    state: State
    digest: str
    chain: tuple[SavedAdapter, ...] = ()

    @property
    def count(self) -> int:
        """Number of selected weights."""
        return sum(indices.numel() for indices, _ in self.selection.values())


def read_saved(
    model: nn.Module, source: str, *, strict: bool = True, later: tuple[str, ...] = ()
) -> SavedAdapter:
    """Read an adapter that was saved, and check that it fits a model; the model stays as it is.

    Args:
        model: The model, with or without adapters. Its weights must be loaded.
        source: The adapter's folder or Hub id.
        strict: Whether the pretrained weights must be those it was trained on (see
            `SFAConfig.check_base`).
        later: Sources of adapters that build on this one, to notice cycles.

    Raises:
        AdapterFileError: If there is none, it is damaged, or it belongs to another model or base;
            or an adapter that it builds on is missing or was changed.
    """
    key = str(Path(source).resolve()) if Path(source).is_dir() else source
    if key in later:
        raise AdapterFileError(
            f"{source}: the chain of earlier adapters comes back to it, so none can be the first. "
            "Were folders moved or overwritten? Restore the earlier adapters."
        )
    config, state = _read_files(source)
    chain = read_chain(model, config, source, strict=strict, later=(*later, key))
    plan = make_plan(model, config)
    check_base(model, source, plan, strict=strict)
    names = [plan.path_here(t.name) for t in plan.saved.tensors] if plan.saved else []
    weights = [_with_changes(pretrained_tensor(model, name), name, chain) for name in names]
    stored = {k: t for k, t in state.items() if k.endswith(("sfa_packed", "sfa_slots", "sfa_pool"))}
    if bool(stored) != bool(names):
        raise AdapterFileError(
            f"{source}: its config lists {len(names)} tensors that it changes, but the file holds "
            f"{'a' if stored else 'no'} selection; damaged. Save the adapter again."
        )
    entries = _unpack(source, stored, weights) if stored else []
    selection = {n: e for n, e in zip(names, entries, strict=True) if e[0].numel()}
    return SavedAdapter(source, config, plan, selection, state, _digest(stored), chain)


def read_chain(
    model: nn.Module,
    config: SFAConfig,
    folder: str | None,
    *,
    strict: bool,
    later: tuple[str, ...] = (),
) -> tuple[SavedAdapter, ...]:
    """Read the earlier adapters that an adapter builds on, the oldest first.

    Args:
        model: The model.
        config: Of the adapter; a new one's `continue_from`, a saved one's `resolved` counts.
        folder: Where the config was read, None for a new adapter.
        strict: As in `read_saved`.
        later: As in `read_saved`.

    Raises:
        AdapterFileError: If one is missing, was changed since, or does not fit the model.
    """
    if config.resolved is None:
        if config.continue_from is None:
            return ()
        parent = read_saved(model, config.continue_from, strict=strict, later=later)
        return (*parent.chain, parent)
    links = read_resolved(config.resolved).chain
    if not links:
        return ()
    errors = []
    for source in _places(links[-1].source, folder):
        try:
            parent = read_saved(model, source, strict=strict, later=later)
        except AdapterFileError as error:
            errors.append(error)
            continue
        chain = (*parent.chain, parent)
        if [a.digest for a in chain] == [link.digest for link in links]:
            return chain
        errors.append(AdapterFileError(f"{source}: its selection (or one before) is another now."))
    raise AdapterFileError(
        f"{folder or 'The adapter'} continues `{links[-1].source}` and needs it as it was then: "
        f"{'; '.join(map(str, errors))} Put the earlier adapter there or beside the new one."
    ) from errors[0]


def _places(source: str, folder: str | None) -> list[str]:
    """Return where an earlier adapter may be: as given, or seen from the later one's folder."""
    found = [source]
    if folder is not None and Path(folder).is_dir():
        inside, beside = Path(folder) / source, Path(folder).resolve().parent / Path(source).name
        found = [str(inside), source, str(beside)]
    there = [place for place in found if (Path(place) / "adapter_config.json").is_file()]
    return list(dict.fromkeys(there)) or [source]


def _with_changes(weight: Tensor, name: str, chain: Sequence[SavedAdapter]) -> Tensor:
    """Return a weight with the changes of earlier adapters, added one after the other."""
    for saved in chain:
        if name in saved.selection and not weight.is_meta:
            indices, change = (t.to(weight.device) for t in saved.selection[name])
            flat = weight.reshape(-1).clone()
            flat[indices] = adapt(flat[indices], change)
            weight = flat.view(weight.shape)
    return weight


def _read_files(source: str) -> tuple[SFAConfig, State]:
    try:
        config = PeftConfig.from_pretrained(source)
        if not isinstance(config, SFAConfig):
            raise AdapterFileError(f"{source}: its config is not of an SFA adapter.")
        if config.resolved is None:
            raise AdapterFileError(
                f"{source}: its config does not say what it was solved to; it was not written by "
                "save_pretrained. Save the adapter again."
            )
        SFAConfig.from_pretrained(source)  # checks that the tensors are whole
        return config, load_peft_weights(source, device="cpu")
    except SFAError:
        raise
    except Exception as error:  # of the Hub's client, of safetensors, of JSON
        raise AdapterFileError(
            f"{source}: no adapter can be read there ({type(error).__name__}: {error}). Give the "
            "folder that save_pretrained wrote, or a Hub id."
        ) from error


def _unpack(source: str, stored: State, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (positions, change) of each tensor."""
    sizes = [weight.numel() for weight in weights]
    packed = next((k for k in stored if k.endswith("sfa_packed")), None)
    if packed is not None:
        base_at = base_reader(weights.__getitem__, source)
        return unpack(stored[packed], sizes, base_at, f"{source}: {packed}")
    slots = next((t for k, t in stored.items() if k.endswith("sfa_slots")), torch.empty(0))
    values = next((t for k, t in stored.items() if k.endswith("sfa_pool")), torch.empty(1))
    check_selection(f"{source}: sfa_slots", slots, values, sum(sizes))
    return by_tensor(slots, values.float(), list(accumulate(sizes, initial=0)))


def _digest(stored: State) -> str:
    found = hashlib.sha256()
    for key in sorted(stored):
        tensor = stored[key].contiguous()
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def reuse(saved: SavedAdapter, config: SFAConfig) -> Reused:
    """Return a saved selection as a plan takes it.

    Raises:
        TargetError: If the new config leaves out or saves whole a layer that is selected from, or
            nothing is selected.
    """
    if not saved.selection:
        raise TargetError(
            f"selection_from={saved.source!r}: no weight is selected there. Was that adapter "
            "trained with SFACallback or SFASelector?"
        )
    parameters = {n: list(t.parameters) for n, t in saved.plan.targets.items() if t.parameters}
    for name in parameters:
        if is_excluded(config, name) is not None:
            raise TargetError(
                f"selection_from={saved.source!r} selects weights of `{name}`, which "
                "exclude_modules or modules_to_save of the new config takes. Change those."
            )
    return Reused(parameters, saved.count)


def fill_pool(pool: Pool, selection: Selection, *, with_values: bool) -> None:
    """Assign the next free slots of a pool to saved entries.

    Args:
        pool: An empty pool.
        selection: By the names of the pool's tensors.
        with_values: Whether values are set to the saved change; otherwise they stay as they are.
    """
    none = tuple(torch.empty(0, dtype=t, device="cpu") for t in (torch.int64, torch.float32))
    found = [selection.get(name, none) for name in pool.names]
    pool.assign([indices for indices, _ in found])
    if with_values:
        with torch.no_grad():
            change = torch.cat([change for _, change in found])
            pool.values[: change.numel()] = change.to(pool.values)
