# SPDX-License-Identifier: Apache-2.0
"""`SFALayer`: a layer with the sparse change of its parameters and its external adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import EmptySelectionWarning, SFAError, UnfinishedSelectionWarning, warn
from ..files.record import Resolved
from ..selection.pick import is_unfinished
from ..sparse.gradient import LiveWeight, Tap
from ..sparse.pool import Pool
from ..sparse.weight import CompiledPass, LiveEntries, eager
from .external import apply_bottleneck, make_projections
from .switching import Switching

#: Training forwards with an unfinished selection after which a missing selector is reported.
_PATIENCE = 3


class SFALayer(Switching):
    """A layer whose selected weights and external adapter train while the rest stays frozen.

    Args:
        base_layer: An `nn.Linear` or `nn.Conv2d`, or any module without children whose parameters
            are changed by name.
        name: Path inside the model.
        role: Role of the layer in a transformer block, None if unknown.
        block: Ordinal of the block, None if unknown.
        stage: Hierarchical stage, None if unknown.
    """

    adapter_layer_names = ("sfa_pool", "sfa_down", "sfa_up")
    other_param_names = ("sfa_slots", "sfa_packed")

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        name: str,
        role: str | None = None,
        block: int | None = None,
        stage: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.role, self.block, self.stage = name, role, block, stage
        self.sfa_pool = nn.ParameterDict()
        self.sfa_slots = BufferDict(persistent=True)
        self.sfa_packed = BufferDict(persistent=True)  # until they are unpacked
        self.sfa_down = nn.ModuleDict()
        self.sfa_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.entries: dict[str, LiveEntries] = {}  # by name of the base layer's parameter
        self.prepared_for: CompiledPass | None = None  # whose forward may use what was prepared
        self.saved_names: dict[str, str] = {}  # by adapter: path in its file, where it is another
        self.resolved: dict[str, Resolved] = {}  # by adapter: what its budget was solved to
        kind = "channels" if isinstance(base_layer, nn.Conv2d) else "features"
        self.in_features = getattr(base_layer, f"in_{kind}", None)
        self.out_features = getattr(base_layer, f"out_{kind}", None)

    # --- building ------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: SFAConfig,
        *,
        path: str,
        pool: Pool | None,
        pool_size: int,
        packed_size: int | None = None,
        parameters: Sequence[str],
        width: int,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: The adapter.
            config: Its configuration.
            path: The layer's path in the model the adapter belongs to; task models that share a
                backbone may hold it under different names.
            pool: The adapter's pool, None where it changes no pretrained weight of the model.
            pool_size: Length of the pool; the first layer with a parameter to change holds it.
            packed_size: Bytes of a saved selection that is about to be loaded there, or None.
            parameters: Names of this layer's parameters whose entries may be selected.
            width: Width of the external adapter, 0 for none.
        """
        weight = self.base_weight
        for parameter in parameters:
            if pool is None:
                break
            ordinal = pool.add_tensor(self, parameter, f"{path}.{parameter}")
            entries = self.entries.setdefault(parameter, LiveEntries())
            entries.pools[adapter_name] = (pool, ordinal)
            if ordinal == 0:
                device, dtype = weight.device, weight.dtype  # PEFT casts to fp32 later
                self.sfa_pool[adapter_name] = nn.Parameter(
                    torch.zeros(pool_size, device=device, dtype=dtype)
                )
                self.sfa_slots[adapter_name] = torch.full(
                    (pool_size,), -1, dtype=pool.slots_dtype, device=device
                )
                if packed_size is not None:
                    self.sfa_packed[adapter_name] = torch.zeros(
                        packed_size, dtype=torch.uint8, device=device
                    )
        if width:
            down, up = make_projections(
                self.get_base_layer(), width, bias=config.external_bias, neutral=config.init_weights
            )
            self.sfa_down[adapter_name], self.sfa_up[adapter_name] = down, up
        self.mark_active(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base's dtype, which loses bits of a loaded fp32 adapter.
        target = device or self.base_weight.device
        containers: list[Any] = [
            self.sfa_pool,
            self.sfa_slots,
            self.sfa_packed,
            self.sfa_down,
            self.sfa_up,
        ]
        for container in containers:
            if adapter_name in container:
                item = container[adapter_name]
                tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
                if target.type != "meta" and not any(t.is_meta for t in tensors):
                    container[adapter_name] = item.to(target)

    # --- forward -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with selected weights and external adapters in effect."""
        if self.sfa_packed:
            self._finish_loading()
        if self.disable_adapters:
            return self._pretrained_forward(*args, **kwargs)
        names = self._effective_adapters()
        if not self._is_prepared():
            self.refresh(names)
        out = self._base_forward(*args, **kwargs)
        for name in names:
            if name in self.sfa_down:
                out = apply_bottleneck(out, self.sfa_down[name], self.sfa_up[name])
        return out

    @eager
    def _finish_loading(self) -> None:
        """Unpack what a loader left; where nothing was loaded, wait no longer."""
        for name in list(self.sfa_packed):
            pool = self.find_pool(name)
            if pool is not None and pool.slots is not None:
                pool.drop_packed()

    def _pretrained_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            self.unmerge()
        if self.in_graph:
            # A forward whose backward may still come used the weight as it is: leave it alone.
            originals = {n: e.original(self.parameter(n)) for n, e in self.entries.items()}
            return torch.func.functional_call(self.base_layer, originals, args, kwargs)
        self.withdraw()
        return self.base_layer(*args, **kwargs)

    def _base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled() or self.merged:
            return self.base_layer(*args, **kwargs)
        watched = {}
        for parameter, entries in self.entries.items():
            if self._is_prepared():
                taps, slices = entries.prepared
            else:
                taps, slices = self._taps(parameter, entries)
            if taps:
                watched[parameter] = LiveWeight.apply(self.parameter(parameter), taps, *slices)
        if not watched:
            return self.base_layer(*args, **kwargs)
        # By name and not F.linear: any layer type and the hooks on it keep working.
        return torch.func.functional_call(self.base_layer, watched, args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise SFAError(
            "nn.DataParallel (which the Trainer takes by itself where it sees several GPUs) copies "
            "the model to each GPU before each forward, and the copies would share one adapter's "
            "state. Start one process per GPU: torchrun --nproc_per_node N script.py; or show it "
            "one GPU: CUDA_VISIBLE_DEVICES=0."
        )

    @eager  # a cut is kept between forwards, so no graph may own it
    def _taps(self, parameter: str, entries: LiveEntries) -> tuple[list[Tap], list[Tensor]]:
        for name in entries.live:
            self._watch(*entries.pools[name])
        return entries.taps(self.parameter(parameter))

    def _is_prepared(self) -> bool:
        """Whether this is a compiled forward that may use what `prepare` found."""
        prepared_for = self.prepared_for
        return torch.compiler.is_compiling() and prepared_for is not None and prepared_for.is_open

    def prepare(self, compiled_pass: CompiledPass) -> None:
        """Do outside a compiled graph what its forward cannot: write weights, look up taps."""
        usable = not (self.merged or self.disable_adapters)
        self.prepared_for = compiled_pass if usable else None
        if usable:
            self.refresh(self._effective_adapters())
            tapped = torch.is_grad_enabled()
            for parameter, entries in self.entries.items():
                entries.prepared = self._taps(parameter, entries) if tapped else ([], [])

    def _watch(self, pool: Pool, ordinal: int) -> None:
        """Report once that a selection is being trained which nobody makes."""
        if ordinal or not (pool.needs_selector and self.training and pool.values.requires_grad):
            return
        if pool.idle_forwards < _PATIENCE and pool.rules and is_unfinished(pool, pool.rules):
            pool.idle_forwards += 1
            if pool.idle_forwards == _PATIENCE:
                selected = pool.num_assigned
                lacking = (
                    f"beyond the {selected} of {pool.size} that an unfinished run selected"
                    if selected
                    else "so only the external adapters and the head learn"
                )
                warn(
                    f"Adapter `{pool.adapter_name}`: training goes on but nothing selects weights, "
                    f"{lacking}. Pass "
                    "callbacks=[SFACallback()] to the Trainer, or call SFASelector.step() after "
                    "each optimizer.step() in an own loop.",
                    UnfinishedSelectionWarning if selected else EmptySelectionWarning,
                )

    def extra_repr(self) -> str:
        """Name the role, and per adapter the selected weights and the external adapter's width."""
        parts = [f"role={self.role}"]
        for parameter, entries in self.entries.items():
            numel = self.parameter(parameter).numel()
            for name, (pool, ordinal) in entries.pools.items():
                parts.append(f"{name}: {pool.count(ordinal)} of {numel} in {parameter} selected")
        for name, down in self.sfa_down.items():
            parts.append(f"{name}: width {down.weight.shape[0]}")  # pyright: ignore
        return ", ".join(parts)


def adapter_layers(model: nn.Module, adapter_name: str) -> list[SFALayer]:
    """Return the layers that an adapter changes, in model order."""
    layers = (m for m in model.modules() if isinstance(m, SFALayer))
    return [layer for layer in layers if layer.has_adapter(adapter_name)]


def find_pool(model: nn.Module, adapter_name: str) -> Pool | None:
    """Return the pool of an adapter in a model, None where it has none."""
    pools = (layer.find_pool(adapter_name) for layer in adapter_layers(model, adapter_name))
    return next((pool for pool in pools if pool is not None), None)


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
