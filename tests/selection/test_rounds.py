# SPDX-License-Identifier: Apache-2.0
"""Which gradients a round counts: not those of given-up steps, of probes, nor broken ones."""

import copy

import pytest
import torch
from peft import get_peft_model

from sfa_peft import GradientWarning, SelectionError, SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

STEPS = 8
SCORES = ["accumulated_gradient", "absolute_gradient", "movement", "weight_difference"]


def start(score="accumulated_gradient", optimizer=torch.optim.AdamW, **options):
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "selection_steps": 2}
    model = get_peft_model(MLP(), SFAConfig(**config, select_until=1, score=score))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, optimizer(trained, lr=1e-2), SFASelector(model, total_steps=STEPS, **options)


def loss_of(model, step: int) -> torch.Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


def train(model, optimizer, selector, disturb=None, steps=range(STEPS), without=()):
    """Train; `disturb` gets the step and does what it wants before the step's own backward.

    Steps in `without` have no backward.
    """
    for step in steps:
        if disturb is not None:
            disturb(step, model, optimizer, selector)
        if step not in without:
            loss_of(model, step).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return find_pool(model, "default")


def assert_same(one, two) -> None:
    assert torch.equal(one.slots, two.slots)
    assert torch.equal(one.values, two.values)


@pytest.mark.parametrize("score", SCORES)
def test_a_batch_that_is_dropped_with_skip_leaves_no_trace(score):
    def drop(step, model, optimizer, selector) -> None:
        if step % 3 == 1:
            (100 * loss_of(model, step + 100)).backward()
            selector.skip()
            optimizer.zero_grad()

    assert_same(train(*start(score)), train(*start(score, can_skip=True), drop))


@pytest.mark.parametrize("score", SCORES)
def test_a_backward_while_the_selector_is_paused_leaves_no_trace(score):
    def probe(step, model, optimizer, selector) -> None:
        with selector.paused(), selector.paused():
            (100 * loss_of(model, step + 100)).backward()
        optimizer.zero_grad()

    assert_same(train(*start(score)), train(*start(score), probe))


def test_without_either_a_dropped_batch_counts():
    def drop(step, model, optimizer, selector) -> None:
        (100 * loss_of(model, step + 100)).backward()
        optimizer.zero_grad()

    pools = train(*start()), train(*start(), drop)
    assert not torch.equal(pools[0].slots, pools[1].slots)


def test_a_step_whose_gradients_are_summed_already_cannot_be_skipped():
    model, _, selector = start()
    loss_of(model, 0).backward()
    with pytest.raises(SelectionError, match="Make the selector with can_skip=True"):
        selector.skip()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", SCORES)
def test_a_batch_whose_loss_is_not_finite_leaves_no_trace_if_the_loop_drops_it(score, bad):
    def drop(step, model, optimizer, selector) -> None:
        if step == 3:
            (bad * loss_of(model, step + 100)).backward()
            optimizer.zero_grad()

    straight = train(*start(score))
    with pytest.warns(GradientWarning, match="1 gradient of this round held NaN") as caught:
        pool = train(*start(score), drop)
    assert len(caught) == 1
    assert_same(straight, pool)


# --- rounds without a gradient ----------------------------------------------------------------


def test_the_share_of_a_round_without_any_gradient_goes_to_the_next_pick():
    model, optimizer, selector = start()
    with pytest.warns(GradientWarning, match=r"step 4: no gradient .* left to the next pick"):
        pool = train(model, optimizer, selector, without={2, 3})
    assert selector.selected_share == 1
    assert [step for *_, step in selector._rounds.joined] == [2, 6]
    assert pool.num_assigned == pool.size


def test_a_last_round_without_any_gradient_says_what_stays_unselected():
    model, optimizer, selector = start()
    with pytest.warns(GradientWarning, match=r"step 6: .* last pick: \d+ weights .* unselected"):
        pool = train(model, optimizer, selector, without={4, 5})
    assert pool.num_assigned == selector.schedule.selected_after(4) < pool.size
    assert not any(pool.weights[i].observers for i in range(2))  # scores are freed all the same


def test_a_run_that_lost_a_pick_is_resumed_to_the_bit():
    model, optimizer, selector = start()
    with pytest.warns(GradientWarning):
        train(model, optimizer, selector, steps=range(5), without={2, 3})
    state, moments = copy.deepcopy((selector.state_dict(), optimizer.state_dict()))
    again = start()
    find_pool(again[0], "default").load_state_dict(state["pool"])
    again[1].load_state_dict(moments)
    again[2].load_state_dict(state)
    rest = range(5, STEPS)
    pools = [train(*run, steps=rest) for run in ((model, optimizer, selector), again)]
    assert_same(*pools)


# --- when it was made -------------------------------------------------------------------------


def test_a_selector_made_between_backward_and_step_says_that_it_missed_a_backward():
    model, optimizer, _ = start()
    loss_of(model, 0).backward()
    selector = SFASelector(model, total_steps=STEPS)
    optimizer.step()
    with pytest.raises(SelectionError, match="missed the gradient of the first step"):
        selector.step(optimizer)


def test_gradients_that_were_set_to_zero_are_no_missed_backward():
    model, optimizer, _ = start()
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    pool = train(model, optimizer, SFASelector(model, total_steps=STEPS))
    assert pool.num_assigned == pool.size
