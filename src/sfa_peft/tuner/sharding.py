# SPDX-License-Identifier: Apache-2.0
"""Models whose weights are cut over processes: FSDP2 is taken up, the rest refused by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import SelectionError, TargetError
from ..sparse.pool import Pool

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
