# SPDX-License-Identifier: Apache-2.0
"""`parameter_groups`: learning rates and decay by part and layer, for an optimizer.

A pool is one parameter with entries of all layers, so rules that go by names, shapes or layers
cannot place it. Its group has the rate of its uppermost layer, and beside it the ratios of all of
its weights, by which `sparse.optimizer` scales each step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ..backbones import describe_model, find_backbone, layer_positions
from ..errors import ConfigError
from ..sparse.optimizer import LR_RATIOS
from ..sparse.pool import Pool
from .layer import SFALayer

#: What may be spared weight decay.
_KINDS = ("norms", "biases", "embeddings")
_EMBEDDING_NAME = re.compile("embed|token")


class _Found(NamedTuple):
    """A trained parameter.

    Attributes:
        parameter: The parameter.
        part: The argument of `parameter_groups` with its rate.
        below: How many layers it is below the top; of a pool, each of its weights.
        kinds: What it is of `_KINDS`; the bias of a norm is two of them.
        pool: Where it is a pool's values, the pool.
    """

    parameter: nn.Parameter
    part: str
    below: list[int]
    kinds: frozenset[str] = frozenset()
    pool: Pool | None = None


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    head_lr: float | None = None,
    external_lr: float | None = None,
    internal_lr: float | None = None,
    new_layers: Iterable[nn.Parameter] = (),
    no_decay: Collection[str] = _KINDS,
) -> list[dict[str, Any]]:
    """Return the groups of all trained parameters, for any optimizer of torch.

    As in `torch.optim.AdamW(parameter_groups(model, 1e-3, weight_decay=0.05, layer_decay=0.9))`.
    Each selected weight trains at the rate of its own layer and decays, whatever the name and shape
    of the parameter that they lie in. Works for any other PEFT method and full fine-tuning, too.

    Args:
        model: A model, wrapped or not; what requires a gradient is trained.
        lr: Learning rate of what is trained in the backbone.
        weight_decay: Weight decay.
        layer_decay: Factor of the rates from each layer of the backbone to the one below, (0, 1]:
            the last block's are multiplied by it, those of the block before by its square. Patch
            merging between two stages counts as a layer.
        head_lr: Rate of what lies outside the backbone (where that is not known: of
            `modules_to_save`); None for `lr`.
        external_lr: Rate of external adapters and of `new_layers`; None for `lr`.
        internal_lr: Rate of selected weights; None for `lr` times `SFAConfig.internal_lr_ratio`.
        new_layers: Parameters in the backbone that are as new as external adapters: those of LoRA
            or of your own layers.
        no_decay: What has no weight decay, of "norms" (scales of layers included), "biases" and
            "embeddings". Selected weights decay whatever tensor they are in.

    Returns:
        One group for each rate and decay, those with the highest rate first, and one for the
        selected weights of each adapter. The same call on the same model gives the same groups, as
        resuming from a checkpoint needs it.

    Raises:
        ConfigError: If a number is out of range, or a rate is given twice or has nothing to act on.
    """
    given = {"lr": lr, "head_lr": head_lr, "external_lr": external_lr, "internal_lr": internal_lr}
    _check(given | {"weight_decay": weight_decay}, layer_decay, no_decay)
    rates = {part: lr if rate is None else rate for part, rate in given.items()}
    positions = layer_positions(model)
    found = list(_trained(model, positions, {id(p) for p in new_layers}))
    _check_found(model, positions, found, layer_decay, head_lr)
    factor = 1.0 if layer_decay is None else layer_decay
    groups: dict[Any, dict[str, Any]] = {}
    for parameter, part, below, kinds, pool in found:
        rate = rates[part] * factor ** min(below)
        decay = weight_decay if kinds.isdisjoint(no_decay) else 0.0
        empty = {"params": [], "lr": rate, "weight_decay": decay}
        group = groups.setdefault((rate, decay, pool), empty)
        group["params"].append(parameter)
        if pool is not None:
            _refuse_two_rates(pool, internal_lr)
            group[LR_RATIOS] = [factor ** (own - min(below)) for own in below]
    return sorted(groups.values(), key=lambda group: (-group["lr"], -group["weight_decay"]))


def _check_found(
    model: nn.Module,
    positions: dict[str, int],
    found: list[_Found],
    layer_decay: float | None,
    head_lr: float | None,
) -> None:
    """Check that what is asked for has something to act on."""
    if layer_decay is not None and len(set(positions.values())) == 1:
        raise ConfigError(
            "parameter_groups: layer_decay is given, but the order of layers is not known. Leave "
            f"it out. The model has: {describe_model(model)}"
        )
    if head_lr is not None and all(f.part != "head_lr" for f in found):
        raise ConfigError(
            "parameter_groups: head_lr is given, but nothing outside the backbone is trained. Name "
            "the head in modules_to_save, or leave head_lr out."
        )


def _trained(model: nn.Module, positions: dict[str, int], new: set[int]) -> Iterator[_Found]:
    """Yield each parameter that requires a gradient, once, in model order."""
    backbone, top, seen = find_backbone(model), max(positions.values()), set()
    below = {id(m): top - positions[path] for path, m in model.named_modules()}
    for path, module in model.named_modules():
        if isinstance(module, SFALayer):
            for name, values in module.sfa_pool.items():
                seen.add(id(values))
                pool = module.adapters[name].pool
                if values.requires_grad and pool is not None:
                    layers = [below[id(weight.owner)] for weight in pool.weights]
                    yield _Found(values, "internal_lr", layers, pool=pool)
        inside = path.split(".")
        if "sfa_down" in inside or "sfa_up" in inside:
            part = "external_lr"
        elif backbone is None and "modules_to_save" in inside:
            part = "head_lr"
        else:
            outside = backbone is not None and not backbone.holds(path)
            part = "head_lr" if outside else "lr"
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                layers = [0] if part == "head_lr" else [below[id(module)]]
                own = "external_lr" if id(parameter) in new else part
                yield _Found(parameter, own, layers, _kinds_of(module, name, parameter))


def _kinds_of(module: nn.Module, name: str, parameter: nn.Parameter) -> frozenset[str]:
    """Return what a parameter is, of `_KINDS`; nothing of them is the matrix of a layer."""
    found = set()
    if "bias" in name:
        found.add("biases")
    if isinstance(module, nn.Embedding) or _EMBEDDING_NAME.search(name):
        found.add("embeddings")
    scales = "scale" in name or (parameter.ndim < 2 and not found)
    if "Norm" in type(module).__name__ or scales:
        found.add("norms")
    return frozenset(found)


def _refuse_two_rates(pool: Pool, internal_lr: float | None) -> None:
    if internal_lr is not None and pool.lr_ratio != 1:
        raise ConfigError(
            f"parameter_groups: internal_lr={internal_lr}, but SFAConfig.internal_lr_ratio="
            f"{pool.lr_ratio} sets the rate of selected weights too. Leave internal_lr out."
        )


def _check(
    numbers: dict[str, float | None], layer_decay: float | None, no_decay: Collection[str]
) -> None:
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ConfigError(
                f"parameter_groups: {name}: expected a finite number of 0 or more, got {number!r}"
            )
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ConfigError(
            f"parameter_groups: layer_decay: expected a factor in (0, 1], got {layer_decay!r}. "
            "None is for one rate in all layers."
        )
    if isinstance(no_decay, str) or not set(no_decay) <= set(_KINDS):
        raise ConfigError(
            f"parameter_groups: no_decay: expected some of {list(_KINDS)}, got {no_decay!r}"
        )
