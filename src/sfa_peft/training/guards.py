# SPDX-License-Identifier: Apache-2.0
"""Set-ups in which training would go wrong without a word: found at the start and refused."""

from __future__ import annotations

from torch import nn

from ..errors import SelectionError
from ..sparse.pool import Pool


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant gradient checkpointing, under which adapters get no gradient.

    Raises:
        SelectionError: If a module of the model (as transformers sets them up) uses it.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        keywords = getattr(function, "keywords", None)
        if not getattr(module, "gradient_checkpointing", False) or keywords is None:
            continue
        if keywords.get("use_reentrant", True):
            raise SelectionError(
                f"`{name}`: gradient checkpointing is of the reentrant kind, under which selected "
                "weights and adapters get no gradient. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, in TrainingArguments or '
                "in model.gradient_checkpointing_enable()."
            )


def refuse_sharded(model: nn.Module, pool: Pool) -> None:
    """Refuse models whose weights are cut over ranks.

    Raises:
        SelectionError: Under FSDP (1 and 2) and DeepSpeed ZeRO-3.
    """
    from torch.distributed.tensor import DTensor

    kind = None
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        kind = "FullyShardedDataParallel"
    for ordinal in range(len(pool.weights)):
        weight = pool.weights[ordinal].tensor
        if isinstance(weight, DTensor):
            kind = "fully_shard (FSDP2)"
        elif hasattr(weight, "ds_id"):
            kind = "DeepSpeed ZeRO-3"
    if kind is not None:
        raise SelectionError(
            f"The model's weights are sharded by {kind}. Selected entries are changed in whole "
            "weights, so train with DistributedDataParallel (or DeepSpeed ZeRO-1 or 2)."
        )
