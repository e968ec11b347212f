# SPDX-License-Identifier: Apache-2.0
"""Saved adapters read against a model that they are not loaded into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..checkpoint.file import check_selection
from ..checkpoint.packing import unpack
from ..config import SFAConfig
from ..errors import AdapterFileError, SFAError, TargetError
from .plan import Plan, Reused, make_plan
from .pool import Pool
from .saving import State, check_base, pretrained_tensor
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
    """

    source: str
    config: SFAConfig
    plan: Plan
    selection: Selection
    state: State
    digest: str

    @property
    def count(self) -> int:
        """Number of selected weights."""
        return sum(indices.numel() for indices, _ in self.selection.values())


def read_saved(model: nn.Module, source: str, *, strict: bool = True) -> SavedAdapter:
    """Read an adapter that was saved, and check that it fits a model; the model stays as it is.

    Args:
        model: The model, with or without adapters. Its weights must be loaded.
        source: The adapter's folder or Hub id.
        strict: Whether the pretrained weights must be those it was trained on (see
            `SFAConfig.check_base`).

    Raises:
        AdapterFileError: If there is none, it is damaged, or it belongs to another model or base.
    """
    config, state = _read_files(source)
    plan = make_plan(model, config)
    check_base(model, source, plan, strict=strict)
    names = [plan.path_here(t.name) for t in plan.saved.tensors] if plan.saved else []
    weights = [pretrained_tensor(model, name) for name in names]
    stored = {k: t for k, t in state.items() if k.endswith(("sfa_packed", "sfa_slots", "sfa_pool"))}
    if bool(stored) != bool(names):
        raise AdapterFileError(
            f"{source}: its config lists {len(names)} tensors that it changes, but the file holds "
            f"{'a' if stored else 'no'} selection; damaged. Save the adapter again."
        )
    entries = _unpack(source, stored, weights) if stored else []
    selection = {n: e for n, e in zip(names, entries, strict=True) if e[0].numel()}
    return SavedAdapter(source, config, plan, selection, state, _digest(stored))


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

    def base_at(ordinal: int, indices: Tensor) -> Tensor:
        weight = weights[ordinal]
        if weight.is_meta:
            raise AdapterFileError(
                f"{source}: values are stored against the base, which is on the meta device. Load "
                "the base's weights first."
            )
        return weight.reshape(-1)[indices.to(weight.device)]

    sizes = [weight.numel() for weight in weights]
    packed = next((k for k in stored if k.endswith("sfa_packed")), None)
    if packed is not None:
        return unpack(stored[packed], sizes, base_at, f"{source}: {packed}")
    slots = next((t for k, t in stored.items() if k.endswith("sfa_slots")), torch.empty(0))
    values = next((t for k, t in stored.items() if k.endswith("sfa_pool")), torch.empty(1))
    check_selection(f"{source}: sfa_slots", slots, values, sum(sizes))
    used = slots >= 0
    positions, order = slots[used].long().sort()
    change = values[used][order].float()
    starts = torch.tensor([0, *sizes]).cumsum(0)
    cuts = torch.searchsorted(positions, starts).tolist()
    return [
        (positions[a:b] - start, change[a:b])
        for (a, b), start in zip(pairwise(cuts), starts.tolist(), strict=False)
    ]


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
    none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    found = [selection.get(name, none) for name in pool.names]
    pool.assign([indices for indices, _ in found])
    if with_values:
        with torch.no_grad():
            change = torch.cat([change for _, change in found])
            pool.values[: change.numel()] = change.to(pool.values)
