# SPDX-License-Identifier: Apache-2.0
"""Late entries against an optimizer of its own for every pick, and who gets a correction at all."""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model

from sfa_peft import OptimizerWarning, SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

TOTAL, ROUND = 16, 4


class CloneOfAdam(torch.optim.Optimizer):
    """Adam as a third party might write it: the same state, another class."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def change(self, p, step, group):
        return step

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt()
                step = state["exp_avg"] / (1 - beta1 ** state["step"])
                step = step / (denominator + group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self.change(p, step, group), alpha=group["lr"])


class LikeLamb(CloneOfAdam):
    """The same state, but steps are scaled by a trust ratio."""

    def change(self, p, step, group):
        return step * (p.norm() + 0.1) / step.norm().clamp(min=1e-9)


class AdamOfMine(torch.optim.AdamW):
    """A subclass, which might do anything in its step."""


def build(**options):
    config = SFAConfig(
        budget=0.4,
        rho=0,
        target_modules=["first", "second"],
        selection_steps=ROUND,
        select_until=1,
        **options,
    )
    model = get_peft_model(MLP(), config)
    return model, find_pool(model, "default")


def per_pick_reference(make, gradients, values, joined):
    """Give every pick's entries an optimizer of their own, begun when they joined."""
    expected = torch.zeros_like(values)
    for first, last, since in joined:
        part = torch.nn.Parameter(torch.zeros(last - first))
        optimizer = make([part])
        for step, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] *= 0.95 if step else 1
            if step >= since:
                part.grad = gradient[first:last].clone()
                optimizer.step()
        expected[first:last] = part.detach()
    return expected


def train(make, **options):
    """Train with a decaying rate and shrinking gradients, which amsgrad's maximum remembers.

    Return the pool, the gradients of its values, and the picks.
    """
    model, pool = build(**options)
    selector = SFASelector(model, total_steps=TOTAL)
    optimizer = make([pool.values])
    gradients = []
    for step in range(TOTAL):
        optimizer.param_groups[0]["lr"] *= 0.95 if step else 1
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        (0.7**step * model(x).square().mean()).backward()
        gradients.append(pool.values.grad.clone())
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return pool, gradients, selector._rounds.joined


KINDS = {
    f"{cls.__name__}-{'-'.join(options) or 'plain'}-{decay}": (cls, options, decay)
    for cls in (torch.optim.Adam, torch.optim.AdamW)
    for options in (
        {},
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True},
        {"maximize": True},
        {"amsgrad": True, "fused": True, "maximize": True},
    )
    for decay in (0.0, 0.1)
}


@pytest.mark.parametrize("kind", KINDS)
def test_late_entries_equal_an_adam_of_their_own(kind):
    cls, options, decay = KINDS[kind]

    def make(params):
        return cls(params, lr=1e-2, weight_decay=decay, **options)

    pool, gradients, joined = train(make)
    assert len(joined) == 3
    expected = per_pick_reference(make, gradients, pool.values.detach(), joined)
    torch.testing.assert_close(pool.values.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 3.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [CloneOfAdam, AdamOfMine])
def test_an_adam_of_another_class_is_recognised_and_corrected_from_its_first_late_step(
    cls, decay, ratio
):
    def make(params, scale=1.0):
        return cls(params, lr=1e-2 * scale, weight_decay=decay)

    pool, gradients, joined = train(make, internal_lr_ratio=ratio)  # a warning would fail
    expected = per_pick_reference(lambda p: make(p, ratio), gradients, pool.values.detach(), joined)
    torch.testing.assert_close(pool.values.detach(), expected, rtol=0, atol=1e-6)
    assert pool.before is None  # nothing is kept once the optimizer is known


OTHERS = {
    "LikeLamb": lambda p: LikeLamb(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_optimizer_works_as_it_is_and_is_said_so_once_if_it_corrects_a_bias(name):
    def stock(params):
        return OTHERS[name](params)

    corrects = name in ("LikeLamb", "NAdam", "RAdam", "Adamax")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OptimizerWarning)
        pool, gradients, _ = train(stock)
    assert [str(w.message).partition(":")[0] for w in caught] == [
        f"{name} works as it is"
    ] * corrects
    # What the optimizer makes of the same gradients alone:
    alone = torch.nn.Parameter(torch.zeros_like(pool.values))
    optimizer = stock([alone])
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] *= 0.95 if step else 1
        alone.grad = gradient
        optimizer.step()
    assert pool.values.detach().abs().sum() > 0
    torch.testing.assert_close(pool.values.detach(), alone.detach(), rtol=0, atol=1e-7)
    assert pool.before is None


def test_without_the_correction_adam_is_stock():
    def make(params):
        return torch.optim.AdamW(params, lr=1e-2)

    pool, gradients, _ = train(make, late_bias_correction=False)
    alone = torch.nn.Parameter(torch.zeros_like(pool.values))
    optimizer = make([alone])
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] *= 0.95 if step else 1
        alone.grad = gradient
        optimizer.step()
    assert torch.equal(pool.values.detach(), alone.detach())
    assert pool.before is None


def test_stock_adam_starts_late_entries_with_steps_3_times_too_large():
    # The meta-test, with the figure of the paper's reading: what the correction is there for.
    first_steps = {}
    for corrected in (True, False):
        config = SFAConfig(
            budget=0.2,
            rho=0,
            target_modules=["first"],
            selection_steps=500,
            late_bias_correction=corrected,
        )
        model = get_peft_model(MLP(), config)
        pool = find_pool(model, "default")
        selector = SFASelector(model, total_steps=1000)
        optimizer = torch.optim.AdamW([pool.values], lr=1e-2, weight_decay=0)
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
        for _ in range(501):
            model(x).square().mean().backward()
            optimizer.step()
            selector.step(optimizer)
            optimizer.zero_grad()
        first_steps[corrected] = float(pool.values.detach().abs().mean())
    assert first_steps[True] == pytest.approx(1e-2, rel=1e-3)
    stock = 0.1 / math.sqrt(0.001) * math.sqrt(1 - 0.999**501) / (1 - 0.9**501)
    assert first_steps[False] == pytest.approx(stock * 1e-2, rel=1e-3)


def test_a_verdict_waits_for_a_step_that_moves_something():
    # A learning rate of zero at first: whatever the formula, nothing moves, so nothing is judged.
    model, pool = build()
    selector = SFASelector(model, total_steps=TOTAL)
    optimizer = LikeLamb([pool.values], lr=0.0)
    for step in range(TOTAL):
        optimizer.param_groups[0]["lr"] = 0.0 if step < 6 else 1e-2
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        with pytest.warns(OptimizerWarning) if step == 6 else nullcontext():
            selector.step(optimizer)
        optimizer.zero_grad()
    assert selector._rounds.late_entries._verdicts[f"{__name__}.LikeLamb"] is False


def test_a_pick_into_which_no_row_fits_is_no_late_entry():
    model, pool = build(granularity="row")
    selector = SFASelector(model, total_steps=120)  # picks of 7, rows of 12 and 16
    optimizer = CloneOfAdam([pool.values])
    for step in range(20):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    assert all(a < b for a, b, _ in selector._rounds.joined)
    assert pool.num_assigned > 0
