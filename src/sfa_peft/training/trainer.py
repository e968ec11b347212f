# SPDX-License-Identifier: Apache-2.0
"""The Trainer whose event is handled: events bring the model and more, but not the Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers.trainer_callback import CallbackHandler


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


def _trainer_frames() -> Iterator[FrameType]:
    """Go through the calls of a Trainer's methods, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(getattr(_self_of(frame), "callback_handler", None), CallbackHandler):
            yield frame
        frame = frame.f_back


def _self_of(frame: FrameType) -> Any:
    return frame.f_locals.get("self")
