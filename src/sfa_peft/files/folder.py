# SPDX-License-Identifier: Apache-2.0
"""What an adapter folder holds, and the checks that it is whole and fits before it is used.

`adapter_model.safetensors` holds external adapters and head under their module paths, and on the
first adapted layer the selection: packed into one tensor of bytes, `sfa_packed` (see `packing`).
Files of the first two versions hold it as two tensors of equal length: `sfa_pool` (float values of
the change) and `sfa_slots` (position of each value, -1 for a value not assigned yet). A position
counts the entries of the tensors listed in `adapter_config.json` under `resolved.tensors`, one
after the other, each in C order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterFileError
from .container import read_info
from .contents import check_contents
from .manifest import split_manifest

WEIGHTS_NAME = "adapter_model.safetensors"


def check_complete(folder: str | Path) -> None:
    """Check that the tensors' file of a local adapter folder is whole.

    Checksums, of all tensors and of the packed selection, must hold.

    Args:
        folder: The adapter folder; nothing is checked where it has no safetensors file.

    Raises:
        AdapterFileError: If the header is damaged, the file is shorter or longer than it says, or
            its tensors are not those that were written.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as tensors:
            keys = list(tensors.keys())
            packed = {k: tensors.get_tensor(k) for k in keys if k.endswith("sfa_packed")}
            check_contents(path, tensors.metadata(), keys, tensors.get_tensor)
    except AdapterFileError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: cut short or damaged ({error}; {path.stat().st_size} bytes). Copy or save "
            "the adapter again."
        ) from error
    for key, blob in packed.items():
        if blob.dtype != torch.uint8 or blob.ndim != 1:
            raise AdapterFileError(
                f"{path}: {key}: expected flat bytes, got {blob.dtype} {list(blob.shape)}. Save "
                "the adapter again."
            )
        data, _ = split_manifest(blob.numpy().tobytes(), f"{path}: {key}")
        read_info(data, where=f"{path}: {key}")


def check_tensors(
    saved: Sequence[tuple[str, Sequence[int]]], found: Mapping[str, Sequence[int]]
) -> None:
    """Check that every tensor of a saved adapter is in the model, with the shape it had.

    Args:
        saved: (full name, shape) of the tensors that stored positions refer to.
        found: Shapes of the model's parameters, by full name.

    Raises:
        AdapterFileError: Naming the first tensor that differs.
    """
    for name, shape in saved:
        if name not in found:
            raise AdapterFileError(
                f"Adapter of another model? It changes `{name}`, which this model does not have. "
                "Load it onto the model (and head) it was trained on; where that is this one, use "
                "the major version of transformers that it was saved with, since names changed."
            )
        if list(found[name]) != list(shape):
            raise AdapterFileError(
                f"Adapter of another model? `{name}` has shape {list(found[name])} here, the "
                f"adapter was trained on {list(shape)}. Load it onto the model it was trained on."
            )


def check_selection(name: str, slots: Tensor, values: Tensor, num_weights: int) -> None:
    """Check the two tensors of a saved selection against each other and the model.

    Args:
        name: Where they were found, for the message.
        slots: Positions, int32 or int64, -1 only at the end.
        values: Values of the change, one per position.
        num_weights: Number of eligible weights in the model.

    Raises:
        AdapterFileError: If lengths, type, range, order or values are wrong.
    """
    if (
        slots.dtype not in (torch.int32, torch.int64)
        or slots.ndim != 1
        or values.shape != slots.shape
    ):
        raise AdapterFileError(
            f"{name}: expected two flat tensors of one length, positions integers; got "
            f"{slots.dtype} {list(slots.shape)} and {values.dtype} {list(values.shape)}."
        )
    assigned = int((slots >= 0).sum())
    used = slots[:assigned]
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= num_weights):
        raise AdapterFileError(
            f"{name}: position {int(slots.max())} (lowest {int(slots.min())}) but the model has "
            f"{num_weights} eligible weights; adapter of another model?"
        )
    if bool((used < 0).any()) or used.unique().numel() != assigned:
        raise AdapterFileError(f"{name}: positions repeat or have gaps; the file is damaged.")
    if not bool(torch.isfinite(values).all()):
        raise AdapterFileError(f"{name}: values are NaN or infinite; the file is damaged.")
