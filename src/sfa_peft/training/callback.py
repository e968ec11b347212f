# SPDX-License-Identifier: Apache-2.0
"""`SFACallback`: the selector as a callback of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import SelectionError
from .selector import SFASelector

#: File of the selector's state in a Trainer checkpoint.
STATE_NAME = "sfa_selector.pt"


class SFACallback(TrainerCallback):
    """Drive the selection from the Trainer's events.

    Each update step counts once, however many micro-batches it has. Logs carry `sfa_round` and
    `sfa_selected` (the selected share of the weights to select). A checkpoint carries the
    selector's state, so that a resumed run goes on with the same scores.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the rounds of the run; on resuming take up its state."""
        self._written_at = None
        self.selector = SFASelector(
            kwargs["model"],
            total_steps=state.max_steps,
            adapter_name=self.adapter_name,
            scaler=getattr(kwargs.get("optimizer"), "scaler", None),
        )
        if state.global_step > 0:
            _resume(self.selector, self.resume_from_checkpoint, args, state.global_step)

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
        if self.selector is not None:
            self.selector.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the selector's state: the Trainer deletes older checkpoints before `on_save`."""
        self._write_early(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the selector's state, where epochs are saved."""
        self._write_early(args, state, control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add round and selected share to a training log."""
        logs = kwargs.get("logs")
        if (
            self.selector is None
            or self.selector.schedule is None
            or not logs
            or "loss" not in logs
        ):
            return
        entry = {"sfa_round": self.selector.round, "sfa_selected": self.selector.selected_share}
        logs.update(entry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entry)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the selector's state into the checkpoint."""
        if state.is_hyper_param_search:
            return
        if self._written_at != state.global_step:  # not foreseen at the end of the step
            self._write(args, state)
        if state.is_world_process_zero:
            _move_into_checkpoints(Path(str(args.output_dir)))

    def _write_early(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        if control.should_save and not state.is_hyper_param_search:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the state beside the checkpoints, so that a half-written one is never the last."""
        if self.selector is None or self.selector.pool is None:
            return
        self._written_at = state.global_step
        selector_state = self.selector.state_dict()  # all ranks add their sums
        if state.is_world_process_zero:
            path = _beside(args, state.global_step)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(selector_state, partial)
            partial.replace(path)


def _resume(selector: SFASelector, folder: str | None, args: TrainingArguments, step: int) -> None:
    """Take up the state of a checkpoint (rho=1 has none: there is nothing to select)."""
    path = (Path(folder) if folder else _checkpoint(args, step)) / STATE_NAME
    if selector.pool is None:
        return
    if not path.is_file() and not folder and _beside(args, step).is_file():
        path = _beside(args, step)  # the run ended before it was moved
    if not path.is_file():
        raise SelectionError(
            f"Cannot resume the selection at step {step}: {path} is missing. If the run ended "
            "while it wrote that checkpoint, delete the folder and resume from the one before. If "
            "the checkpoint lies elsewhere, give its folder: "
            "SFACallback(resume_from_checkpoint=...)."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise SelectionError(
            f"{path}: cut short or damaged ({error}). Resume from the checkpoint before."
        ) from error
    selector.load_state_dict(state)


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _move_into_checkpoints(output_dir: Path) -> None:
    """Put states that lie beside their checkpoints into them, those of a killed run too."""
    for path in output_dir.glob(f"{Path(STATE_NAME).stem}-*.pt"):
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{path.stem.rpartition('-')[2]}"
        if folder.is_dir():
            path.replace(folder / STATE_NAME)
        else:
            path.unlink()


def _beside(args: TrainingArguments, step: int) -> Path:
    """Return where the state lies until the rest of its checkpoint is written."""
    return Path(str(args.output_dir)) / f"{Path(STATE_NAME).stem}-{step}.pt"
