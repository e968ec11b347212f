# SPDX-License-Identifier: Apache-2.0
r"""What happens around an optimizer's step, in any loop, by torch's own optimizer hooks.

Before it: the values are kept where the step is changed afterwards. After it: the step is scaled by
the values' own learning rates, decay that is meant for the weights is applied, and weights whose
values changed go back to the pretrained entries until the next forward. Hooks see every step:
fused optimizers write values without telling autograd.

And Adam's bias correction for weights that joined late. The optimizer keeps one step count t for
the whole pool. An entry that joined at step j has moments of age :math:`a = t - j` only, and the
shared correction makes its first update 3.2 times too large. Right after a step the update just
taken is exchanged for the one with the entry's own age:

.. math:: \mathrm{lr} \cdot \frac{m / (1 - \beta_1^a)}{\sqrt{v / (1 - \beta_2^a)} + \epsilon}
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import ConfigError, OptimizerWarning, ParameterGroupWarning, SFAError, warn
from .pool import Pool, every_pool
from .shards import local

#: Below this the two corrections agree to fp32 precision.
_NEGLIGIBLE = 1e-9
#: How far another optimizer's step may be from Adam's to be taken for one, relative to its size.
_TOLERANCE = 1e-3

#: Key in the group of a pool's values: each weight's learning rate over that of the group.
LR_RATIOS = "sfa_lr_ratios"
#: An optimizer with more rates than there are kinds of parameters (head, backbone, external
#: adapters, selected weights) has them by layer.
_KINDS = 4

Ranges = Sequence[tuple[int, int, int]]
Ratio = float | Tensor

_installed: list[Any] = []  # one pair of hooks for the process, like torch's own


def install() -> None:
    """Watch the steps of any optimizer that trains a pool's values; safe to call again."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))
        _installed.append(register_optimizer_step_post_hook(_after_step))


def inner_optimizer(optimizer: Any) -> Any:
    """Return who really steps: ZeroRedundancyOptimizer has one for this rank's parameters."""
    return optimizer.optim if _is_divided(optimizer) else optimizer


def _is_divided(optimizer: Any) -> bool:
    return type(optimizer).__name__ == "ZeroRedundancyOptimizer"


def _before_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    if _is_divided(optimizer):
        return  # its inner one comes here too
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
        if pool.keep_before or not _is_one(ratio_by_slot(pool, group)):
            pool.before = pool.held.detach().clone()


def _after_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    if _was_skipped(optimizer):
        return
    for pool in every_pool():
        group = pool.group_of(optimizer)
        if group is None:
            continue
        if _is_divided(optimizer):  # the owner's inner one came here before values were sent
            if not pool.is_trained_by(optimizer.optim):
                pool.optimizer_steps += 1
                pool.withdraw()
            pool.optimizer = weakref.ref(optimizer)
            continue
        ratio = ratio_by_slot(pool, group)
        with torch.no_grad():
            if pool.before is not None and not _is_one(ratio):
                _scale_step(pool.held.detach(), pool.before, ratio)
            if not pool.keep_before:
                pool.before = None
            if pool.decay_weight and group.get("weight_decay") and is_decoupled(optimizer, group):
                decay = pool.originals().mul_(ratio).mul_(group["weight_decay"])
                decay.mul_(group["lr"])  # no number where it is a tensor
                pool.held.detach().sub_(decay)
        if pool.optimizer_steps == 0:
            _warn_of_group(pool, group, optimizer.param_groups)
        pool.optimizer_steps += 1
        pool.optimizer = weakref.ref(optimizer)
        pool.end_step()


def ratios_by_weight(pool: Pool, group: dict[str, Any]) -> list[float]:
    """Return each weight's learning rate over that of the optimizer's group with the values.

    Raises:
        SFAError: If the group was made for another pool.
    """
    given = group.get(LR_RATIOS)
    if given is None:
        return [pool.lr_ratio] * len(pool.weights)
    if len(given) != len(pool.weights):
        raise SFAError(
            f"The optimizer has learning rates for {len(given)} weights, but adapter "
            f"`{pool.adapter_name}` selects from {len(pool.weights)}. Make its groups anew: "
            "sfa_peft.parameter_groups(model, lr=...)."
        )
    return [pool.lr_ratio * ratio for ratio in given]


def ratio_by_slot(pool: Pool, group: dict[str, Any]) -> Ratio:
    """Return the same for each value: one number, or (size,) where weights have their own."""
    ratios = ratios_by_weight(pool, group)
    return ratios[0] if len(set(ratios)) == 1 else pool.spread(ratios)


def _is_one(ratio: Ratio) -> bool:
    return not isinstance(ratio, Tensor) and ratio == 1


def _scale_step(values: Tensor, before: Tensor, ratio: Ratio) -> None:
    """Scale the step that values took; exact where the ratio is 1."""
    after = values.detach()
    if isinstance(ratio, Tensor):
        before, after = before.to(ratio), after.to(ratio)
    values.copy_(torch.lerp(before, after, ratio))


def _warn_of_group(pool: Pool, group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Say when a rule that goes by names or shapes seems to have mistaken the values."""
    if LR_RATIOS in group:
        return
    decay = max(float(g.get("weight_decay") or 0) for g in groups)
    if decay and not group.get("weight_decay"):
        warn(
            f"Adapter `{pool.adapter_name}`: its selected weights do not decay, other parameters "
            f"of the optimizer do (weight_decay={decay}). A rule by names or shapes takes them "
            "for a norm or a bias. Make the optimizer's groups with "
            "sfa_peft.parameter_groups(model, lr=..., weight_decay=...); if it is meant, ignore "
            "this ParameterGroupWarning.",
            ParameterGroupWarning,
        )
    rates = {float(g["lr"]) * g.get("lr_scale", 1) for g in groups if "lr" in g}
    if len(pool.weights) > 1 and len(rates) > _KINDS:
        warn(
            f"Adapter `{pool.adapter_name}`: the optimizer has {len(rates)} learning rates, and "
            "all selected weights train at one of them: for a rule by layers' names they are one "
            "parameter, of the first layer. Make the groups with sfa_peft.parameter_groups(model, "
            "lr=..., layer_decay=...), which reaches each weight; if it is meant, ignore this "
            "ParameterGroupWarning.",
            ParameterGroupWarning,
        )


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
        grad = local(change.grad)
        grad.add_(weight.to(grad) * scale, alpha=sign * group["weight_decay"])


def check_unseen_step(pool: Pool) -> None:
    """Check that a step of the values which no hook saw has left nothing undone.

    Raises:
        SFAError: If the values have another learning rate than their optimizer, or decay towards
            another point.
    """
    if pool.lr_ratio != 1 or pool.decay_weight:
        option = "weight_decay_on='weight'" if pool.decay_weight else "internal_lr_ratio"
        raise SFAError(
            f"Adapter `{pool.adapter_name}`: SFAConfig.{option} needs torch's optimizer hooks, but "
            "the values were stepped by what they do not see: an optimizer on copies of the "
            "parameters (DeepSpeed ZeRO, Apex, Megatron) or none of torch's. Leave the option at "
            "its default, or let a torch optimizer step the model's own parameters."
        )


class MicroBatches:
    """How many training forwards may come before a step of the optimizer must have been seen.

    DeepSpeed's ZeRO, Apex and Megatron step copies of the values and write them through `.data`,
    which neither hooks nor version counters tell. So a forward is trusted only if as many came
    between two steps that were seen.
    """

    def __init__(self) -> None:
        self._steps = self._since = self._most = 0

    def expect(self, steps: int) -> bool:
        """Count a forward; return whether steps seen so far account for it.

        Args:
            steps: Number of steps that were seen.
        """
        if steps != self._steps:
            self._most = max(self._most, self._since)
            self._steps, self._since = steps, 0
        self._since += 1
        return self._since <= self._most


class LateEntries:
    """Gives the late entries of a pool the bias correction of their own age.

    torch's Adam and AdamW (foreach, fused, amsgrad, maximize) are known. Any other optimizer that
    keeps `step`, `exp_avg` and `exp_avg_sq` is judged by the first step that moves late entries: if
    that was Adam's, it is exchanged too, and so are those after it. Everything else (SGD,
    Adafactor, NAdam, ...) works as it is; where it averages gradients as Adam does, a warning says
    so.

    Args:
        pool: Values whose steps are exchanged.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._verdicts: dict[str, bool] = {_name(Adam): True, _name(AdamW): True}
        pool.keep_before = True  # until the optimizer is known

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run would have to find out anew, a step too late."""
        return {"verdicts": dict(self._verdicts), "watching": self.pool.keep_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._verdicts, self.pool.keep_before = dict(state["verdicts"]), state["watching"]
        self.pool.before = None

    def correct(self, optimizer: Any, joined: Ranges, step: int) -> None:
        """Exchange the update just taken; before the learning rate changes.

        Args:
            optimizer: The optimizer that took it.
            joined: (first slot, last slot + 1, update step after which they joined).
            step: Update step that was just taken, counted from 1.
        """
        ages = [(a, b, step - since) for a, b, since in joined if step > since]
        shard = self.pool.shard
        late = ages if shard is None else shard.ranges(ages)
        optimizer, divided = inner_optimizer(optimizer), optimizer
        group = self.pool.group_of(optimizer)
        if group is not None:
            state = optimizer.state.get(self.pool.values, {})
            if self._is_adam(optimizer, group, state, late):
                largest = max(group["betas"])
                late = [(a, b, age) for a, b, age in late if largest**age >= _NEGLIGIBLE]
                if late:
                    _exchange(self.pool, group, state, late)
        if divided is not optimizer and ages:
            _send_from_owner(divided, self.pool)

    def _is_adam(self, optimizer: Any, group: Any, state: Any, late: Ranges) -> bool:
        kind = _name(type(optimizer))
        if kind not in self._verdicts:
            # Ranks that see another part of the values would judge otherwise.
            judges = self.pool.shard is None
            verdict = _took_adams_step(self.pool, group, state, late) if judges else False
            if verdict is None:
                return False  # nothing moved, so there is nothing to exchange either
            self._verdicts[kind] = verdict
            if not verdict and "exp_avg" in state:  # others have no such correction to make
                warn(
                    f"{type(optimizer).__name__} works as it is: weights that join late get no "
                    "bias correction of their own age. That is known for Adam's formula only.",
                    OptimizerWarning,
                )
        self.pool.keep_before, self.pool.before = False, None
        return self._verdicts[kind]


def _send_from_owner(optimizer: Any, pool: Pool) -> None:
    """Let all ranks have the values of the one that steps them (ZeroRedundancyOptimizer)."""
    group, rank = optimizer.process_group, optimizer._param_to_rank[pool.values]
    if "betas" in (pool.group_of(optimizer) or {}):  # others have no correction to make
        dist.broadcast(pool.values.detach(), dist.get_global_rank(group, rank), group)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _exchange(pool: Pool, group: Any, state: Any, late: Ranges) -> None:
    """Put what Adam would have subtracted at each age in the place of what it did subtract.

    Late entries are the last ones of the pool, so the shared update is taken back from all at once.
    """
    first, last = late[0][0], late[-1][1]
    with torch.no_grad():
        part = pool.held.detach()[first:last]
        ratio = _ratio_of(pool, group, first, last)
        mean = local(state["exp_avg"])[first:last]
        mean = mean if _is_one(ratio) else mean * ratio
        root = _second_moment(group, state)[first:last].sqrt()
        part.add_(_update(group, mean, root, state["step"]))
        for a, b, age in late:
            own = slice(a - first, b - first)
            part[own].sub_(_update(group, mean[own], root[own], age))


def _update(group: Any, mean: Tensor, root: Tensor, count: float | Tensor) -> Tensor:
    """Return what Adam subtracts if its step count is `count`.

    A fused optimizer counts on its device: to read the number would be to wait for it.

    Args:
        group: Of the optimizer.
        mean: First moments.
        root: Square roots of the second moments.
        count: The step count, a number or a tensor of one.
    """
    beta1, beta2 = group["betas"]
    if isinstance(count, Tensor):
        count = float(count) if count.is_cpu else count.to(_exact_type(count.device))
    divisor = root.div((1 - beta2**count) ** 0.5).add_(group["eps"])
    return torch.div(mean, divisor, out=divisor).mul_(group["lr"] / (1 - beta1**count))


def _exact_type(device: torch.device) -> torch.dtype:
    """Return the widest float of a device, for 1 - beta**count."""
    return torch.float32 if device.type == "mps" else torch.float64


def _ratio_of(pool: Pool, group: Any, first: int, last: int) -> Ratio:
    ratio = ratio_by_slot(pool, group)
    return ratio[first:last] if isinstance(ratio, Tensor) else ratio


def _second_moment(group: Any, state: Any) -> Tensor:
    return local(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])


def _took_adams_step(pool: Pool, group: Any, state: Any, late: Ranges) -> bool | None:
    """Whether the step just taken was Adam's, with decoupled weight decay or none.

    None where that cannot be seen yet: no late entry has moved.
    """
    wanted = {"step", "exp_avg", "exp_avg_sq"}
    if group.get("amsgrad"):
        wanted.add("max_exp_avg_sq")
    if not wanted <= set(state) or not {"betas", "eps"} <= set(group):
        return False
    before = pool.before
    if not late or before is None:
        return None
    first, last = late[0][0], late[-1][1]
    start, after = before[first:last], pool.held.detach()[first:last]
    ratio = _ratio_of(pool, group, first, last)
    mean, root = state["exp_avg"][first:last], _second_moment(group, state)[first:last].sqrt()
    update = _update(group, mean, root, state["step"]) * ratio
    if not bool(update.any()):
        return None
    slack = _TOLERANCE * update.abs().max() + torch.finfo(start.dtype).eps * start.abs().max()
    for decay in {0.0, float(group.get("weight_decay") or 0.0)}:
        rate = float(group["lr"]) * decay * ratio
        pull = start + pool.originals()[first:last] if pool.decay_weight else start
        if bool((start - rate * pull - update - after).abs().max() <= slack):
            return True
    return False
