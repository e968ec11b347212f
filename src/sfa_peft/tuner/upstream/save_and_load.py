# SPDX-License-Identifier: Apache-2.0
"""Around PEFT's reading and writing of files: all or nothing, and checked, for SFA adapters.

PEFT writes tensors in place, reads them without a checksum, and injects an adapter before it knows
that its tensors fit. It has no hook at these places, so its own functions get ours around them.
Adapters of other methods pass through untouched.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import peft.peft_model
import peft.utils.save_and_load
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, set_peft_model_state_dict
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modelcard import TrainingSummary
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from ...config import SFAConfig
from ...errors import AdapterFileError, SFAError
from ...files.adapter_config import read_config
from ...files.folder import CHECKSUM, already_read, read_adapter, reading_once, write_tensors
from ..adapted_layers import refuse_offloaded_weights
from ..external import AdaptedLayer
from .failed_load import unchanged_on_error
from .model_cards import summary_with_section, upload_with_section
from .peft_type import NAME
from .shape_check import Load, asked
from .task_heads import heads_as_here

_MARK = "_sfa_peft"
#: What reading a file that is damaged or not there ends in.
_READING = (SafetensorError, OSError, EOFError, pickle.UnpicklingError, HFValidationError)
#: In torch's own error about a damaged `.bin`, which is of no type of its own.
_TORCH = "PytorchStreamReader"

#: Bytes in which a config or the header of a tensors' file says whose it is.
_HEAD = 1 << 22
_TYPE = re.compile(rf'"peft_type"\s*:\s*"{NAME}"'.encode())
# More than any adapter's config has.
_MOST_UNKNOWN = 100  # fields, of later versions
_MOST_NAMES = 10_000  # in a list


def install() -> None:
    """Put the functions around PEFT's; safe to call again."""
    for holder, name, around in (
        (peft.peft_model, "safe_save_file", _write),
        (peft.utils.save_and_load, "safe_load_file", _read),
        (peft.peft_model, "set_peft_model_state_dict", _fill),
        (PeftConfigMixin, "from_json_file", _read_config),
        (PeftModel, "load_adapter", _load_adapter),
        (PeftModel, "from_pretrained", _from_pretrained),
        (PreTrainedModel, "save_pretrained", _save_model),
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
    if already_read(filename) is None:
        with safe_open(filename, framework="pt") as file:
            metadata = file.metadata() or {}
        if CHECKSUM not in metadata:
            return original(filename, *args, **kwargs)
    device = inspect.signature(original).bind(filename, *args, **kwargs).arguments.get("device")
    found = read_adapter(filename).tensors
    # A selection is unpacked on the CPU, wherever the adapter goes.
    return {k: t if k.endswith("sfa_packed") else t.to(device or "cpu") for k, t in found.items()}


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
    with unchanged_on_error(model, adapter_name), reading_once():
        try:
            found = original(model, model_id, adapter_name, *args, **kwargs)
            refuse_offloaded_weights(model)  # PEFT offloads at the end what was so before
            return found
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
    with unchanged_on_error(model, adapter_name), reading_once():
        return original(cls, model, model_id, adapter_name, *args, **kwargs)


def _save_model(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what no class could load: tensors of other names would be initialised at random."""
    found = next((n for n, m in model.named_modules() if isinstance(m, AdaptedLayer)), None)
    if found is not None:
        raise SFAError(
            f"`{found}` has an external adapter behind it that was merged, for which "
            f"{type(model).__name__} has no place: from_pretrained would leave the layer at random "
            "values. Save the adapter instead, with save_pretrained of the PeftModel before "
            "merge_and_unload(), and merge after loading: PeftModel.from_pretrained(base, "
            "folder).merge_and_unload(). Or save the model as it is with torch.save(model, path)."
        )
    return original(model, *args, **kwargs)


def _read_config(
    original: Callable[..., Any], cls: Any, path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Go around `PeftConfig.from_json_file`, which trusts what it reads."""
    if not _is_ours(Path(path)):
        return original(cls, path, *args, **kwargs)
    fields = read_config(path)
    fields.pop("runtime_config", None)  # PEFT drops it, too: it is of the run that wrote it
    known = {f.name for f in dataclasses.fields(SFAConfig)}
    lists = [value for value in fields.values() if isinstance(value, list)]
    try:
        if fields.get("peft_type") != NAME:
            raise ValueError(f"peft_type {shown(fields.get('peft_type'))}, its tensors are SFA's.")
        if len(fields.keys() - known) > _MOST_UNKNOWN or any(len(v) > _MOST_NAMES for v in lists):
            raise ValueError("more fields or names than an adapter's config has.")
        SFAConfig(**{name: value for name, value in fields.items() if name in known})
        _check_texts(fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path}: {error} Save the adapter again.") from error
    return fields


def _check_texts(fields: dict[str, Any]) -> None:
    """Check what the config, PEFT and the model card take as it is (TypeError)."""
    texts = {n: fields.get(n) for n in ("base_model_name_or_path", "revision", "score")}
    texts |= fields.get("auto_mapping") or {}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name}: expected text, got {shown(text)}.")


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
    """Whether an adapter is of this method, by its config or, if that is damaged, its tensors."""
    with suppress(OSError), config.open("rb") as file:
        if _TYPE.search(file.read(_HEAD)):
            return True
        with (config.parent / SAFETENSORS_WEIGHTS_NAME).open("rb") as tensors:
            header = int.from_bytes(tensors.read(8), "little")
            return b".sfa_" in tensors.read(min(header, _HEAD))
    return False
