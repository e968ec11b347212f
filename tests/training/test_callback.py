# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from sfa_peft import (
    EmptySelectionWarning,
    SelectionError,
    SFACallback,
    SFAConfig,
    SFASelector,
    SFAWarning,
    UnfinishedSelectionWarning,
)
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import masks_of
from tests.tiny import MLP, images, upernet


class Images(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        return {k: v[0] for k, v in images(1, seed=index).items()}


def make_trainer(out, callbacks, model=None, **changes) -> Trainer:
    config = SFAConfig(
        budget=0.2, selection_steps=3, select_until=1, modules_to_save=["decode_head"]
    )
    model = model or get_peft_model(upernet(), config)
    model.accepts_loss_kwargs = model.get_base_model().accepts_loss_kwargs = False
    options = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**(options | changes))
    return Trainer(model=model, args=arguments, train_dataset=Images(), callbacks=callbacks)


def test_a_trainer_run_selects_in_rounds_and_logs_the_share(tmp_path):
    callback = SFACallback()
    trainer = make_trainer(tmp_path, [callback], gradient_accumulation_steps=2)
    trainer.train()
    shares = {e["step"]: e["sfa_selected"] for e in trainer.state.log_history if "loss" in e}
    pool = find_pool(trainer.model, "default")
    size = pool.values.numel()
    expected = {t: size * min(t // 3, 3) // 3 / size for t in range(1, 13)}
    assert shares == expected  # update steps count, not micro-batches
    assert callback.selector.update_steps == 12
    assert not any(
        pool.weights[i].observers for i in range(len(pool.weights))
    )  # sums are freed after the last pick


def test_resuming_without_the_selectors_state_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, [SFACallback()], save_strategy="steps", save_steps=4)
    trainer.train()
    state = tmp_path / "checkpoint-4" / "sfa_selector.pt"
    whole = state.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        state.write_bytes(damaged)
        again = make_trainer(tmp_path, [SFACallback()])
        with pytest.raises(SelectionError, match=r"sfa_selector\.pt: cut short or damaged"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state.unlink()
    again = make_trainer(tmp_path, [SFACallback()])
    with pytest.raises(SelectionError, match=r"sfa_selector.pt is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shutil.move(tmp_path / "checkpoint-8", tmp_path / "elsewhere")
    moved = make_trainer(
        tmp_path, [SFACallback(resume_from_checkpoint=str(tmp_path / "elsewhere"))]
    )
    moved.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert moved.state.global_step == 12


def test_the_state_of_another_run_is_refused():
    model = get_peft_model(MLP(), SFAConfig(rho=0, target_modules=["first"]))
    selector = SFASelector(model, total_steps=10)
    state = selector.state_dict() | {"update_steps": 6, "selection_steps": 2}
    state["joined"] = [(0, 7, 2)]
    state["pool"]["slots"][:7] = torch.arange(7)
    with pytest.raises(SelectionError, match=r"has 0 selected weights, .* step 6 .* should have 7"):
        selector.load_state_dict(state)


def test_training_without_a_callback_warns_once(tmp_path):
    trainer = make_trainer(tmp_path, [])
    with pytest.warns(EmptySelectionWarning, match="nothing selects weights") as caught:
        trainer.train()
    assert [w.filename for w in caught if "nothing selects" in str(w.message)] == [__file__]
    assert find_pool(trainer.model, "default").is_empty


def test_a_driven_run_does_not_warn(tmp_path, recwarn):
    make_trainer(tmp_path, [SFACallback()]).train()
    assert not [w for w in recwarn if issubclass(w.category, SFAWarning)]


@pytest.mark.parametrize("options", [{"rho": 1}, {"score": "random"}, {"score": "magnitude"}])
def test_a_callback_does_no_harm_where_there_is_nothing_to_select(tmp_path, options):
    config = SFAConfig(budget=0.2, modules_to_save=["decode_head"], **options)
    model = get_peft_model(upernet(), config)
    pool = find_pool(model, "default")
    before = None if pool is None else {n: m.clone() for n, m in masks_of(pool).items()}
    trainer = make_trainer(tmp_path, [SFACallback()], model)
    trainer.train()
    if pool is not None:
        assert all(torch.equal(m, before[n]) for n, m in masks_of(pool).items())
        assert pool.num_assigned == pool.values.numel()
        assert (pool.values != 0).any()


def test_an_own_loop_must_say_how_long_it_runs():
    config = SFAConfig(rho=0, target_modules=["first"])
    with pytest.raises(SelectionError, match="Give total_steps"):
        SFASelector(get_peft_model(MLP(), config))
    config = SFAConfig(rho=0, target_modules=["first"], total_steps=40)
    assert SFASelector(get_peft_model(MLP(), config)).schedule.total_steps == 40


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(SelectionError, match="MLP has no SFA adapter"):
        SFASelector(MLP(), total_steps=10)


def test_going_on_from_an_unfinished_run_without_its_state_is_reported():
    config = SFAConfig(rho=0, target_modules=["first"], selection_steps=2, select_until=1)
    model = get_peft_model(MLP(), config)
    selector = SFASelector(model, total_steps=8)
    for _ in range(4):
        model(torch.randn(4, 12)).sum().backward()
        selector.step()
    assert 0 < selector.selected_share < 1
    with pytest.warns(UnfinishedSelectionWarning, match="comes from an unfinished run"):
        SFASelector(model, total_steps=8).step()
