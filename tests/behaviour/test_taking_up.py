# SPDX-License-Identifier: Apache-2.0
"""A run goes on only with its own selector's state, settings and adapter, and says what differs."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from transformers import TrainerCallback

from sfa_peft import (
    ResumedRunWarning,
    SelectionError,
    SFACallback,
    SFAConfig,
    SFASelector,
    UnfinishedSelectionWarning,
)
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP, upernet
from tests.training.trainer_runs import Images, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2}


class OtherImages(Images):
    def __getitem__(self, index: int):
        return super().__getitem__(index + 100)


# --- whose state ---------------------------------------------------------------------------------


def sums(path) -> dict[str, torch.Tensor]:
    return torch.load(path / "sfa_selector.pt", weights_only=True)["sums"]


class FirstSums(TrainerCallback):
    """Keeps the sums that a run begins with."""

    def __init__(self, callback: SFACallback) -> None:
        self.callback, self.sums = callback, {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if not self.sums:
            self.sums = {
                k: v.clone() for k, v in self.callback.selector.state_dict()["sums"].items()
            }


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_checkpoint_outside_the_output_folder_brings_its_own_scores(tmp_path, kind):
    x, y = tmp_path / "x", tmp_path / "y"
    make_trainer(x, [SFACallback()], **SAVING).train()
    make_trainer(y, [SFACallback()], data=OtherImages(), **SAVING).train()
    wanted, wrong = sums(x / "checkpoint-2"), sums(y / "checkpoint-2")
    assert not all(torch.equal(wanted[k], wrong[k]) for k in wanted)
    callback = SFACallback()
    seen = FirstSums(callback)
    trainer = make_trainer(y, [callback, seen])
    trainer.train(resume_from_checkpoint=kind(x / "checkpoint-2"))
    assert seen.sums.keys() == wanted.keys()
    assert all(torch.equal(seen.sums[k], wanted[k]) for k in wanted)


def test_without_a_trainer_the_folder_of_the_checkpoint_must_be_given(tmp_path):
    trainer = make_trainer(tmp_path, [SFACallback()], **SAVING)
    trainer.train()
    args, state, control = trainer.args, trainer.state, trainer.control
    model = make_trainer(tmp_path, []).model
    state.global_step = 2
    with pytest.raises(
        SelectionError, match=r"not known.*SFACallback\(resume_from_checkpoint="
    ) as e:
        SFACallback().on_train_begin(args, state, control, model=model)
    assert "step 2" in str(e.value)
    given = SFACallback(resume_from_checkpoint=tmp_path / "checkpoint-2")
    given.on_train_begin(args, state, control, model=model)
    assert given.selector.update_steps == 2


# --- which adapter -------------------------------------------------------------------------------

CONFIG = {
    "budget": 0.3,
    "rho": 0,
    "target_modules": ["first", "second"],
    "selection_steps": 2,
    "select_until": 1,
}


def test_an_adapter_that_transformers_added_is_found():
    model = upernet()
    model.add_adapter(SFAConfig(budget=0.2), adapter_name="mine")
    assert SFASelector(model, total_steps=40).adapter_name == "mine"


def test_an_injected_adapter_is_found_and_selected():
    model = inject_adapter_in_model(SFAConfig(**CONFIG), MLP())
    selector = SFASelector(model, total_steps=6)
    assert selector.adapter_name == "default"
    for _ in range(6):
        model(torch.randn(4, 12)).sum().backward()
        selector.step()
    assert selector.selected_share == 1


def test_the_layers_know_which_adapter_is_active():
    model = get_peft_model(MLP(), SFAConfig(**CONFIG))
    model.add_adapter("b", SFAConfig(**CONFIG))
    model.base_model.set_adapter("b")
    assert SFASelector(model, total_steps=6).adapter_name == "b"
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(SelectionError, match=r"needs one adapter to drive.*'default', 'b'"):
        SFASelector(model, total_steps=6)
    assert SFASelector(model, total_steps=6, adapter_name="b").adapter_name == "b"


# --- which settings ------------------------------------------------------------------------------


def loop(total_steps: int, steps: int, **options):
    model = get_peft_model(MLP(), SFAConfig(**(CONFIG | options)))
    selector = SFASelector(model, total_steps=total_steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    advance(model, selector, optimizer, 1, steps)
    return model, selector, optimizer


def advance(model, selector, optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()


def take_up(selector, total_steps: int = 12, **options) -> SFASelector:
    """Resume in a new model, as from a checkpoint."""
    other = get_peft_model(MLP(), SFAConfig(**(CONFIG | options)))
    find_pool(other, "default").load_state_dict(selector.state_dict()["pool"])
    again = SFASelector(other, total_steps=total_steps)
    again.load_state_dict(selector.state_dict())
    return again


@pytest.mark.parametrize("steps", [1, 3])  # before the first pick, and after
@pytest.mark.parametrize(
    "changed",
    [
        {"score": "random"},
        {"score": "absolute_gradient"},
        {"score_dtype": "bfloat16"},
        {"score_every": 2},
        {"ranking": "layer"},
        {"granularity": "row"},
        {"schedule": "cubic"},
        {"select_until": 0.5},
    ],
)
def test_other_settings_are_refused_by_name(steps, changed):
    _, selector, _ = loop(12, steps)
    (name, now), was = next(iter(changed.items())), getattr(selector.config, next(iter(changed)))
    with pytest.raises(SelectionError) as caught:
        take_up(selector, **changed)
    assert f"was started with {name}={was!r}, now {now!r}" in str(caught.value)


@pytest.mark.parametrize("steps", [1, 3])
def test_another_length_is_said_and_the_first_schedule_goes_on(steps):
    _, selector, _ = loop(12, steps)
    take_up(selector)  # a warning would fail
    with pytest.warns(
        ResumedRunWarning, match="total_steps=12, now 24; selection_steps=2, now 4"
    ) as caught:
        again = take_up(selector, total_steps=24, selection_steps=4)
    assert caught[0].filename == __file__
    assert again.schedule == selector.schedule


def test_another_number_of_processes_is_said():
    _, selector, _ = loop(12, 3)
    state = selector.state_dict()
    assert state["num_processes"] == 1
    selector.load_state_dict(state)  # a warning would fail
    with pytest.warns(ResumedRunWarning, match="saved by 2 processes, and 1 resume it"):
        selector.load_state_dict(state | {"num_processes": 2})


# --- unfinished adapters -------------------------------------------------------------------------


def warned(function, match: str) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return sum(
        issubclass(w.category, UnfinishedSelectionWarning) and match in str(w.message)
        for w in caught
    )


def test_resuming_without_the_callback_is_said(tmp_path):
    make_trainer(tmp_path, [SFACallback()], **SAVING).train()
    for step, count in ((4, 1), (10, 0)):  # picks after steps 3, 6 and 9
        folder = str(tmp_path / f"checkpoint-{step}")
        again = make_trainer(tmp_path, [], max_steps=14)
        found = warned(lambda: again.train(resume_from_checkpoint=folder), "that an unfinished run")  # noqa: B023
        assert found == count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "row"},
        {"granularity": "block"},
        {"ranking": "layer", "granularity": "block"},
        {"schedule": "literal"},
        {"ranking": "layer", "granularity": "row"},
    ],
)
def test_training_on_from_a_saved_adapter_is_said_only_where_it_is_unfinished(tmp_path, options):
    from peft import PeftModel

    for steps, count in ((2, 1), (12, 0)):
        model, _, _ = loop(12, steps, **options)
        model.save_pretrained(tmp_path / str(steps))
        loaded = PeftModel.from_pretrained(MLP(), tmp_path / str(steps), is_trainable=True)

        def train() -> None:
            for _ in range(5):
                loaded(torch.randn(4, 12)).sum().backward()  # noqa: B023

        assert warned(train, "nothing selects weights") == count
        loaded.eval()
        assert warned(train, "nothing selects weights") == 0


def test_a_reused_selection_is_not_taken_for_an_unfinished_one(tmp_path):
    model, _, _ = loop(12, 4)
    model.save_pretrained(tmp_path)
    reused = get_peft_model(MLP(), SFAConfig(**(CONFIG | {"selection_from": str(tmp_path)})))

    def train() -> None:
        for _ in range(5):
            reused(torch.randn(4, 12)).sum().backward()

    assert warned(train, "nothing selects") == 0


@pytest.mark.filterwarnings("ignore::sfa_peft.UnfinishedSelectionWarning")
def test_training_an_unfinished_adapter_from_step_0_with_the_callback_is_refused(tmp_path):
    stopped = make_trainer(tmp_path, [SFACallback(), StopAfter(4)])
    stopped.train()
    again = make_trainer(tmp_path, [SFACallback()], model=stopped.model)
    with pytest.raises(SelectionError, match=r"unfinished run.*train\(resume_from_checkpoint="):
        again.train()


def test_a_finished_adapter_trains_on(tmp_path):
    trainer = make_trainer(tmp_path, [SFACallback()])
    trainer.train()
    values = find_pool(trainer.model, "default").values.clone()
    trainer.train()
    assert not torch.equal(values, find_pool(trainer.model, "default").values)


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.step


class OutOfMemory(TrainerCallback):
    """Lets the memory run out once, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("step", [1, 4, 7, 10])
def test_a_smaller_batch_after_running_out_of_memory_still_selects_the_whole_budget(tmp_path, step):
    callback = SFACallback()
    trainer = make_trainer(
        tmp_path,
        [callback, OutOfMemory(step)],
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
    )
    says = pytest.warns(ResumedRunWarning, match="starts again at step 0 with")
    with nullcontext() if step == 1 else says:
        trainer.train()
    assert trainer.state.global_step == 12
    assert trainer._train_batch_size == 7
    pool = find_pool(trainer.model, "default")
    assert pool.num_assigned == pool.size
    picks = len(callback.selector._rounds.joined)
    assert picks == 3  # and late entries keep their ages


def test_a_callback_whose_run_broke_off_does_not_drive_the_old_model_again(tmp_path):
    callback = SFACallback()
    broken = make_trainer(tmp_path, [callback, OutOfMemory(4)])
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.train()
    trainer = make_trainer(tmp_path, [callback])
    trainer.train()
    pool = find_pool(trainer.model, "default")
    assert callback.selector.pool is pool
    assert pool.num_assigned == pool.size
