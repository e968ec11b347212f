# SPDX-License-Identifier: Apache-2.0
"""How the weights of a layer are stored: quantised, offloaded, cut over processes, or plain."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import SelectionError, TargetError
from ..sparse.pool import Pool
from ..sparse.weight import Weight

#: Bytes of the smallest type in which a change of a single weight means something (16 bits).
_SMALLEST = 2


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor stores codes (int8, packed 4-bit, 8-bit floats) instead of weights.

    Some quantisers hide the codes in a tensor that calls itself float32; its parts tell.
    """
    if is_traceable_wrapper_subclass(tensor):
        names = tensor.__tensor_flatten__()[0]
        parts = [getattr(tensor, name, None) for name in names]
        return any(is_packed(part) for part in parts if isinstance(part, Tensor))
    return not tensor.is_floating_point() or tensor.element_size() < _SMALLEST


def stored(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a layer, its weight first."""
    own = layer._parameters | layer._buffers
    weight = own.pop("weight", None)
    found = chain([weight], own.values(), layer.parameters(), layer.buffers())
    return (tensor for tensor in found if tensor is not None)


def feature_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer or 2-D convolution; None for other modules.

    Quantised linear layers need not be `nn.Linear`; that they say their sizes is enough.
    """
    kind = "channels" if isinstance(layer, nn.Conv2d) else "features"
    sizes = getattr(layer, f"in_{kind}", None), getattr(layer, f"out_{kind}", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # pyright: ignore


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is a layer norm over features, behind which an external adapter may stand."""
    is_over_features = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1
    return is_over_features and layer._parameters.get("weight") is not None


def holds_codes(layer: nn.Module) -> bool:
    """Whether a linear layer has a packed weight, or none of that name."""
    if feature_sizes(layer) is None or isinstance(layer, nn.Conv2d):
        return False
    weight = getattr(layer, "weight", None)
    return not isinstance(weight, Tensor) or is_packed(weight)


def own_sizes(layer: nn.Module) -> Iterator[tuple[Tensor | nn.Module, int]]:
    """Yield what of a layer counts as parameters, and how many weights each stands for.

    A packed weight counts with its logical size, not with that of its codes; the layer stands for
    it, since it may be kept in several tensors.
    """
    sizes = feature_sizes(layer)
    if sizes is not None and holds_codes(layer):
        yield layer, sizes[0] * sizes[1]
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            yield bias, bias.numel()
        return
    for tensor in layer._parameters.values():
        if tensor is not None:
            yield tensor, tensor.numel()


@contextmanager
def fit_for_changes(values: nn.ParameterDict, weights: Mapping[str, Weight]) -> Iterator[None]:
    """Keep what `model.to` must not take from values and adapted weights while it converts them.

    Values keep float32 where the model is made 16-bit: they are added to weights in float32, and
    steps on them would be lost in fewer bits. Weights keep C order (under channels_last), in which
    positions in them count.

    Args:
        values: Those of the layer's adapters.
        weights: Those of the layer that carry changes.
    """
    before = {name: own.data for name, own in values.items()}
    yield
    for name, was in before.items():
        now = values[name]
        if now.dtype.itemsize < torch.float32.itemsize <= was.dtype.itemsize:
            now.data = was.to(now.device, torch.float32)
    for weight in weights.values():
        if not weight.tensor.is_contiguous():
            weight.tensor.data = weight.tensor.data.contiguous()


def refuse_offloaded(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weights accelerate keeps elsewhere (CPU, disk) between forwards.

    Such a layer has its weights while it computes, as new tensors each time. What is written into
    them is thrown away, and at any other time there is nothing to write into.

    Args:
        root: The model, or a module in which the hooks that do it are looked for.
        layers: The layers by path.

    Raises:
        TargetError: Naming the first one.
    """
    away: set[nn.Module] = set()
    for module in root.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            if isinstance(part, AlignDevicesHook) and part.offload:
                away.update(module.modules() if part.place_submodules else [module])
    # PEFT takes the hooks away before it loads, and not all weights come back then.
    mapped = {"cpu", "disk"} & {str(place) for place in getattr(root, "hf_device_map", {}).values()}
    for path, layer in layers.items():
        gone = mapped and any(tensor.is_meta for tensor in layer.parameters(recurse=False))
        if layer in away or gone:
            raise TargetError(
                f"`{path}`: accelerate offloads its weights (cpu_offload, disk_offload, or a "
                "device_map with a part on the CPU or disk): between forwards they are not in the "
                "model, so no adapter can be put on them. Load the model without offloading; or "
                "merge the adapter on such a model (merge_and_unload) and offload that one."
            )


# --- cut over processes: FSDP2 is taken up, the rest refused by name ----------------------------

_REMEDY = (
    "Cut them by FSDP2 (torch.distributed.fsdp.fully_shard, or Accelerate with fsdp_version: 2), "
    "or keep them whole with DistributedDataParallel."
)


def take_shards(model: nn.Module, pools: Iterable[Pool], *, selects: bool = False) -> None:
    """Go over to the shards of a model that `fully_shard` has cut.

    Args:
        model: The model; the modules that call it now count as parts of it.
        pools: Those of its adapters.
        selects: Whether they are to be filled while it trains.

    Raises:
        SelectionError: If something else cuts its weights, only some of them are cut, or they were
            cut at a wrong time; naming what to do instead.
    """
    pools, modules = list(pools), [*model.modules(), *_callers()]
    weights = [weight for pool in pools for weight in pool.weights]
    is_fsdp2 = any(isinstance(module, FSDPModule) for module in modules)
    kind = None
    if any(_is_fsdp1(module, if_whole=selects) for module in modules):
        kind = "sharded by FullyShardedDataParallel (FSDP1)"
    elif any(hasattr(weight.tensor, "ds_id") for weight in weights):
        kind = "sharded by DeepSpeed ZeRO-3"
    elif any(map(_is_tensor_parallel, modules)) or (
        not is_fsdp2 and any(isinstance(weight.tensor, DTensor) for weight in weights)
    ):
        kind = "cut by tensor parallelism"
    if kind is not None:
        raise SelectionError(f"The model's weights are {kind}, under which SFA fails. {_REMEDY}")
    for pool in pools if is_fsdp2 else ():
        pool.find_shards()
        _check_shards(pool)


def refuse_cut(layers: Mapping[str, nn.Module]) -> None:
    """Refuse to add an adapter to layers that are cut already (TargetError).

    What it trains would be whole on every rank, each with a gradient of its own.

    Args:
        layers: Those that it changes, by path.
    """
    for path, layer in layers.items():
        if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            raise TargetError(
                f"`{path}` is cut over processes already. Add or load adapters first, and cut the "
                "model then: model = PeftModel.from_pretrained(...); fully_shard(model)."
            )


def cut_alike(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors to load cut over ranks as the parameters are that they are for."""
    found, parameters = dict(state), dict(model.named_parameters())
    for key, tensor in state.items():
        there = parameters.get(key)
        if isinstance(there, DTensor) and not isinstance(tensor, DTensor):
            mesh, placements = there.device_mesh, there.placements
            found[key] = distribute_tensor(tensor.to(there.device), mesh, placements)
    return found


def _check_shards(pool: Pool) -> None:
    alone = next((w for w in pool.weights if isinstance(_layer(w), FSDPModule)), None)
    if alone is not None:
        raise SelectionError(
            f"`{alone.owner.name}`: fully_shard has cut the adapted layer by itself, so that its "
            "weight is whole too late. Call it for blocks: modules that contain adapted layers "
            "(Accelerate: TRANSFORMER_BASED_WRAP)."
        )
    cut = {name: w.shard for name, w in zip(pool.names, pool.weights, strict=True)}
    cut["the pool of its values"] = pool.shard
    whole = next((name for name, shard in cut.items() if shard is None), None)
    if whole is not None:
        raise SelectionError(
            f"Adapter `{pool.adapter_name}`: `{whole}` is not cut, but the model is by fully_shard "
            "(FSDP2). Cut the whole model, fully_shard(model) after its blocks, after the adapter "
            "was added; then call model.train() or make the SFASelector, and then the first "
            "forward."
        )
    if any(weight.earlier for weight in pool.weights):
        raise SelectionError(
            f"Adapter `{pool.adapter_name}` continues from another (continue_from), which FSDP2 "
            "cannot train. Merge the earlier one first, or train with DistributedDataParallel."
        )
    if getattr(pool.driver, "is_cut", True) is False:
        raise SelectionError(
            f"The SFASelector of adapter `{pool.adapter_name}` was made before fully_shard, so its "
            "scores are of whole weights. Make it after fully_shard."
        )


def _layer(weight: Weight) -> Any:
    return getattr(weight.owner, "base_layer", None)


def _is_fsdp1(module: Any, *, if_whole: bool) -> bool:
    """Whether a module is FSDP1's, and cuts weights unless those count that leave them whole."""
    if type(module).__name__ != "FullyShardedDataParallel":
        return False
    return if_whole or module.sharding_strategy.name != "NO_SHARD"  # as with a single process


def _is_tensor_parallel(module: Any) -> bool:
    """Whether transformers cut a model (`tp_plan`), which may leave plain tensors behind."""
    size = getattr(module, "_tp_size", None)
    return isinstance(size, int) and size > 1


def _callers() -> Iterator[nn.Module]:
    """Yield the modules whose forward is running: those around the model among them."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":  # to look into others would keep what they hold
            yield frame.f_locals["self"]
        frame = frame.f_back


def move(containers: Iterable[Any], adapter_name: str, device: torch.device) -> None:
    """Move what containers hold for an adapter to a device, where it and the device are real."""
    for container in containers:
        if adapter_name in container:
            item = container[adapter_name]
            tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
            if device.type != "meta" and not any(t.is_meta for t in tensors):
                container[adapter_name] = item.to(device)


def refuse_infinite(
    adapter_name: str, projections: Iterable[nn.Module], changes: Iterable[Tensor]
) -> None:
    """Refuse to merge an adapter of a layer with numbers that are not finite (ValueError)."""
    parameters = chain.from_iterable(module.parameters() for module in projections)
    if not all(bool(torch.isfinite(t).all()) for t in chain(parameters, changes)):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
        )
