# SPDX-License-Identifier: Apache-2.0
"""Copies in the middle of a run, and forwards that do not belong to the training."""

import copy

import pytest
import torch

from sfa_peft import SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.behaviour.test_precision import SCORES, STEPS, assert_same, loss_of, make, trained
from tests.tiny import MLP


@pytest.mark.parametrize("options", SCORES, ids=str)
def test_forwards_without_gradient_anywhere_in_a_step_change_no_bit(options):
    def disturb(model) -> None:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                model.eval()
                model(torch.randn(2, 12))
                with model.disable_adapter():
                    model(torch.randn(2, 12))
                model.train()

    pools = []
    for disturbed in (False, True):
        model = make(**options)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        selector = SFASelector(model, total_steps=STEPS)
        for step in range(STEPS):
            losses = []
            for micro in range(2):  # both forwards first
                losses.append(loss_of(model, 2 * step + micro))
                disturb(model) if disturbed else None
            sum(losses).backward()
            disturb(model) if disturbed else None
            optimizer.step()
            disturb(model) if disturbed else None
            selector.step(optimizer)
            optimizer.zero_grad()
        pools.append(find_pool(model, "default"))
    assert_same(*pools)


@pytest.mark.parametrize("options", [*SCORES, {"score_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("selector_first", [False, True])
def test_a_copy_trains_on_by_itself_and_to_the_same_bits(options, selector_first):
    model = make(**options)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    selector = SFASelector(model, total_steps=STEPS)

    def train(model, optimizer, selector, steps) -> None:
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            selector.step(optimizer)
            optimizer.zero_grad()

    train(model, optimizer, selector, range(4))
    loss_of(model, 4)  # live
    if selector_first:
        selector2, optimizer2, model2 = copy.deepcopy((selector, optimizer, model))
    else:
        model2, optimizer2, selector2 = copy.deepcopy((model, optimizer, selector))
    alone = copy.deepcopy(model)
    train(model, optimizer, selector, range(4, STEPS))
    with torch.no_grad():  # what happens to the original is nothing to the copy
        for parameter in model.parameters():
            parameter.add_(1)
    values = find_pool(model, "default").values.detach() - 1
    train(model2, optimizer2, selector2, range(4, STEPS))
    pools = [find_pool(m, "default") for m in (model, model2)]
    assert torch.equal(pools[0].slots, pools[1].slots)
    torch.testing.assert_close(pools[1].values.detach(), values, rtol=0, atol=1e-6)
    bare = find_pool(alone, "default")  # a copy without the selector carries no scores
    assert not any(bare.weights[i].observers or bare.weights[i].candidates for i in range(2))
    head = {n: t for n, t in MLP().state_dict().items() if not n.startswith("head")}
    unloaded = alone.unload().state_dict()
    assert all(torch.equal(unloaded[n], t) for n, t in head.items())
