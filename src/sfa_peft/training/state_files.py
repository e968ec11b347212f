# SPDX-License-Identifier: Apache-2.0
"""The selector's state in the checkpoints of a Trainer run."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import SelectionError
from ..files.folder import replacing

#: File of the selector's state in a Trainer checkpoint.
STATE_NAME = "sfa_selector.pt"


def write_state(state: dict[str, Any], output_dir: Path, step: int) -> None:
    """Write a state beside the checkpoints, so that a half-written one is never the last."""
    path = _beside(output_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        torch.save(state, partial)


def move_into_checkpoints(output_dir: Path) -> None:
    """Put states that lie beside their checkpoints into them, those of a killed run too."""
    for path in output_dir.glob(f"{Path(STATE_NAME).stem}-*.pt"):
        folder = _checkpoint(output_dir, int(path.stem.rpartition("-")[2]))
        if folder.is_dir():
            path.replace(folder / STATE_NAME)
        else:
            path.unlink()


def read_state(folder: Path | None, step: int) -> dict[str, Any]:
    """Return the state of a checkpoint.

    Args:
        folder: The checkpoint; None where it is not known.
        step: Update step of the checkpoint.

    Raises:
        SelectionError: If it is not known, missing or damaged.
    """
    if folder is None:
        raise SelectionError(
            f"Cannot resume the selection at step {step}: the folder of the checkpoint is not "
            "known, because no transformers.Trainer was told to resume from one. Give it: "
            "SFACallback(resume_from_checkpoint=...)."
        )
    path, beside = folder / STATE_NAME, _beside(folder.parent, step)
    if not path.is_file() and folder.name == _checkpoint(folder, step).name and beside.is_file():
        path = beside  # the run ended before it was moved
    if not path.is_file():
        raise SelectionError(
            f"Cannot resume the selection at step {step}: {path} is missing. If the run ended "
            "while it wrote that checkpoint, delete the folder and resume from the one before. If "
            "the state lies in another folder, give that: "
            "SFACallback(resume_from_checkpoint=...). Checkpoints of save_only_model=True have "
            "none."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise SelectionError(
            f"{path}: cut short or damaged ({error}). Resume from the checkpoint before."
        ) from error


def _checkpoint(output_dir: Path, step: int) -> Path:
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _beside(output_dir: Path, step: int) -> Path:
    """Return where the state lies until the rest of its checkpoint is written."""
    return output_dir / f"{Path(STATE_NAME).stem}-{step}.pt"
