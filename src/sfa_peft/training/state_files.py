# SPDX-License-Identifier: Apache-2.0
"""The selector's state in the checkpoints of a Trainer run: written whole, read with care.

`sfa_selector.pt` is a file of `torch.save`, then eight bytes `SFASTATE` and the CRC-32 (that of
zlib, little-endian) of all before it. `torch.load` reads it all the same.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import SelectionError
from ..files.folder import replacing

#: File of the selector's state in a Trainer checkpoint.
STATE_NAME = "sfa_selector.pt"

_MARK = b"SFASTATE"
_SEAL = len(_MARK) + 4
_CHUNK = 1 << 24  # bytes
_MOST_STEPS = 1 << 48  # and weights
_BEFORE = "Resume from the checkpoint before."


def write_state(state: dict[str, Any], output_dir: Path, step: int) -> None:
    """Write a state beside the checkpoints, so that a half-written one is never the last."""
    path = _beside(output_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        with partial.open("wb") as file:  # given a path, torch writes its name into the file
            torch.save(state, file)
        seal = _MARK + _crc(partial, partial.stat().st_size).to_bytes(4, "little")
        with partial.open("ab") as file:
            file.write(seal)


def move_into_checkpoints(output_dir: Path) -> None:
    """Put states that lie beside their checkpoints into them, those of a killed run too."""
    for path in output_dir.glob(f"{Path(STATE_NAME).stem}-*.pt"):
        step = path.stem.rpartition("-")[2]
        folder = _checkpoint(output_dir, int(step)) if step.isdecimal() else None
        if folder is not None and folder.is_dir():
            path.replace(folder / STATE_NAME)
        elif folder is not None:
            path.unlink()


def read_state(folder: Path | None, step: int) -> dict[str, Any]:
    """Return the state of a checkpoint, byte for byte as it was written.

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
        _check_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many kinds
        raise SelectionError(f"{path}: cut short or damaged ({error}). {_BEFORE}") from error


def check_state(state: Any, shapes: Mapping[str, torch.Size], settings: Collection[str]) -> None:
    """Check that a selector's state does not contradict itself or the model.

    Args:
        state: What `SFASelector.state_dict` returned once, and what may have become of it.
        shapes: Of the weights that may be selected, by name.
        settings: Names of the settings that a state keeps.

    Raises:
        SelectionError: Naming the part that cannot be.
    """
    try:
        _check_pool(state["pool"]["slots"], state["pool"]["values"])
        if "update_steps" in state:
            if state["settings"].keys() != set(settings):
                raise ValueError("other settings")
            _check_picks(state, state["pool"]["slots"])
            _check_scores(state, shapes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SelectionError(
            f"The selector's state is damaged ({type(error).__name__}: {error}). {_BEFORE}"
        ) from error


def _checkpoint(output_dir: Path, step: int) -> Path:
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _beside(output_dir: Path, step: int) -> Path:
    """Return where the state lies until the rest of its checkpoint is written."""
    return output_dir / f"{Path(STATE_NAME).stem}-{step}.pt"


# --- the file --------------------------------------------------------------------------------


def _crc(path: Path, nbytes: int) -> int:
    """Return the CRC-32 of the first bytes of a file."""
    found = 0
    with path.open("rb") as file:
        while nbytes > 0 and (chunk := file.read(min(nbytes, _CHUNK))):
            found, nbytes = zlib.crc32(chunk, found), nbytes - len(chunk)
    return found


def _check_file(path: Path) -> None:
    """Check a state's file before its bytes are unpickled (ValueError)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _SEAL))
        seal = file.read()
    if seal[: len(_MARK)] != _MARK:
        raise ValueError("its checksum is missing")
    if seal[len(_MARK) :] != _crc(path, size - _SEAL).to_bytes(4, "little"):
        raise ValueError("its checksum does not match")
    with zipfile.ZipFile(path) as archive:  # torch stores and never packs: nothing expands
        entries = archive.infolist()
    packed = any(entry.file_size != entry.compress_size for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it would expand")


# --- what it says ----------------------------------------------------------------------------


def _check_pool(slots: Any, values: Any) -> None:
    _check_tensor("positions", slots, floats=False)
    _check_tensor("values", values, shape=slots.shape)
    used = int((slots >= 0).sum())
    if slots.ndim != 1 or bool((slots[:used] < 0).any()) or bool((slots[used:] != -1).any()):
        raise ValueError("positions have gaps")
    if slots[:used].unique().numel() != used:
        raise ValueError("positions repeat")


def _check_picks(state: Mapping[str, Any], slots: Tensor) -> None:
    picks = list(state["joined"])
    least = [state[name] - 1 for name in ("total_steps", "selection_steps", "num_processes")]
    numbers = [*least, state["update_steps"], *chain(*picks)]
    if any(type(number) is not int or not 0 <= number < _MOST_STEPS for number in numbers):
        raise TypeError("a number of steps, processes or weights is none")
    edges = [0, *(last for _, last, _ in picks)]
    if [first for first, _, _ in picks] != edges[:-1] or edges[-1] != int((slots >= 0).sum()):
        raise ValueError("its picks are not of its positions")
    steps = [0, *(step for _, _, step in picks), state["update_steps"] + 1]
    if any(a >= b for a, b in (*pairwise(edges), *pairwise(steps))):
        raise ValueError("its picks are out of order")
    if any(bool((slots[a:b].diff() <= 0).any()) for a, b in pairwise(edges)):
        raise ValueError("positions of a pick are out of order")


def _check_scores(state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    plain, late = [*state["settings"].values()], state["late_entries"]
    if late is not None:
        plain += [*late["verdicts"].values(), late["watching"]]
    if not all(value is None or isinstance(value, (str, int, float)) for value in plain):
        raise TypeError("a setting is none")
    until = state["settings"].get("select_until")  # taken from here where the config leaves it open
    if until is not None and not (type(until) in (int, float) and 0 < until <= 1):
        raise ValueError("select_until is no share of the run")
    for name, sums in state["sums"].items():
        _check_tensor(f"sums of `{name}`", sums, shape=shapes.get(name))
        if type(state["num_added"][name]) is not int:
            raise TypeError(f"number of gradients in the sums of `{name}`")
    moments = (state["candidates"] or {}).get("state", {})
    for ordinal, moment in moments.items():
        for name, found in moment.items():
            if isinstance(found, Tensor):
                floats = found.is_floating_point()
                _check_tensor(f"{name} of candidate {ordinal}", found, floats=floats)


def _check_tensor(
    what: str, tensor: Any, *, shape: torch.Size | None = None, floats: bool = True
) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() != floats:
        raise TypeError(f"{what}: expected {'floats' if floats else 'integers'}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{what}: expected shape {list(shape)}, got {list(tensor.shape)}")
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if shape is None and tensor.numel() > stored:  # forged: it claims more than it stores
        raise ValueError(f"{what}: {tensor.numel()} entries out of {stored}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what}: NaN or infinite")
