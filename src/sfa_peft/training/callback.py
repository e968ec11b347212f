# SPDX-License-Identifier: Apache-2.0
"""`SFACallback`: the selector as a callback of `transformers.Trainer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ResumedRunWarning, SelectionError, warn
from ..files.folder import check_complete
from ..selection.pick import is_unfinished
from ..tuner.adapted_layers import find_pool
from .selector import SFASelector
from .state_files import move_into_checkpoints, read_state, write_state
from .trainer import (
    BeforeReporters,
    calling_trainer,
    resume_from_whole,
    resumed_checkpoint,
    warn_of_default_rate,
    warn_of_summed_loss,
)


class SFACallback(TrainerCallback):
    """Drive the selection from the Trainer's events.

    Each update step counts once, however many micro-batches it has. Training logs carry
    `sfa_round` and `sfa_selected` (the selected share of the weights to select), and the first one
    after each pick all of `SFASelector.metrics`; TensorBoard and other reporters get them too. The
    Trainer's progress bar shows round and share. A checkpoint carries the selector's state, so that
    a resumed run goes on with the same scores (but not with `save_only_model`). One Trainer drives
    one adapter; where several are to grow together, use a `SFASelector` for each in an own loop.

    Args:
        adapter_name: The adapter; None for the active one.
        resume_from_checkpoint: Folder with the selector's state, needed only where it is not the
            checkpoint that `Trainer.train` resumes from.
    """

    def __init__(
        self,
        adapter_name: str | None = None,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self.adapter_name = adapter_name
        self.resume_from_checkpoint = resume_from_checkpoint
        self.selector: SFASelector | None = None
        self._is_training = False
        self._written_at: int | None = None  # update step
        self._first = BeforeReporters(self.add_to_log)
        self._logged = self._shown = 0  # rounds

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the Trainer resume from the newest checkpoint that is whole.

        A run that was killed while it saved leaves half a checkpoint, which the Trainer would take.
        """
        selects = any(".sfa_pool." in name for name, _ in kwargs["model"].named_parameters())

        def check(folder: Path, step: int) -> None:
            check_complete(folder)
            if selects and not args.save_only_model:
                read_state(folder, step)

        resume_from_whole(check)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the rounds of the run; on resuming take up its state.

        Raises:
            SelectionError: If the checkpoint has no state of the selector, or other settings; if
                the adapter comes from the middle of a run and no checkpoint is resumed; or if
                the Trainer has two of these callbacks.
        """
        self._written_at = None
        trainer = calling_trainer()
        _refuse_second_callback(trainer)
        warn_of_summed_loss(args, kwargs["model"], trainer)
        if state.global_step == 0:
            warn_of_default_rate(kwargs["model"], kwargs.get("optimizer"))
        if not self._begins_again(state, kwargs["model"]):
            self._begin(state, **kwargs)
        self._is_training = True
        self._logged, self._shown = self.selector.round if self.selector else 0, 0
        self._first.join(trainer)

    def _begin(
        self,
        state: TrainerState,
        model: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_kwargs: Any,
    ) -> None:
        if self.selector is not None:
            self.selector.discard()  # it may be what the memory ran out of
        self.selector = SFASelector(
            model,
            total_steps=state.max_steps,
            adapter_name=self.adapter_name,
            scaler=getattr(optimizer, "scaler", None),
            lr_scheduler=lr_scheduler,
        )
        pool = self.selector.pool
        if pool is None:  # rho=1 selects nothing
            return
        if state.global_step > 0:
            given = self.resume_from_checkpoint
            folder = resumed_checkpoint() if given is None else Path(given)
            self.selector.load_state_dict(read_state(folder, state.global_step))
        elif not pool.is_empty and is_unfinished(pool, self.selector.config.rules):
            raise SelectionError(
                f"Adapter `{pool.adapter_name}` comes from an unfinished run "
                f"({self.selector.selected} of {pool.size} weights are selected), but no "
                "checkpoint is resumed, so the rest cannot be selected. Give it: "
                "trainer.train(resume_from_checkpoint=...). To train the adapter as it is, leave "
                "SFACallback out."
            )

    def _begins_again(self, state: TrainerState, model: Any) -> bool:
        """Whether the Trainer starts anew before it has ended, as under auto_find_batch_size.

        It keeps model and optimizer then, so the selection goes on where it was, too.
        """
        selector = self.selector
        if state.global_step > 0 or not self._is_training or selector is None:
            return False
        pool = find_pool(model, selector.adapter_name)
        if not selector.drives or pool is None or pool is not selector.pool or pool.is_empty:
            return False
        warn(
            f"Training starts again at step 0 with {selector.selected} weights selected. The "
            f"selection goes on where it was, after {selector.update_steps} update steps.",
            ResumedRunWarning,
        )
        return True

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
        self._is_training = False
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


def _refuse_second_callback(trainer: Any) -> None:
    """Refuse two of these callbacks in a Trainer: checkpoints and logs hold one selection."""
    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    found = [c for c in callbacks if isinstance(c, SFACallback)]
    if len(found) > 1:
        raise SelectionError(
            f"The Trainer has {len(found)} SFACallbacks, of adapters "
            f"{[c.adapter_name for c in found]}, but its checkpoints and logs have room for one. "
            "Pass one, and train adapters one after the other; to train several together, use an "
            "own loop with an SFASelector for each."
        )
