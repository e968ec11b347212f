# SPDX-License-Identifier: Apache-2.0
"""What a user of the Trainer sees of a selection: logs, reporters, bar, evaluation, early ends."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Subset
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    UperNetForSemanticSegmentation,
)
from transformers.integrations import integration_utils

from sfa_peft import (
    LearningRateWarning,
    LossScaleWarning,
    SelectionError,
    SFACallback,
    SFAConfig,
    SFAWarning,
    UnfinishedSelectionWarning,
    selection_summary,
)
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import images, upernet
from tests.training.trainer_runs import QUIET, ROUND, STEPS, Images, make_trainer

NUM_PICKS = STEPS // ROUND - 1
SCORES = [f"sfa_score/{name}" for name in ("p50", "p90", "p99", "max", "threshold")]
STAGES = [f"sfa_share/stage{i}" for i in range(1, 5)]


class Reporter(TrainerCallback):
    """Keeps what it is given, as TensorBoard's does: at once, and before other callbacks."""

    def __init__(self) -> None:
        self.logs = {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.logs[state.global_step] = dict(logs)


@pytest.fixture
def reported(monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Reporter)
    return {"report_to": ["fake"]}


def reporter_of(trainer) -> Reporter:
    (found,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Reporter)]
    return found


# --- logs --------------------------------------------------------------------------------------


def test_reporters_get_round_and_share_and_after_each_pick_stages_and_scores(tmp_path, reported):
    trainer = make_trainer(tmp_path, [SFACallback()], logging_steps=1, **reported)
    trainer.train()
    logs = reporter_of(trainer).logs
    assert list(logs) == list(range(1, STEPS + 1))
    for step, log in logs.items():
        assert log["sfa_round"] == min(step // ROUND + 1, STEPS // ROUND)
        assert log["sfa_selected"] == pytest.approx(min(step // ROUND / NUM_PICKS, 1), abs=1e-4)
        is_pick = step % ROUND == 0 and step < STEPS
        assert all((key in log) == is_pick for key in SCORES + STAGES)
        if is_pick:
            half, most, nearly_all, largest, threshold = (log[key] for key in SCORES)
            assert 0 <= half <= most <= nearly_all <= largest
            assert half <= threshold  # a tenth is selected
    rows = selection_summary(trainer.model)  # layers 0 to 4 are of stages 1, 2, 3, 3, 4
    for key, layers in zip(STAGES, ([0], [1], [2, 3], [4]), strict=True):
        own = [row for row in rows if row["layer"] in layers]
        share = sum(r["selected"] for r in own) / sum(r["numel"] for r in own)
        assert logs[STEPS - ROUND][key] == share
    kept = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [{k: v for k, v in e.items() if k != "step"} for e in kept] == list(logs.values())


def test_a_log_less_often_than_a_pick_has_the_latest(tmp_path, reported):
    trainer = make_trainer(tmp_path, [SFACallback()], logging_steps=4, **reported)
    trainer.train()
    logs = reporter_of(trainer).logs
    assert {step: "sfa_score/p50" in log for step, log in logs.items()} == {
        4: True, 8: True, 12: True
    }  # fmt: skip


def test_the_list_of_callbacks_is_as_before_when_training_ends(tmp_path, reported):
    trainer = make_trainer(tmp_path, [SFACallback()], **reported)
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before
    callback = SFACallback()
    other = make_trainer(tmp_path, [callback], logging_steps=1, model=trainer.model, **reported)
    other.callback_handler.callbacks.append(SimpleNamespace())  # fails at its first event
    with pytest.raises(AttributeError):
        other.train()
    other.callback_handler.callbacks.pop()
    other.train()
    assert sum(type(c).__name__ == "BeforeReporters" for c in before) == 0
    assert len(other.callback_handler.callbacks) == len(before)


def test_a_callback_without_a_trainer_still_logs():
    callback = SFACallback()
    model = get_peft_model(upernet(), SFAConfig(budget=0.2, selection_steps=3))
    state = SimpleNamespace(
        global_step=0, max_steps=STEPS, log_history=[{"step": 0}], is_hyper_param_search=False
    )
    args = SimpleNamespace(gradient_accumulation_steps=1, output_dir="nowhere")
    callback.on_train_begin(args, state, None, model=model)
    logs = {"loss": 1.0}
    callback.on_log(args, state, None, logs=logs)
    assert logs == {"loss": 1.0, "sfa_round": 1, "sfa_selected": 0}
    with pytest.warns(UnfinishedSelectionWarning, match="ended at update step 0"):
        callback.on_train_end(args, state, None)


def test_tensorboard_gets_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, [SFACallback()], logging_steps=1, report_to=["tensorboard"])
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    shares = {e.step: e.value for e in events.Scalars("train/sfa_selected")}
    assert shares[STEPS] == 1
    for key in SCORES + STAGES:
        assert [e.step for e in events.Scalars(f"train/{key}")] == [3, 6, 9]


# --- progress bar ------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes what is written on the progress bar."""

    def __init__(self) -> None:
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        (progress,) = [c for c in self.handler.callbacks if isinstance(c, ProgressCallback)]
        self.seen[state.global_step] = progress.training_bar.postfix


def test_the_progress_bar_shows_round_and_share(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, [SFACallback(), watch], disable_tqdm=False)
    watch.handler = trainer.callback_handler
    trainer.train()
    assert watch.seen[1] == watch.seen[2] == "round=1/4, selected=0.0%"
    assert watch.seen[3] == watch.seen[5] == "round=2/4, selected=33.3%"
    assert watch.seen[12] == "round=4/4, selected=100.0%"


def test_where_nothing_is_selected_the_bar_shows_nothing(tmp_path):
    watch = Watch()
    model = get_peft_model(upernet(), SFAConfig(rho=1, modules_to_save=["decode_head"]))
    trainer = make_trainer(tmp_path, [SFACallback(), watch], model=model, disable_tqdm=False)
    watch.handler = trainer.callback_handler
    trainer.train()
    assert set(watch.seen.values()) == {None}


# --- evaluation and checkpoints ----------------------------------------------------------------


def test_evaluations_in_and_between_rounds_change_no_bit(tmp_path):
    plain = make_trainer(tmp_path, [SFACallback()])
    watched = make_trainer(
        tmp_path, [SFACallback()], eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    watched.eval_dataset = Subset(Images(), range(2))
    for name, trainer in {"plain": plain, "watched": watched}.items():
        trainer.train()
        trainer.model.save_pretrained(tmp_path / name)
    assert sum("eval_loss" in e for e in watched.state.log_history) == STEPS + 1
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("plain", "watched")]
    assert files[0].read_bytes() == files[1].read_bytes()


def evaluated(folder, best: int, **changes):
    """Return a Trainer whose evaluation is best at one step."""

    def quality(_prediction) -> dict[str, float]:
        return {"quality": -float(abs(trainer.state.global_step - best))}

    callbacks = [SFACallback(), *changes.pop("callbacks", [])]
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "quality", "greater_is_better": True} | changes
    trainer = make_trainer(folder, callbacks, **settings)
    trainer.compute_metrics, trainer.eval_dataset = quality, Subset(Images(), range(2))
    return trainer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**images()).logits


def test_the_best_model_is_that_of_its_checkpoint_with_fewer_weights_and_says_so(tmp_path):
    trainer = evaluated(tmp_path, best=4, save_total_limit=2)
    pool = find_pool(trainer.model, "default")
    third = pool.size // NUM_PICKS
    said = f"holds {third} of the {pool.size} weights that the run selected"
    with pytest.warns(UnfinishedSelectionWarning, match=said) as caught:
        trainer.train()
    assert {w.filename for w in caught if said in str(w.message)} == {__file__}
    assert pool.num_assigned == third
    kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-12", "checkpoint-4"]  # the last, to resume from, and the best
    assert all((tmp_path / name / "sfa_selector.pt").is_file() for name in kept)
    again = PeftModel.from_pretrained(upernet(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(trainer.model))
    summary = [row["selected"] for row in selection_summary(trainer.model)]
    assert summary == [row["selected"] for row in selection_summary(again)]
    assert sum(summary) == pool.num_assigned


def test_early_stopping_says_how_much_is_selected(tmp_path):
    stops = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = evaluated(tmp_path, best=4, callbacks=[stops])
    pool = find_pool(trainer.model, "default")
    third = pool.size // NUM_PICKS
    said = f"step 6, before its last pick after step 9: {third} of {pool.size} weights are selected"
    with pytest.warns(UnfinishedSelectionWarning, match=said):
        trainer.train()
    assert trainer.state.global_step == 6
    assert not any(pool.weights[i].observers for i in range(len(pool.weights)))  # scores are freed
    trainer.model.save_pretrained(tmp_path / "stopped")
    card = (tmp_path / "stopped" / "README.md").read_text()
    assert f"Only a part of the budget was selected when this was saved: {third:,} of" in card
    again = PeftModel.from_pretrained(upernet(), tmp_path / "stopped")
    assert find_pool(again, "default").num_assigned == third
    assert torch.equal(logits(again), logits(trainer.model))


def test_a_run_that_ends_with_its_last_model_warns_of_nothing(tmp_path, recwarn):
    evaluated(tmp_path, best=STEPS).train()
    assert not [w for w in recwarn if issubclass(w.category, SFAWarning)]


def test_checkpoints_of_the_model_only_hold_the_adapter_and_no_scores(tmp_path):
    trainer = make_trainer(
        tmp_path, [SFACallback()], save_strategy="steps", save_steps=6, save_only_model=True
    )
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert not {"optimizer.pt", "sfa_selector.pt"} & {path.name for path in folder.iterdir()}
    assert not list(tmp_path.glob("sfa_selector*"))
    pool = find_pool(PeftModel.from_pretrained(upernet(), folder), "default")
    assert pool.num_assigned == pool.size * 2 // 3
    again = make_trainer(tmp_path, [SFACallback()])
    with pytest.raises(SelectionError, match="Checkpoints of save_only_model=True have none"):
        again.train(resume_from_checkpoint=str(folder))
    trainer.model.save_pretrained(folder)  # over it: now everything is selected
    assert "Only a part of the budget" not in (folder / "README.md").read_text()


# --- what is set up wrongly --------------------------------------------------------------------


class TakesKeywords(UperNetForSemanticSegmentation):
    """As all vision heads are since transformers 5: takes any keyword and does not look at it."""

    def forward(self, pixel_values=None, labels=None, **kwargs):
        return super().forward(pixel_values=pixel_values, labels=labels)


def first_loss(folder, accumulation: int, *, decided: bool) -> float:
    """Return the loss that the Trainer logs for the first 8 images."""
    config = SFAConfig(budget=0.2, selection_steps=1, modules_to_save=["decode_head"])
    base = upernet()
    base.__class__ = TakesKeywords
    model = get_peft_model(base, config)
    if decided:  # as the warning says
        model.get_base_model().accepts_loss_kwargs = False
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        label_names=["labels"],
        **QUIET,
    )
    trainer = Trainer(model, arguments, train_dataset=Images(), callbacks=[SFACallback()])
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_losses_that_would_be_added_up_are_warned_of_and_the_remedy_works(tmp_path, recwarn):
    whole = first_loss(tmp_path, 1, decided=False)
    decided = first_loss(tmp_path, 4, decided=True)
    assert not [w for w in recwarn if "times too large" in str(w.message)]
    with pytest.warns(LossScaleWarning, match=r"accepts_loss_kwargs\s+= False before") as caught:
        summed = first_loss(tmp_path, 4, decided=False)
    assert sum("4 times too large" in str(w.message) for w in caught) == 1
    assert summed == pytest.approx(4 * decided, rel=1e-3)
    assert decided == pytest.approx(whole, rel=0.2)  # batch norm sees other batches


@pytest.mark.parametrize(("rate", "trained"), [(None, False), (1e-3, False), (None, True)])
def test_the_trainers_own_rate_is_warned_of_where_an_adapter_is_fresh(
    rate, trained, tmp_path, recwarn
):
    model = get_peft_model(upernet(), SFAConfig(budget=0.1, score="random", modules_to_save="auto"))
    if trained:
        nn.init.constant_(model.get_parameter(sorted(by_name(model, "sfa_up"))[0]), 1e-3)
    rates = {} if rate is None else {"learning_rate": rate}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, **rates, **QUIET)
    Trainer(model, arguments, train_dataset=Images(), callbacks=[SFACallback()]).train()
    warned = [w for w in recwarn if issubclass(w.category, LearningRateWarning)]
    assert len(warned) == (rate is None and not trained)


def by_name(model, part):
    return [name for name, _ in model.named_parameters() if part in name]


def test_two_callbacks_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, [SFACallback(), SFACallback("default")])
    with pytest.raises(
        SelectionError, match=r"has 2 SFACallbacks, of adapters \[None, 'default'\]"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


# --- fp16 --------------------------------------------------------------------------------------


class Overflow(TrainerCallback):
    """Lets the gradients of some update steps overflow."""

    def __init__(self, steps) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in self.steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)


@pytest.mark.parametrize("overflows", [[], [1, 7]])
def test_a_scaled_loss_selects_what_an_unscaled_one_does(tmp_path, overflows):
    """A gradient scaler as in fp16 training, but in fp32, which a CPU can do."""
    callback = SFACallback()
    steps = STEPS + len(overflows)
    settings = {"max_grad_norm": 0, "lr_scheduler_type": "constant"}
    plain = make_trainer(tmp_path, [SFACallback()], **settings)
    scaled = make_trainer(tmp_path, [callback, Overflow(overflows)], max_steps=steps, **settings)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # exact
    for trainer in (plain, scaled):
        trainer.train()
    assert callback.selector.update_steps == STEPS  # those that overflowed do not count
    pools = [find_pool(t.model, "default") for t in (plain, scaled)]
    assert torch.equal(pools[0].slots, pools[1].slots) == (not overflows)  # other batches
    assert pools[1].num_assigned == pools[1].size


@pytest.mark.gpu
def test_fp16_training_finds_the_gradient_scaler(tmp_path):
    callback = SFACallback()
    trainer = make_trainer(tmp_path, [callback], fp16=True, use_cpu=False)
    trainer.train()
    assert trainer.accelerator.scaler.is_enabled()
    assert callback.selector._rounds.loss_scale == trainer.accelerator.scaler.scale
    assert callback.selector.selected_share == 1
