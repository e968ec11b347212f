# SPDX-License-Identifier: Apache-2.0
"""Around PEFT's reading and writing of files: all or nothing, and checked, for SFA adapters.

PEFT writes tensors in place, reads them without a checksum, and injects an adapter before it knows
that its tensors fit. It has no hook at these places, so its own functions get ours around them.
Adapters of other methods pass through untouched.
"""

from __future__ import annotations

import functools
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import peft.utils.save_and_load
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modelcard import TrainingSummary
from transformers.utils.hub import PushToHubMixin

from ...config import SFAConfig
from ...errors import AdapterFileError
from ...files.folder import CHECKSUM, check_contents, write_tensors
from .cards import summary_with_section, upload_with_section
from .fits import Load, asked
from .peft_type import NAME
from .renamed_heads import heads_as_here
from .rollback import unchanged_on_error

_MARK = "_sfa_peft"
#: What reading a file that is damaged or not there ends in.
_READING = (SafetensorError, OSError, EOFError, pickle.UnpicklingError, HFValidationError)
#: In torch's own error about a damaged `.bin`, which is of no type of its own.
_TORCH = "PytorchStreamReader"


def install() -> None:
    """Put the functions around PEFT's; safe to call again."""
    for holder, name, around in (
        (peft.peft_model, "safe_save_file", _write),
        (peft.utils.save_and_load, "safe_load_file", _read),
        (peft.peft_model, "set_peft_model_state_dict", _fill),
        (PeftModel, "load_adapter", _load_adapter),
        (PeftModel, "from_pretrained", _from_pretrained),
        (TrainingSummary, "from_trainer", summary_with_section),
        (PushToHubMixin, "_upload_modified_files", upload_with_section),
    ):
        original = inspect.getattr_static(holder, name)
        in_class = isinstance(original, classmethod)
        function = original.__func__ if in_class else original
        if not hasattr(function, _MARK):
            wrapper = _wrapped(function, around)
            setattr(holder, name, classmethod(wrapper) if in_class else wrapper)


def _wrapped(function: Callable[..., Any], around: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def fill_adapter(model: PeftModel, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Copy all tensors of an adapter into a model, or none.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        state: Its tensors by key as in a file; none may be missing.

    Raises:
        AdapterFileError: If one is missing, is left over or does not fit.
    """
    _fill(set_peft_model_state_dict, model, state, adapter_name=adapter_name)


def _write(original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
    if not any(".sfa_" in key for key in tensors):
        return original(tensors, *args, **kwargs)
    bound = inspect.signature(original).bind(tensors, *args, **kwargs).arguments
    return write_tensors(tensors, bound["filename"], bound.get("metadata") or {})


def _read(original: Callable[..., Any], filename: Any, *args: Any, **kwargs: Any) -> Any:
    state = original(filename, *args, **kwargs)
    with safe_open(filename, framework="pt") as file:
        metadata = file.metadata()
    if CHECKSUM in (metadata or {}):
        check_contents(filename, metadata, state)
    return state


def _fill(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    model, adapter_name = given["model"], given["adapter_name"]
    if not isinstance(model.peft_config.get(adapter_name), SFAConfig):
        return original(*args, **kwargs)
    key = "peft_model_state_dict"
    given[key] = heads_as_here(model, adapter_name, given[key])
    token = asked.set(Load(whole=True, ignore_sizes=given["ignore_mismatched_sizes"]))
    try:
        return original(*bound.args, **bound.kwargs)
    except KeyError as error:  # PEFT looks up the tensors of a head without asking
        raise AdapterFileError(
            f"{error} of adapter `{adapter_name}` is not in its file, though modules_to_save names "
            "it: damaged, or the config was edited. Restore what save_pretrained wrote."
        ) from error
    finally:
        asked.reset(token)


def _load_adapter(
    original: Callable[..., Any],
    model: PeftModel,
    model_id: Any,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    _check_there(model_id, kwargs.get("subfolder"))
    with unchanged_on_error(model, adapter_name):
        try:
            return original(model, model_id, adapter_name, *args, **kwargs)
        except (*_READING, RuntimeError) as error:
            ours = isinstance(model.peft_config.get(adapter_name), SFAConfig)
            if not ours or (type(error) is RuntimeError and _TORCH not in str(error)):
                raise
            raise AdapterFileError(
                f"{model_id}: the tensors of adapter `{adapter_name}` cannot be read "
                f"({type(error).__name__}: {error}). Copy or save the adapter again."
            ) from error


def _from_pretrained(
    original: Callable[..., Any],
    cls: Any,
    model: Any,
    model_id: Any,
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> Any:
    _check_there(model_id, kwargs.get("subfolder"))
    with unchanged_on_error(model, adapter_name):
        return original(cls, model, model_id, adapter_name, *args, **kwargs)


def _check_there(model_id: Any, subfolder: str | None) -> None:
    """Refuse a local SFA adapter without tensors, which PEFT would look for on the Hub."""
    folder = Path(model_id, subfolder or "")
    if any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return
    if _is_ours(folder / CONFIG_NAME):
        raise AdapterFileError(
            f"{folder}: an SFA adapter's config, but neither {SAFETENSORS_WEIGHTS_NAME} nor "
            f"{WEIGHTS_NAME} beside it. Copy the whole folder that save_pretrained wrote."
        )


def _is_ours(config: Path) -> bool:
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("peft_type") == NAME
