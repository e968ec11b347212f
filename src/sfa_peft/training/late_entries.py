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
from torch import nn
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
        mean, root = state["exp_avg"][first:last], state["exp_avg_sq"][first:last].sqrt()
        with torch.no_grad():
            part = values[first:last]
            for count, sign in ((shared, 1), (age, -1)):  # take one update back, make the other
                divisor = (root / math.sqrt(1 - betas[1] ** count)).add_(eps)
                part.addcdiv_(mean, divisor, value=sign * rate / (1 - betas[0] ** count))


def torch_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
