# SPDX-License-Identifier: Apache-2.0
r"""Adam's bias correction for weights that joined late.

The optimizer keeps one step count t for the whole pool. An entry that joined at step j has moments
of age :math:`a = t - j` only, and the shared correction makes its first update 3.2 times too large.
Right after a step the update just taken is exchanged for the one with the entry's own age:

.. math:: \mathrm{lr} \cdot \frac{m / (1 - \beta_1^a)}{\sqrt{v / (1 - \beta_2^a)} + \epsilon}
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

#: Below this the two corrections agree to fp32 precision.
_NEGLIGIBLE = 1e-9


def supports_late_entries(optimizer: Optimizer) -> bool:
    """Whether the optimizer is an Adam whose step can be exchanged (no amsgrad, no maximize)."""
    plain = not any(g.get("amsgrad") or g.get("maximize") for g in optimizer.param_groups)
    return isinstance(optimizer, (Adam, AdamW)) and plain


def correct_late_entries(
    optimizer: Optimizer, values: nn.Parameter, joined: Iterable[tuple[int, int, int]], step: int
) -> None:
    """Exchange the update just taken by late entries for the one with their own age.

    Call it after `optimizer.step()` and before the learning rate changes.

    Args:
        optimizer: A torch Adam or AdamW.
        values: The pool of values, a parameter of the optimizer.
        joined: (first slot, last slot + 1, update step after which they joined).
        step: Update step that was just taken, counted from 1.
    """
    group = next((g for g in optimizer.param_groups if any(p is values for p in g["params"])), None)
    state = optimizer.state.get(values)
    if group is None or not state:
        return
    rate, betas, eps = float(group["lr"]), group["betas"], group["eps"]
    shared = float(state["step"])
    for first, last, since in joined:
        age = step - since
        if age < 1 or max(betas) ** age < _NEGLIGIBLE:
            continue
        mean, square = state["exp_avg"][first:last], state["exp_avg_sq"][first:last]
        taken = _update(mean, square, rate, betas, eps, shared)
        own = _update(mean, square, rate, betas, eps, age)
        with torch.no_grad():
            values[first:last] += taken - own


def _update(
    mean: Tensor, square: Tensor, rate: float, betas: tuple[float, float], eps: float, step: float
) -> Tensor:
    """Return Adam's update (to be subtracted) with bias corrections for `step` steps."""
    root = (square.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(eps)
    return mean / root * (rate / (1 - betas[0] ** step))


def torch_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
