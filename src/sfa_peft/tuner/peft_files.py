# SPDX-License-Identifier: Apache-2.0
"""Around PEFT's reading and writing of files: all or nothing, and checked, for SFA adapters.

PEFT writes tensors in place, reads them without a checksum, and copies them into the model one by
one until one does not fit. It has no hook at these three places, so its `peft_model` module gets
functions around its own. Adapters of other methods pass through untouched.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from ..checkpoint.contents import write_tensors
from ..checkpoint.file import check_complete
from ..config import SFAConfig
from ..errors import AdapterFileError
from .registration import NAME
from .renamed_heads import heads_as_here

_MARK = "_sfa_peft"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Load:
    """What is asked of tensors that go into a model.

    Attributes:
        whole: They are all of an adapter's file, so none may be missing.
        ignore_sizes: Those of a head that have no place or another shape are left out.
    """

    whole: bool = False
    ignore_sizes: bool = False


#: PEFT hands none of this on to the tuner.
_load: ContextVar[Load] = ContextVar("sfa_load", default=Load())  # noqa: B039 (frozen)


def install() -> None:
    """Put the functions around PEFT's; safe to call again."""
    for name, around in (
        ("safe_save_file", _write),
        ("load_peft_weights", _read),
        ("set_peft_model_state_dict", _fill),
    ):
        original = getattr(peft.peft_model, name)
        if not hasattr(original, _MARK):
            wrapper = functools.wraps(original)(functools.partial(around, original))
            setattr(wrapper, _MARK, True)
            setattr(peft.peft_model, name, wrapper)


def check_fits(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Check that the tensors of a file have their place in a model, before the first is copied.

    Args:
        model: The model with the adapter; it stays as it is.
        adapter_name: The adapter.
        state: Tensors by key, as the model names them.

    Raises:
        AdapterFileError: Naming the first tensor that is missing, has no place, has another shape,
            or holds NaN or infinite values.
    """
    load = _load.get()
    here = {n.removeprefix(_PREFIX): t for n, t in model.named_parameters(remove_duplicate=False)}
    here |= {n.removeprefix(_PREFIX): t for n, t in model.named_buffers(remove_duplicate=False)}
    found = {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}
    for key, tensor in found.items():
        own = ".sfa_" in key
        if key not in here and (own or not load.ignore_sizes):
            raise AdapterFileError(
                f"`{key}` is in the file of adapter `{adapter_name}`, but has no place here: other "
                "model, or its config was edited. Load it with the config it was saved with."
            )
        if key in here and (own or not load.ignore_sizes):
            _check_shape(key, adapter_name, tensor, here[key])
        if tensor.is_floating_point() and not tensor.is_meta:
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


def _check_shape(key: str, adapter_name: str, tensor: Tensor, place: Tensor) -> None:
    if tensor.shape != place.shape:
        raise AdapterFileError(
            f"`{key}` has shape {list(place.shape)} here, but {list(tensor.shape)} in the file of "
            f"adapter `{adapter_name}`. Load it onto the model (and head) it was trained on, or "
            "pass ignore_mismatched_sizes=True to start a head of another size anew."
        )


def _check_finite(key: str, adapter_name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterFileError(
            f"`{key}` of adapter `{adapter_name}` holds NaN or infinite values: damaged, or the "
            "training diverged. Use an earlier checkpoint."
        )


def _write(
    original: Callable[..., Any],
    tensors: dict[str, Tensor],
    filename: Any,
    metadata: dict[str, str] | None = None,
) -> Any:
    if not any(".sfa_" in key for key in tensors):
        return original(tensors, filename, metadata=metadata)
    return write_tensors(tensors, filename, metadata or {})


def _read(original: Callable[..., Any], model_id: Any, *args: Any, **kwargs: Any) -> Any:
    folder = Path(model_id, kwargs.get("subfolder") or "")
    if _is_ours(folder):
        check_complete(folder)
    return original(model_id, *args, **kwargs)


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == NAME


def _fill(
    original: Callable[..., Any],
    model: Any,
    state: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    if not isinstance(model.peft_config.get(adapter_name), SFAConfig):
        return original(model, state, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)
    state = heads_as_here(model, adapter_name, state)
    token = _load.set(Load(whole=True, ignore_sizes=ignore_mismatched_sizes))
    try:
        result = original(model, state, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)
    except KeyError as error:  # PEFT looks up the tensors of a head without asking
        _forget(model, adapter_name)
        raise AdapterFileError(
            f"{error} of adapter `{adapter_name}` is not in its file, though modules_to_save names "
            "it: damaged, or the config was edited. Restore what save_pretrained wrote."
        ) from error
    except Exception:
        _forget(model, adapter_name)
        raise
    finally:
        _load.reset(token)
    mark_filled(model, adapter_name)
    return result


def mark_filled(model: PeftModel, adapter_name: str) -> None:
    """Say that an adapter has got its tensors: a failed load under its name leaves it alone."""
    tuner: Any = model.base_model
    tuner.unfilled.discard(adapter_name)


def _forget(model: PeftModel, adapter_name: str) -> None:
    """Take out an adapter whose first load failed; one that was there before stays."""
    tuner: Any = model.base_model
    if adapter_name not in tuner.unfilled:
        return
    tuner.unfilled.discard(adapter_name)
    if len(model.peft_config) == 1:
        tuner.unload()  # the model around which `PeftModel.from_pretrained` was asked for
    else:
        model.delete_adapter(adapter_name)
