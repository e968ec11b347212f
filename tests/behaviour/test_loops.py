# SPDX-License-Identifier: Apache-2.0
"""What user loops do to a selector: other optimizers, skipped steps, two selectors, early ends."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel, get_peft_model

from sfa_peft import SelectionError, SFAConfig, SFAError, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

OPTIONS = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "select_until": 1}


def make(**changes):
    return get_peft_model(MLP(), SFAConfig(**(OPTIONS | {"selection_steps": 2} | changes)))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model, step: int = 0) -> torch.Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


def fit(model, optimizer, selector, steps: int) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("score", ["accumulated_gradient", "random"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_trains_like_a_plain_one_and_reloads_to_the_bit(kind, score, tmp_path):
    losses = []
    for options in ({"foreach": False}, {"fused": True}):
        model = make(score=score)
        optimizer = kind(trained(model), lr=0.05, **options)
        fit(model, optimizer, SFASelector(model, total_steps=12), 12)
        losses.append(loss_of(model).item())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        assert torch.equal(loss_of(loaded), loss_of(model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < loss_of(MLP()).item()


def test_replaced_values_are_seen_by_the_next_forward():
    model = make(score="random")
    before = loss_of(model).item()
    size = find_pool(model, "default").values.numel()
    torch.nn.utils.vector_to_parameters(torch.full((size,), 0.3), trained(model))
    assert loss_of(model).item() != before


@pytest.fixture
def fresh_accelerate():
    """Accelerate's state is the process's: earlier tests' loaders would end an accumulation."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerates_accumulate_counts_update_steps_not_micro_batches():
    plain, wrapped = make(), make()
    optimizer = torch.optim.AdamW(trained(plain), lr=1e-2)
    selector = SFASelector(plain, total_steps=8)
    for update in range(8):
        for micro in range(3):
            (loss_of(plain, 3 * update + micro) / 3).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    prepared, optimizer = accelerator.prepare(wrapped, torch.optim.AdamW(trained(wrapped), lr=1e-2))
    other = SFASelector(wrapped, total_steps=8)
    for step in range(24):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, step))
            optimizer.step()
            other.step(optimizer)
            optimizer.zero_grad()
    assert other.update_steps == selector.update_steps == 8
    pools = [find_pool(m, "default") for m in (plain, wrapped)]
    assert torch.equal(pools[0].slots, pools[1].slots)
    torch.testing.assert_close(pools[0].values, pools[1].values, rtol=0, atol=1e-6)


def test_a_call_without_a_step_changes_nothing():
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    selector = SFASelector(model, total_steps=8)
    fit(model, optimizer, selector, 3)
    values = find_pool(model, "default").values.detach().clone()
    for _ in range(3):
        assert not selector.step(optimizer)
    assert selector.update_steps == 3
    assert torch.equal(find_pool(model, "default").values, values)


def test_an_optimizer_that_does_not_train_the_values_is_refused():
    model = make()
    selector = SFASelector(model, total_steps=8)
    with pytest.raises(SelectionError, match="does not train the values"):
        selector.step(torch.optim.SGD(MLP().parameters(), lr=0.1))


def test_a_selector_that_another_took_over_from_is_refused_at_its_next_step():
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    stale = SFASelector(model, total_steps=8)
    fit(model, optimizer, stale, 1)
    fresh = SFASelector(model, total_steps=8)
    with pytest.raises(SelectionError, match="driven by another selector or callback"):
        fit(model, optimizer, stale, 1)
    stale.load_state_dict(stale.state_dict())  # takes over again
    with pytest.raises(SelectionError, match="driven by another selector or callback"):
        fit(model, optimizer, fresh, 1)
    fit(model, optimizer, stale, 7)
    assert stale.selected_share == 1


@pytest.mark.filterwarnings("ignore::sfa_peft.UnfinishedSelectionWarning")
def test_a_closed_selector_counts_on_and_selects_nothing():
    model = make()
    selector = SFASelector(model, total_steps=8)
    selector.close()
    pool = find_pool(model, "default")
    assert not any(pool.weights[i].observers for i in range(len(pool.weights)))
    assert not any(selector.step() for _ in range(4))
    assert selector.selected == 0


def test_progress_and_metrics_say_how_the_selection_stands():
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    selector = SFASelector(model, total_steps=8)
    rounds = selector.schedule.num_rounds
    assert selector.progress == {"round": f"1/{rounds}", "selected": "0.0%"}
    assert selector.metrics() == {"sfa_round": 1, "sfa_selected": 0, "sfa_share/other": 0}
    fit(model, optimizer, selector, selector.schedule.selection_steps)
    pool = find_pool(model, "default")
    share = pool.num_assigned / pool.size
    assert selector.progress == {"round": f"2/{rounds}", "selected": f"{share:.1%}"}
    found = selector.metrics()
    assert (
        found["sfa_selected"] == share == pytest.approx(1 / selector.schedule.num_picks, abs=0.01)
    )
    assert found["sfa_share/other"] == pool.num_assigned / pool.starts[-1]
    assert found["sfa_score/p50"] <= found["sfa_score/threshold"] <= 1.004 * found["sfa_score/max"]
    finished = SFASelector(make(score="random"), total_steps=8)
    assert finished.progress == finished.metrics() == {}


@pytest.mark.parametrize("total", [0, -5, 2.5, "10", True])
def test_a_run_length_that_is_no_number_of_steps_is_refused(total):
    with pytest.raises(SelectionError, match="total_steps: expected a number"):
        SFASelector(make(), total_steps=total)


def test_a_reference_forward_between_forward_and_backward_disturbs_neither():
    model = make(score="random")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for step in range(3):
        out = loss_of(model, step)
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(loss_of(model, step), loss_of(MLP(), step))
        assert torch.equal(out, loss_of(model, step))
        out.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_threads_that_make_the_first_forward_together_agree_and_leave_no_trace():
    for seed in range(5):
        model = make(score="random", init_weights=False, seed=seed).eval()
        x = torch.randn(4, 12)
        outputs, barrier = [], threading.Barrier(6)

        def work(model=model, x=x, outputs=outputs, barrier=barrier) -> None:
            barrier.wait()
            with torch.no_grad():
                outputs.append(model(x))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(out, outputs[0]) for out in outputs)
        assert torch.equal(model.unload()(x), MLP()(x))


def test_a_deepcopy_in_mid_run_goes_on_like_the_original():
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    selector = SFASelector(model, total_steps=8)
    fit(model, optimizer, selector, 3)
    twin = copy.deepcopy((model, optimizer, selector))
    for run in ((model, optimizer, selector), twin):
        fit(*run, 5)
    for name in ("slots", "values"):
        one, two = (getattr(find_pool(m, "default"), name) for m in (model, twin[0]))
        assert torch.equal(one, two)


def test_nothing_keeps_a_deleted_model_alive():
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    fit(model, optimizer, SFASelector(model, total_steps=8), 8)
    pool = weakref.ref(find_pool(model, "default"))
    del model, optimizer
    gc.collect()
    assert pool() is None


def test_a_selector_whose_adapter_was_deleted_disturbs_no_other_training():
    model = make()
    selector = SFASelector(model, total_steps=8)
    model.delete_adapter("default")
    other = MLP()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(other).backward()
    optimizer.step()
    with pytest.raises(SelectionError, match="does not train the values"):
        selector.step(optimizer)


def test_what_sfa_cannot_do_is_said():
    model = make(score="random")
    model.add_adapter("other", SFAConfig(**OPTIONS, score="random"))
    with pytest.raises(SFAError, match="one batch cannot mix SFA adapters"):
        model(torch.randn(2, 12), adapter_names=["default", "other"])


def test_an_adapter_loaded_into_a_running_selection_is_noticed_at_the_next_pick(tmp_path):
    model = make()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    selector = SFASelector(model, total_steps=12)
    fit(model, optimizer, selector, 2)
    model.save_pretrained(tmp_path)
    fit(model, optimizer, selector, 3)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(SelectionError, match="Was the adapter loaded anew"):
        fit(model, optimizer, selector, 3)


def test_the_selector_of_a_deleted_adapter_says_so():
    model = make()
    model.add_adapter("other", SFAConfig(**(OPTIONS | {"selection_steps": 2})))
    model.set_adapter("other")
    selector = SFASelector(model, total_steps=8)
    model.delete_adapter("other")
    with pytest.raises(SelectionError, match="`other` was deleted"):
        selector.state_dict()
