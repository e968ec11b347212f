# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a file have their place in a model, asked before the first is copied."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import AdapterFileError

_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Load:
    """What is asked of tensors that go into a model.

    Attributes:
        whole: They are all of an adapter's file, so none may be missing and none be left over.
        ignore_sizes: Those of a head that have no place or another shape are left out.
    """

    whole: bool = False
    ignore_sizes: bool = False


#: PEFT hands none of this on to the tuner.
asked: ContextVar[Load] = ContextVar("sfa_load", default=Load())  # noqa: B039 (frozen)


def check_fits(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Check the tensors of a file against the places that a model has for them.

    Args:
        model: The model with the adapter; it stays as it is.
        adapter_name: The adapter.
        state: Tensors by key, as the model names them.

    Raises:
        AdapterFileError: Naming the first tensor that is missing, has no place, another shape or
            another kind of numbers, or is part of the adapter and holds NaN or infinite values.
    """
    load = asked.get()
    here = {n.removeprefix(_PREFIX): t for n, t in model.named_parameters(remove_duplicate=False)}
    here |= {n.removeprefix(_PREFIX): t for n, t in model.named_buffers(remove_duplicate=False)}
    found = {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}
    for key, tensor in found.items():
        own = ".sfa_" in key
        if own or not load.ignore_sizes:
            foreign = load.whole and not own and f".modules_to_save.{adapter_name}." not in key
            _check_place(key, adapter_name, tensor, None if foreign else here.get(key))
        if own and not tensor.is_meta and tensor.is_floating_point():
            _check_finite(key, adapter_name, tensor)
    for key in here if load.whole else ():
        if ".sfa_" in key and _is_of(key, adapter_name) and key not in found:
            raise AdapterFileError(
                f"`{key}` of adapter `{adapter_name}` is not in its file: damaged, or the config "
                "was edited. Restore what save_pretrained wrote."
            )


def _is_of(key: str, adapter_name: str) -> bool:
    kind, _, after = key.rpartition(".sfa_")[2].partition(".")
    ours = after == adapter_name or after.startswith(f"{adapter_name}.")
    return ours and kind != "packed"  # room for a loader that unpacks later


def _check_place(key: str, adapter_name: str, tensor: Tensor, place: Tensor | None) -> None:
    if place is None:
        raise AdapterFileError(
            f"`{key}` is in the file of adapter `{adapter_name}`, but has no place here: other "
            "model, or its config was edited. Load it with the config it was saved with."
        )
    if tensor.shape != place.shape:
        raise AdapterFileError(
            f"`{key}` has shape {list(place.shape)} here, but {list(tensor.shape)} in the file of "
            f"adapter `{adapter_name}`. Load it onto the model (and head) it was trained on, or "
            "pass ignore_mismatched_sizes=True to start a head of another size anew."
        )
    floats = place.is_floating_point()
    if tensor.is_floating_point() != floats or (floats and tensor.dtype not in _FLOATS):
        raise AdapterFileError(
            f"`{key}` holds {place.dtype} here, but {tensor.dtype} in the file of adapter "
            f"`{adapter_name}`: damaged, or written by another program. Save the adapter again."
        )


def _check_finite(key: str, adapter_name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterFileError(
            f"`{key}` of adapter `{adapter_name}` holds NaN or infinite values: damaged, or the "
            "training diverged. Use an earlier checkpoint."
        )
