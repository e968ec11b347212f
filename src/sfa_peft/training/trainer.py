# SPDX-License-Identifier: Apache-2.0
"""The Trainer whose event is handled: events bring the model and more, but not the Trainer."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import LearningRateWarning, LossScaleWarning, ResumedRunWarning, warn

# `transformers.trainer` has a name for it too, but brings datasets and pandas along: 80 MB.
STATE_NAME = "trainer_state.json"


def calling_trainer() -> Any:
    """Return the Trainer among the callers; None if something else calls."""
    return next((_self_of(frame) for frame in _trainer_frames()), None)


def resumed_checkpoint() -> Path | None:
    """Return the folder that the calling Trainer resumes from; None where that is not known.

    `Trainer.train` hands it down to its loop, where True is the run's last checkpoint already.
    """
    for frame in _trainer_frames():
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    return None


def resume_from_whole(check: Callable[[Path, int], Any]) -> None:
    """Let `train(resume_from_checkpoint=True)` pass over checkpoints that are not whole.

    The Trainer takes the newest folder, and a run that was killed while it saved leaves half of
    one. To be called while the Trainer is made: no event comes before it loads a checkpoint.

    Args:
        check: Gets folder and update step; raises ValueError or OSError where a part is missing.
    """
    trainer = calling_trainer()
    if trainer is None:
        return
    train = trainer.train

    @functools.wraps(train)
    def resume(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest_whole(Path(trainer.args.output_dir), check) or True
        return train(resume_from_checkpoint, *args, **kwargs)

    trainer.train = resume


def _newest_whole(output_dir: Path, check: Callable[[Path, int], Any]) -> str | None:
    """Return the newest whole checkpoint, None where there is none; say which is left out."""
    steps = (p.name.rpartition("-")[2] for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    broken = None
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            TrainerState.load_from_json(str(folder / STATE_NAME))
            check(folder, step)
        except (OSError, TypeError, ValueError) as error:
            broken = broken or f"{folder} is not whole ({error})"
            continue
        if broken:
            warn(f"{broken}: the run resumes from {folder}.", ResumedRunWarning)
        return str(folder)
    return None


class BeforeReporters(TrainerCallback):
    """Stands first among the callbacks of a run and adds to logs.

    The Trainer calls its reporters (TensorBoard and others) before the callbacks that it is given.

    Args:
        add_to_log: Gets the Trainer's state and a log.
    """

    def __init__(self, add_to_log: Callable[[TrainerState, Any], None]) -> None:
        self._add_to_log = add_to_log
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
        """Add to a log."""
        self._add_to_log(state, kwargs.get("logs"))


def warn_of_summed_loss(args: TrainingArguments, model: Any, trainer: Any) -> None:
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
        warn(
            f"gradient_accumulation_steps={micro_batches}: the Trainer does not divide the loss by "
            f"it, because the forward of {type(base).__name__} takes **kwargs, so that it could "
            "divide by num_items_in_batch itself. Vision heads do not, and then loss and gradients "
            f"are {micro_batches} times too large. Set model.get_base_model().accepts_loss_kwargs "
            "= False before the Trainer is made (True, if the model does divide).",
            LossScaleWarning,
        )


def warn_of_default_rate(model: Any, optimizer: Any) -> None:
    """Warn where a fresh adapter would train at the rate that nobody chose, the Trainer's own."""
    default = TrainingArguments.learning_rate
    groups = getattr(optimizer, "param_groups", ())
    if not groups or any(g.get("initial_lr", g["lr"]) != default for g in groups):
        return
    changes = [p for n, p in model.named_parameters() if ".sfa_pool." in n or ".sfa_up." in n]
    if not any(bool(getattr(p, "_local_tensor", p).any()) for p in changes if p.requires_grad):
        warn(
            f"The learning rate is the Trainer's default, {default:g}, which suits a full "
            "fine-tuning; a fresh adapter hardly moves with it. Try ten to a hundred times as "
            "much: TrainingArguments(..., learning_rate=1e-3). See docs/learning-rates.md.",
            LearningRateWarning,
        )


def _trainer_frames() -> Iterator[FrameType]:
    """Go through the calls of a Trainer's methods, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(getattr(_self_of(frame), "callback_handler", None), CallbackHandler):
            yield frame
        frame = frame.f_back


def _self_of(frame: FrameType) -> Any:
    return frame.f_locals.get("self")
