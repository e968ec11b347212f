# SPDX-License-Identifier: Apache-2.0
"""`Adapter`: the one door to an adapter in a model; its selection is packed and unpacked here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import SFAConfig
from ..errors import (
    AdapterFileError,
    EmptySelectionWarning,
    OtherBaseWarning,
    SelectionError,
    SFAError,
    UnfinishedSelectionWarning,
    warn,
)
from ..files.adapter_config import Resolved, SavedTensor, digests, type_name
from ..files.packing import Entries, PackedSelection, pack, read_packed, with_manifest
from ..selection.pick import is_unfinished
from ..selection.rounds import Rounds
from ..selection.schedule import make_schedule, share_by_rates
from ..sparse.delta import Delta, adapt, by_weight
from ..sparse.optimizer import MicroBatches, check_unseen_step
from ..sparse.pool import Pool
from ..sparse.shards import whole
from ..sparse.weight import Weight
from ..sparse.weight_averages import notice

#: Training forwards with an unfinished selection after which a missing selector is reported.
_PATIENCE = 3


class LayerStore:
    """Values and positions that are a Parameter and a buffer of a layer.

    So that they live in the model, also where the tuner around it is not kept.

    Args:
        layer: The first layer with a weight that may be selected from.
        adapter_name: The adapter.
    """

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer, self.adapter_name = layer, adapter_name
        self._cut: DTensor | None = None

    @classmethod
    def make(cls, layer: Any, adapter: Adapter) -> LayerStore:
        """Put room for values and positions of all layers into the first one, and return it."""
        size, packed_size = adapter.record.internal, adapter.record.packed
        # PEFT casts the values to fp32 later, but leaves float64, of which a file would lose bits.
        narrow = layer.base_weight.dtype.itemsize <= torch.float32.itemsize
        dtype = layer.base_weight.dtype if narrow else torch.float32
        options = {"device": layer.base_weight.device, "dtype": dtype}
        layer.sfa_pool[adapter.name] = nn.Parameter(torch.zeros(size, **options))
        few = adapter.record.num_weights <= torch.iinfo(torch.int32).max
        options["dtype"] = torch.int32 if few else torch.int64
        layer.sfa_slots[adapter.name] = torch.full((size,), -1, **options)
        if packed_size is not None:
            options["dtype"] = torch.uint8
            layer.sfa_packed[adapter.name] = torch.zeros(packed_size, **options)
        return cls(layer, adapter.name)

    # Asked by each layer in each forward, so not by the dicts' own ways, which take longer.

    @property
    def values(self) -> Any:
        """The change of each assigned weight, (size,).

        A DTensor once `fully_shard` has cut it over ranks, also while a forward shows another in
        its place.
        """
        values = self.layer._modules["sfa_pool"]._parameters[self.adapter_name]
        if isinstance(values, DTensor):
            self._cut = values
        return values if self._cut is None else self._cut

    @property
    def slots(self) -> Tensor:
        """Position of each value, (size,)."""
        return self.layer._modules["sfa_slots"]._buffers[self.adapter_name]

    @property
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """The dicts in which values and positions lie under the adapter's name."""
        modules, name = self.layer._modules, self.adapter_name
        return [(modules["sfa_pool"]._parameters, name), (modules["sfa_slots"]._buffers, name)]

    @property
    def is_there(self) -> bool:
        """Whether the model still has the adapter."""
        return self.adapter_name in self.layer.sfa_pool

    @property
    def packed(self) -> Tensor | None:
        """A saved selection that waits to be unpacked, uint8; None where none is awaited."""
        packed = self.layer.sfa_packed
        return packed[self.adapter_name] if self.adapter_name in packed else None  # noqa: SIM401

    def drop_packed(self) -> None:
        """Wait for no saved selection any longer."""
        if self.packed is not None:
            self.layer.sfa_packed.pop(self.adapter_name)


class Adapter:
    """What makes up one adapter in a model.

    Args:
        name: Its name.
        config: Its config.
        record: What its budget was solved to.

    Attributes:
        pool: Values and positions of its sparse change; None where it changes no weight.
        store: Where they lie.
        new_paths: By path in its file the path of a layer here, where that is another.
        needs_selector: Whether its selection is made while training and nobody has begun to.
    """

    def __init__(self, name: str, config: SFAConfig, record: Resolved) -> None:
        self.name, self.config, self.record = name, config, record
        self.pool: Pool | None = None
        self.store: LayerStore | None = None
        self.new_paths: dict[str, str] = {}
        self.needs_selector = config.selects_while_training
        self._in_steps = False  # whether the latest forward was of a training step
        self._micro_batches = MicroBatches()
        self._idle_forwards = 0  # with an unfinished selection and no selector

    def make_pool(self, store: LayerStore) -> Pool:
        """Give it a pool, whose weights are added next."""
        self.store = store
        self.pool = Pool(
            self.name,
            store,
            lr_ratio=self.config.internal_lr_ratio,
            decay_weight=self.config.weight_decay_on == "weight",
        )
        return self.pool

    def unpack(self) -> None:
        """Unpack a selection that a loader put into the model as it lies in the file.

        transformers' own loader calls none of PEFT's hooks: the bytes wait on the layer until
        somebody asks for the adapter.

        Raises:
            AdapterFileError: If they are damaged, or of another base.
        """
        packed = None if self.store is None else self.store.packed
        if self.pool is None or self.store is None or packed is None:
            return
        if packed.is_meta or not bool(packed.any()):
            return  # not loaded (yet)
        selection = read_packed(packed, f"adapter `{self.name}`, sfa_packed")
        slots, values = unpack_selection(self.pool, selection)
        if self.pool.shard is None:
            kept = self.pool.values
            kept.data = values.to(kept.device)  # the same parameter, float32 also on a 16-bit base
        self.pool.load_state_dict({"slots": slots, "values": values})
        self.store.drop_packed()

    def find_shards(self, layer: Any) -> None:
        """Go over to the shards of values and weights that are cut, if a layer holds the values."""
        if self.pool is not None and self.store is not None and self.store.layer is layer:
            self.pool.find_shards()

    def look(self, *, steps: bool = False) -> None:
        """Look for what others wrote into the pool; not in adapters that were loaded for inference.

        Nor where it is cut over ranks, all of which would have to look together.

        Args:
            steps: Whether it is for a training step: then not if it was in the one before, and
                torch's hooks saw all steps between them.

        Raises:
            SFAError: If values whose positions nobody knows are found, or a step that no hook saw
                where one must.
        """
        if self.pool is None or self.config.inference_mode or self.pool.shard is not None:
            return
        steps = steps and self.pool.values.requires_grad
        seen = steps and self._micro_batches.expect(self.pool.optimizer_steps)
        if not (seen and self._in_steps):
            writes = self.pool.foreign_writes
            notice(self.pool)
            if steps and self._in_steps and self.pool.foreign_writes != writes:
                check_unseen_step(self.pool)
        self._in_steps = steps

    def begin(self, check: Callable[[Pool], None]) -> None:
        """Begin the selection of a loop that will call `count_step`, if `check` lets it."""
        pool, length = self.pool, self.config.total_steps
        if pool is None or length is None or pool.driver is not None or not self.needs_selector:
            return
        self.unpack()
        if pool.values.requires_grad and pool.is_empty:
            check(pool)
            self._make_rounds(pool).start()

    def watch(self, weight: Weight) -> None:
        """Report once that a selection is being trained which nobody makes.

        Args:
            weight: That of which a training forward asks; the first one counts the forwards.
        """
        pool = self.pool
        if not self.needs_selector or pool is None or pool.weights[0] is not weight:
            return
        if not pool.values.requires_grad:
            return
        if isinstance(pool.driver, Rounds) and pool.driver.optimizer_steps == pool.optimizer_steps:
            return  # each step was counted so far
        if self._idle_forwards >= _PATIENCE or not is_unfinished(pool, self.config.rules):
            return
        self._idle_forwards += 1
        if self._idle_forwards == _PATIENCE:
            selected = pool.num_assigned
            lacking = (
                f"beyond the {selected} of {pool.size} that an unfinished run selected"
                if selected
                else "so only the external adapters and the head learn"
            )
            warn(
                f"Adapter `{self.name}`: training goes on but nothing selects weights, "
                f"{lacking}. Pass "
                "callbacks=[SFACallback()] to the Trainer, or call SFASelector.step() after "
                "each optimizer.step() in an own loop.",
                UnfinishedSelectionWarning if selected else EmptySelectionWarning,
            )

    def _make_rounds(self, pool: Pool) -> Rounds:
        """Return the rounds of a run of which nothing but the config is known."""
        schedule = make_schedule(
            self.config.total_steps,
            self.config.selection_steps,
            quota=pool.size,
            kind=self.config.schedule,
            select_until=self.config.select_until,
            default_until=share_by_rates(None),
        )
        rules = replace(self.config.rules, select_until=schedule.select_until)
        return Rounds(rules, pool, schedule)

    def count_step(self) -> None:
        """Count an update step of a loop without a selector; pick at the end of a round.

        Raises:
            SelectionError: If the length of the run is not known, nothing was seen of its first
                step, a selector makes the selection, or a gradient scaler stands between.
        """
        pool = self.pool
        if pool is None or not self.config.selects_while_training:
            return
        if pool.driver is None and not pool.is_empty:  # finished, or trained on without its rounds
            return
        where = f"update_and_allocate, adapter `{self.name}`"
        if not self.needs_selector:
            raise SelectionError(
                f"{where}: SFACallback or SFASelector makes its selection already. Use one of them."
            )
        if self.config.total_steps is None:
            raise SelectionError(
                f"{where}: the length of the run is unknown, so rounds cannot be planned. Give it "
                "in optimizer updates: SFAConfig(total_steps=...)."
            )
        if pool.stepped_by_grad_scaler:
            raise SelectionError(
                f"{where}: the loss is scaled by a GradScaler, which scores must know of. Use "
                "SFASelector(model, scaler=scaler) instead."
            )
        if isinstance(pool.driver, Rounds) and pool.optimizer is not None:
            pool.driver.step(pool.optimizer())
        elif pool.optimizer is not None:
            raise SelectionError(
                f"{where}: an optimizer has stepped, but no forward with gradients came before. "
                "Call the whole model: what calls a part of it needs SFASelector."
            )


def pack_state(
    adapter: Adapter,
    state: dict[str, Tensor],
    saved_values: str,
    model_state: Mapping[str, Tensor],
) -> Resolved:
    """Put the packed selection in the place of values and positions in a state dict.

    Args:
        adapter: The adapter.
        state: Its tensors by key; changed in place.
        saved_values: How changed weights are written, see `SFAConfig`.
        model_state: Those of the whole model, where weights are cut over ranks.

    Returns:
        Its record, with the size of the packed selection and the base's digests.
    """
    pool, record = adapter.pool, adapter.record
    key = next((k for k in state if ".sfa_slots" in f".{k}"), None)
    if key is None or pool is None:
        return record
    slots = state.pop(key)
    values = state.pop(key.replace("sfa_slots", "sfa_pool"))
    if slots.is_meta or values.is_meta or any(w.tensor.is_meta for w in pool.weights):
        raise AdapterFileError(
            "The adapter or its base is on the meta device and holds no values; load it first."
        )
    deltas = by_weight(slots.detach().cpu(), values.detach().cpu(), pool.starts)
    tensors, entries = _saved_entries(adapter, pool, deltas, model_state)
    if saved_values == "exact":
        _warn_of_lost_bits(adapter.name, entries)
    packed = pack(entries, saved_values)
    state[key.replace("sfa_slots", "sfa_packed")] = packed = with_manifest(packed, tensors)
    return replace(record, tensors=tensors, packed=packed.numel())


def _pretrained(pool: Pool, model_state: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield whole pretrained weights.

    Of weights that are cut, those of a state dict, which may be whole already: then a single rank
    may save.
    """
    if pool.shard is None:
        yield from (weight.pretrained() for weight in pool.weights)
        return
    keys = {k.replace(".base_layer.", "."): k for k in model_state if ".base_layer." in k}
    keys = {k.removeprefix("base_model.model."): found for k, found in keys.items()}
    for name, weight in zip(pool.names, pool.weights, strict=True):
        yield whole(model_state[keys[name]]) if name in keys else weight.pretrained()


def _saved_entries(
    adapter: Adapter, pool: Pool, deltas: Sequence[Delta], model_state: Mapping[str, Tensor]
) -> tuple[tuple[SavedTensor, ...], list[Entries]]:
    """Return each weight's record and selected entries; one weight at a time is copied."""
    tensors, entries = [], []
    weights = zip(
        adapter.record.tensors, pool.weights, deltas, _pretrained(pool, model_state), strict=True
    )
    for known, weight, delta, own in weights:
        saved = SavedTensor(known.name, known.shape, type_name(own.dtype), digests(own))
        base = weight.foundation(adapter.name) if adapter.name in weight.earlier else own
        at = base.reshape(-1)[delta.indices.to(base.device)].cpu()
        tensors.append(saved)
        columns = base.numel() // base.shape[0] if base.ndim > 1 else 0
        entries.append(Entries(base.numel(), delta.indices, delta.change, at, columns))
    return tuple(tensors), entries


def _warn_of_lost_bits(adapter_name: str, tensors: list[Entries]) -> None:
    """Say where float64 changes, which a file holds in float32, lead to other weights then."""
    lost = sum(
        int((adapt(t.base, t.change) != adapt(t.base, t.change.float())).sum())
        for t in tensors
        if t.change.dtype == torch.float64
    )
    if lost:
        warn(
            f"Adapter `{adapter_name}` was trained with float64 values and is saved with float32 "
            f"ones, so {lost} adapted weights lose their last bits. Make the model float64 before "
            "it gets the adapter, not after: the values are float32 then, and files are exact.",
            OtherBaseWarning,
        )


def unpack_selection(pool: Pool, packed: PackedSelection) -> tuple[Tensor, Tensor]:
    """Return (positions, values) of a packed selection, of the pool's length and type.

    Raises:
        AdapterFileError: If it is damaged, or longer than the pool.
    """
    where = packed.where
    base_at = base_reader(lambda i: pool.weights[i].foundation(pool.adapter_name), where)
    deltas = packed.unpack(pool.sizes, base_at)
    count, size = sum(delta.indices.numel() for delta in deltas), pool.size
    if count > size:
        raise AdapterFileError(
            f"{where}: {count} selected weights, but adapter `{pool.adapter_name}` has room for "
            f"{size}. It was made with another budget: load it under a new name."
        )
    slots = torch.full((size,), -1, dtype=pool.slots.dtype, device="cpu")
    values = torch.zeros(size, dtype=torch.float32, device="cpu")
    if count:
        starts = zip(pool.starts, deltas, strict=False)
        slots[:count] = torch.cat([d.indices + start for start, d in starts]).to(slots.dtype)
        values[:count] = torch.cat([delta.change for delta in deltas])
    return slots, values


def base_reader(weight_of: Callable[[int], Tensor], where: str) -> Callable[[int, Tensor], Tensor]:
    """Return what `unpack` asks for the base: entries of a weight, by ordinal and positions."""

    def base_at(ordinal: int, indices: Tensor) -> Tensor:
        weight = weight_of(ordinal)
        if weight.is_meta:
            raise AdapterFileError(
                f"{where}: values are stored against the base, which is on the meta device. Load "
                "the base's weights first."
            )
        return weight.reshape(-1)[indices.to(weight.device)]

    return base_at


def check_name(name: str, model: nn.Module | None = None) -> None:
    """Check that PEFT can use a name for an adapter.

    PEFT keeps adapters in module dicts, whose keys may be neither paths nor attributes, and finds
    an adapter's tensors by its name between the dots of their paths.

    Args:
        name: The name.
        model: The model that gets the adapter, to compare with the names in its paths.

    Raises:
        SFAError: If it cannot.
    """
    taken = any(hasattr(container, name) for container in (nn.ModuleDict(), nn.ParameterDict()))
    if not name or "." in name or "sfa_" in name or taken:
        raise SFAError(
            f"{name!r} cannot name a task or an adapter: PEFT uses it itself, or it is empty or "
            "has a dot. Choose another word."
        )
    if name in ("weight", "bias") or (model is not None and name in _names_inside(model)):
        raise SFAError(
            f"{name!r} cannot name a task or an adapter: a module or a tensor of the model has "
            "that name, and PEFT would mix up their tensors in files. Choose another word."
        )


def _names_inside(module: nn.Module) -> set[str]:
    """Return the names of all modules and tensors of a model, without those of adapters."""
    if isinstance(module, BaseTunerLayer):
        return _names_inside(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _names_inside(module.original_module)
    names = {*module._parameters, *module._buffers, *module._modules}
    return names.union(*(_names_inside(child) for child in module.children()))
