# SPDX-License-Identifier: Apache-2.0
"""What happens around an optimizer's step, in any loop, by torch's own optimizer hooks.

Before it: the values are kept where the step is changed afterwards. After it: the step is scaled by
the values' own learning rate, decay that is meant for the weights is applied, and weights whose
values changed go back to the pretrained entries until the next forward. Hooks see every step:
fused optimizers write values without telling autograd.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import ConfigError
from .pool import every_pool

_installed: list[Any] = []  # one pair of hooks for the process, like torch's own


def install() -> None:
    """Watch the steps of any optimizer that trains a pool's values; safe to call again."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))
        _installed.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    for pool in every_pool():
        group = pool.group_of(optimizer)
        if group is None:
            continue
        if pool.decay_weight and group.get("weight_decay"):
            _check_decay(optimizer)
            if not is_decoupled(optimizer, group):
                scale = getattr(optimizer, "grad_scale", None)  # of a fused one, under a scaler
                add_decay(pool.values, pool.originals(), group, 1.0 if scale is None else scale)
        if pool.optimizer_steps == 0 and _called_by_grad_scaler():
            pool.stepped_by_grad_scaler = True
        if pool.lr_ratio != 1 or pool.keep_before:
            pool.before = pool.values.detach().clone()


def _after_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    if _was_skipped(optimizer):
        return
    for pool in every_pool():
        group = pool.group_of(optimizer)
        if group is None:
            continue
        with torch.no_grad():
            if pool.lr_ratio != 1 and pool.before is not None:
                values = pool.values
                values.copy_(torch.lerp(pool.before, values.detach(), pool.lr_ratio))
            if not pool.keep_before:
                pool.before = None
            if pool.decay_weight and group.get("weight_decay") and is_decoupled(optimizer, group):
                rate = float(group["lr"]) * pool.lr_ratio * group["weight_decay"]
                pool.values.sub_(pool.originals(), alpha=rate)
        pool.optimizer_steps += 1
        pool.withdraw()


def _was_skipped(optimizer: Any) -> bool:
    """Whether a gradient scaler let a fused optimizer run although gradients overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) != 0


def _called_by_grad_scaler() -> bool:
    """Whether a gradient scaler makes the present step (it tells nobody but fused optimizers)."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("grad_scaler.py") and "self" in frame.f_locals:
            return frame.f_locals["self"].is_enabled()
        frame = frame.f_back
    return False


def is_decoupled(optimizer: Any, group: dict[str, Any]) -> bool:
    """Whether decay acts on the parameter itself (AdamW) and not through its gradient."""
    if isinstance(optimizer, AdamW) or type(optimizer).__name__ in ("Adafactor", "Muon"):
        return True
    return bool(group.get("decoupled_weight_decay"))


def _check_decay(optimizer: Any) -> None:
    module = type(optimizer).__module__
    if not isinstance(optimizer, AdamW) and not module.startswith("torch.optim"):
        raise ConfigError(
            f"SFAConfig.weight_decay_on='weight': how {type(optimizer).__name__} decays is not "
            "known. Use one of torch.optim's optimizers, weight_decay_on='change', or "
            "weight_decay=0."
        )


def add_decay(change: Tensor, weight: Tensor, group: dict[str, Any], scale: Any = 1.0) -> None:
    """Add to the gradient of a change what coupled decay of the pretrained weight adds to it."""
    if change.grad is not None:
        sign = -1 if group.get("maximize") else 1
        change.grad.add_(weight.to(change.grad) * scale, alpha=sign * group["weight_decay"])
