# SPDX-License-Identifier: Apache-2.0
"""A loop made for PEFT's methods that act while training selects what a selector would."""

import copy
import functools
import warnings

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from sfa_peft import (
    EmptySelectionWarning,
    SelectionError,
    SFAConfig,
    SFASelector,
    UnfinishedSelectionWarning,
)
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

STEPS = 12
OPTIONS = {"budget": 0.6, "rho": 0.2, "target_modules": ["first", "second"], "selection_steps": 2}
SCORES = ["accumulated_gradient", "movement", "squared_gradient", "weight_difference"]


def make(**changes):
    torch.manual_seed(1)  # external adapters start at random values
    options = OPTIONS | {"external_modules": ["second"], "total_steps": STEPS} | changes
    return get_peft_model(MLP(), SFAConfig(**options))


def loss_of(model, step: int) -> torch.Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def adalora_loop(model, steps: int = STEPS, first: int = 0, calls: int = STEPS) -> None:
    """The example of `AdaLoraModel.update_and_allocate`, with an optimizer around it."""
    optimizer = optimizer_of(model)
    for i_step in range(first, first + steps):
        loss = loss_of(model, i_step - first)
        loss.backward()
        optimizer.step()
        if i_step - first < calls:
            model.base_model.update_and_allocate(i_step)
        optimizer.zero_grad()


def selector_loop(model, steps: int = STEPS) -> None:
    optimizer, selector = optimizer_of(model), SFASelector(model, total_steps=STEPS)
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()


def check_equal(model, other) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    pools = [find_pool(m, "default") for m in (model, other)]
    assert torch.equal(pools[0].slots, pools[1].slots)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("first", [0, 1])
def test_it_selects_and_trains_what_a_selector_does_to_the_bit(score, first):
    model, other = make(score=score), make(score=score)
    adalora_loop(model, first=first)
    selector_loop(other)
    assert find_pool(model, "default").num_assigned == find_pool(model, "default").size
    check_equal(model, other)


@pytest.mark.parametrize("schedule", ["linear", "cubic", "one_shot", "literal"])
def test_picks_are_those_of_the_configs_schedule(schedule):
    options = {"schedule": schedule, "select_until": None if schedule == "literal" else 0.9}
    model, other = make(**options), make(**options)
    adalora_loop(model)
    selector_loop(other)
    check_equal(model, other)


def test_the_loop_is_one_that_adalora_runs_in():
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["first", "second"], total_step=STEPS, tfinal=2, tinit=2)
    adalora_loop(get_peft_model(MLP(), config))


def test_calls_after_each_micro_batch_count_update_steps():
    model, other = make(), make()
    optimizer = optimizer_of(model)
    for micro in range(3 * STEPS):
        (loss_of(model, micro // 3) / 3).backward()
        if micro % 3 == 2:
            optimizer.step()
        model.base_model.update_and_allocate(micro)
        if micro % 3 == 2:
            optimizer.zero_grad()
    selector_loop(other)
    slots = [find_pool(m, "default").slots for m in (model, other)]
    assert torch.equal(*slots)


class Backwards(MLP):
    """Its layers are registered in another order than they compute in."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = dict(reversed(self._modules.items()))


def test_the_first_step_is_scored_whatever_layer_computes_first():
    config = SFAConfig(**OPTIONS | {"total_steps": STEPS, "rho": 0})
    models = [get_peft_model(Backwards(), config) for _ in range(2)]
    adalora_loop(models[0])
    selector_loop(models[1])
    check_equal(*models)


def test_layers_in_eval_mode_are_scored_too():
    model, other = make().eval(), make().eval()
    adalora_loop(model)
    selector_loop(other)
    check_equal(model, other)


@pytest.mark.parametrize(
    "options",
    [{"rho": 1.0}, {"score": "random"}, {"score": "magnitude"}],
    ids=["external only", "random", "magnitude"],
)
def test_where_nothing_is_selected_while_training_it_does_nothing(options):
    model = make(**options, total_steps=None)
    pool = find_pool(model, "default")
    before = None if pool is None else pool.slots.clone()
    adalora_loop(model)
    assert pool is None or torch.equal(pool.slots, before)


def test_a_finished_adapter_trains_on_with_the_selection_it_has():
    model = make()
    adalora_loop(model)
    twin = copy.deepcopy(model)
    twin.peft_config["default"].total_steps = None
    slots = find_pool(twin, "default").slots.clone()
    adalora_loop(twin, steps=3)
    assert torch.equal(find_pool(twin, "default").slots, slots)


def test_a_run_of_unknown_length_is_refused():
    with pytest.raises(SelectionError, match=r"SFAConfig\(total_steps=\.\.\.\)"):
        adalora_loop(make(total_steps=None))


def test_a_model_with_a_selector_is_refused():
    model = make()
    SFASelector(model, total_steps=STEPS)
    with pytest.raises(SelectionError, match="SFASelector makes its selection already"):
        adalora_loop(model)


def test_what_a_selector_refuses_is_refused_before_the_first_forward():
    model = make()
    inner = model.get_base_model()
    inner.gradient_checkpointing = True
    inner._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    with pytest.raises(SelectionError, match="of the reentrant kind"):
        loss_of(model, 0)


def test_a_selector_made_after_a_first_forward_takes_over():
    model, other = make(), make()
    loss_of(model, 0)
    selector_loop(model)
    selector_loop(other)
    check_equal(model, other)


def test_a_step_without_a_forward_of_the_model_is_refused():
    model = make()
    optimizer = optimizer_of(model)
    optimizer.step()
    with pytest.raises(SelectionError, match="no forward with gradients"):
        model.base_model.update_and_allocate(0)


def test_a_scaled_loss_is_refused():
    model = make()
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    with pytest.raises(SelectionError, match=r"SFASelector\(model, scaler=scaler\)"):
        model.base_model.update_and_allocate(0)


@pytest.mark.parametrize(
    ("calls", "warning"), [(0, EmptySelectionWarning), (2, UnfinishedSelectionWarning)]
)
def test_a_loop_that_leaves_the_call_out_is_warned(calls, warning):
    with pytest.warns(warning, match="nothing selects weights"):
        adalora_loop(make(), calls=calls)


def test_no_warning_comes_where_the_call_is_made():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adalora_loop(make())


def test_only_active_adapters_select():
    model = make()
    config = SFAConfig(**OPTIONS | {"total_steps": STEPS, "rho": 0})
    model.add_adapter("other", config)
    model.set_adapter("other")
    adalora_loop(model)
    assert find_pool(model, "other").num_assigned > 0
    assert find_pool(model, "default").is_empty


def test_a_compiled_backward_scores_the_first_step():
    model, other = make(), make()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        loss_of(compiled, step).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    selector_loop(other)
    slots = [find_pool(m, "default").slots for m in (model, other)]
    assert torch.equal(*slots)
