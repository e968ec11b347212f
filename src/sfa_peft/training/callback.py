# SPDX-License-Identifier: Apache-2.0
"""`SFACallback`: the selector as a callback of `transformers.Trainer`."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..errors import SFAWarning
from .selector import SFASelector
from .state_files import move_into_checkpoints, read_state, write_state


class SFACallback(TrainerCallback):
    """Drive the selection from the Trainer's events.

    Each update step counts once, however many micro-batches it has. Training logs carry
    `sfa_round` and `sfa_selected` (the selected share of the weights to select), and the first one
    after each pick all of `SFASelector.metrics`; TensorBoard and other reporters get them too. The
    Trainer's progress bar shows round and share. A checkpoint carries the selector's state, so that
    a resumed run goes on with the same scores (but not with `save_only_model`).

    Args:
        adapter_name: The adapter; None for the active one.
        resume_from_checkpoint: Folder to resume from, needed only where it is not
            `<output_dir>/checkpoint-<step>`.
    """

    def __init__(
        self, adapter_name: str | None = None, resume_from_checkpoint: str | None = None
    ) -> None:
        self.adapter_name = adapter_name
        self.resume_from_checkpoint = resume_from_checkpoint
        self.selector: SFASelector | None = None
        self._written_at: int | None = None  # update step
        self._first = _BeforeReporters(self)
        self._logged = self._shown = 0  # rounds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the rounds of the run; on resuming take up its state."""
        self._written_at = None
        trainer = _calling_trainer()
        _warn_of_summed_loss(args, kwargs["model"], trainer)
        self.selector = SFASelector(
            kwargs["model"],
            total_steps=state.max_steps,
            adapter_name=self.adapter_name,
            scaler=getattr(kwargs.get("optimizer"), "scaler", None),
        )
        if state.global_step > 0 and self.selector.pool is not None:  # rho=1 selects nothing
            path, step = Path(str(args.output_dir)), state.global_step
            self.selector.load_state_dict(read_state(self.resume_from_checkpoint, path, step))
        self._logged, self._shown = self.selector.round, 0
        self._first.join(trainer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count an update step, while gradients and learning rate are still its own."""
        if self.selector is not None:
            self.selector.step(kwargs.get("optimizer"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Free the scores, also of a run that was stopped early."""
        self._first.leave()
        if self.selector is not None:
            self.selector.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the selector's state: the Trainer deletes older checkpoints before `on_save`."""
        self._show_progress()
        self._write_early(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the selector's state, where epochs are saved."""
        self._write_early(args, state, control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add round and selected share to a training log (once: reporters had theirs before)."""
        self.add_to_log(state, kwargs.get("logs"))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the selector's state into the checkpoint."""
        if state.is_hyper_param_search:
            return
        if self._written_at != state.global_step:  # not foreseen at the end of the step
            self._write(args, state)
        if state.is_world_process_zero:
            move_into_checkpoints(Path(str(args.output_dir)))

    def add_to_log(self, state: TrainerState, logs: dict[str, Any] | None) -> None:
        """Add how the selection stands to a training log and to the Trainer's history of them."""
        if self.selector is None or not logs or "loss" not in logs or "sfa_round" in logs:
            return
        entry = self.selector.metrics()
        if self._logged == self.selector.round:  # no pick since the last log
            entry = {k: v for k, v in entry.items() if k in ("sfa_round", "sfa_selected")}
        self._logged = self.selector.round
        logs.update(entry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entry)

    def _show_progress(self) -> None:
        """Write round and share on the Trainer's progress bar, where it has one."""
        if self.selector is None or self._shown == self.selector.round:
            return
        self._shown = self.selector.round
        for callback in self._first.others():
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.set_postfix(self.selector.progress, refresh=False)

    def _write_early(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        if control.should_save and not state.is_hyper_param_search:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.selector is None or self.selector.pool is None or args.save_only_model:
            return
        self._written_at = state.global_step
        selector_state = self.selector.state_dict()  # all ranks add their sums
        if state.is_world_process_zero:
            write_state(selector_state, Path(str(args.output_dir)), state.global_step)


class _BeforeReporters(TrainerCallback):
    """Stands first among the callbacks of a run and lets its owner add to logs.

    The Trainer calls its reporters (TensorBoard and others) before the callbacks that it is given.

    Args:
        owner: Adds to logs.
    """

    def __init__(self, owner: SFACallback) -> None:
        self._owner = owner
        self._handler: Any = None

    def join(self, trainer: Any) -> None:
        """Take the first place in a Trainer's callbacks; do nothing without one."""
        self.leave()
        if trainer is not None:
            self._handler = trainer.callback_handler
            # A new list: the present event goes on over the old one.
            self._handler.callbacks = [self, *self._handler.callbacks]

    def leave(self) -> None:
        """Give the place back."""
        if self._handler is not None:
            self._handler.callbacks = self.others()
            self._handler = None

    def others(self) -> list[TrainerCallback]:
        """Return the other callbacks of the run."""
        return [c for c in self._handler.callbacks if c is not self] if self._handler else []

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the owner add to a log."""
        self._owner.add_to_log(state, kwargs.get("logs"))


def _calling_trainer() -> Any:
    """Return the Trainer whose event is handled; None if something else calls.

    Events bring the model, the optimizer and more, but neither the Trainer nor its callbacks. So it
    is looked up among the callers.
    """
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(getattr(caller, "callback_handler", None), CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _warn_of_summed_loss(args: TrainingArguments, model: Any, trainer: Any) -> None:
    """Warn where accumulated losses would be added up and not averaged (transformers #47688)."""
    micro_batches = args.gradient_accumulation_steps
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    declared = getattr(base, "accepts_loss_kwargs", None)
    if micro_batches == 1 or declared:
        return
    if trainer is None:
        parameters = inspect.signature(base.forward).parameters.values()
        is_meant = declared is None and any(p.kind is p.VAR_KEYWORD for p in parameters)
    else:
        is_meant = (
            getattr(trainer, "model_accepts_loss_kwargs", False)
            and getattr(trainer, "compute_loss_func", None) is None
            and getattr(trainer, "loss_is_scaled_for_ga", None) is None
        )
    if is_meant:
        warnings.warn(
            f"gradient_accumulation_steps={micro_batches}: the Trainer does not divide the loss by "
            f"it, because the forward of {type(base).__name__} takes **kwargs, so that it could "
            "divide by num_items_in_batch itself. Vision heads do not, and then loss and gradients "
            f"are {micro_batches} times too large. Set model.get_base_model().accepts_loss_kwargs "
            "= False before the Trainer is made (True, if the model does divide).",
            SFAWarning,
            stacklevel=2,
        )
