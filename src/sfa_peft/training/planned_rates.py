# SPDX-License-Identifier: Apache-2.0
"""The learning rates of a run, known before it begins: a copy of its scheduler runs ahead."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..selection.accumulators import num_ranks


def planned_rates(scheduler: Any, total_steps: int, values: Tensor) -> list[float] | None:
    """Return the learning rate of each update step of a run.

    Args:
        scheduler: One of torch's, which is stepped once after each update step and left as it is,
            or Accelerate's around it; None where there is none.
        total_steps: T, update steps of the run.
        values: The parameter whose rate is asked for.

    Returns:
        T numbers, or None where they cannot be known in advance (`ReduceLROnPlateau`).
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, LRScheduler) or isinstance(inner, ReduceLROnPlateau):
        return None
    # Accelerate's makes a step for each process, unless these share out each batch.
    strides = 1 if getattr(scheduler, "split_batches", True) else num_ranks()
    groups = inner.optimizer.param_groups
    own = next((i for i, g in enumerate(groups) if any(p is values for p in g["params"])), 0)
    rates = []
    try:
        twin = _twin(inner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an optimizer that makes no steps
            for _ in range(total_steps):
                rates.append(float(twin.optimizer.param_groups[own]["lr"]))
                for _ in range(strides):
                    twin.step()
    except Exception:  # a scheduler of the user's may do anything, and a run does not hang on this
        return None
    return rates


def _twin(scheduler: LRScheduler) -> LRScheduler:
    """Return a copy of a scheduler with an optimizer that has its groups and no parameters."""
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        | {"params": [nn.Parameter(torch.zeros(()))]}
        for group in scheduler.optimizer.param_groups
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    return copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})
