# SPDX-License-Identifier: Apache-2.0
"""A saved task becomes its model again: to predict, to be checked, merged or written otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from ..config import SFAConfig
from ..errors import AdapterFileError, ConfigError, SFAError
from ..files.packing import SAVED_VALUES
from ..tuner.load_adapter import check_function, read_saved

#: What `examples/` write of methods that are no adapter of PEFT.
TRAINED_NAME = "trained.safetensors"
_SPEC_NAME = "task.json"
_FILES = ["*.json", "*.safetensors"]


def load_task(
    folder: str | PathLike[str],
    *,
    backbone: str | None = None,
    device: Any = None,
    revision: str | None = None,
) -> Any:
    """Return the model of a task's folder, in eval mode; its `task_spec` says what it is.

    The folder says in `task.json` what it was trained on. It holds an adapter of SFA or of another
    method of PEFT, or the weights of a trained head or model.

    Args:
        folder: Folder that a script of `examples/` wrote, or `TaskSpec.write` beside
            `save_pretrained`; or the name of one on the Hub.
        backbone: Folder or Hub id of the pretrained backbone, where it is no longer where the file
            says.
        device: Where to put the model; by default the CPU.
        revision: Commit, branch or tag of a folder on the Hub.

    Raises:
        SFAError: If there is no task, or its backbone cannot be loaded.
        AdapterFileError: If its adapter or weights are damaged or belong to another model.
    """
    path = find_folder(fspath(folder), revision)
    base = _described(path, backbone)
    if (path / CONFIG_NAME).is_file():
        model: nn.Module = PeftModel.from_pretrained(base, str(path))
    else:
        _load_weights(base, path)
        model = base
    return model.to(device).eval() if device is not None else model.eval()


def load_base(folder: str | PathLike[str], base: str | None = None) -> Any:
    """Return the plain model that a saved adapter belongs to.

    Args:
        folder: The adapter's folder or Hub id.
        base: Folder or Hub id of the pretrained model, or of its backbone where a `task.json`
            says how the model is made of it; None for what the files name.

    Raises:
        SFAError: If neither a `task.json` nor the adapter's config says how to make it.
    """
    path = find_folder(fspath(folder))
    if (path / _SPEC_NAME).is_file():
        return _described(path, base)
    config = PeftConfig.from_pretrained(str(path))
    mapping = config.auto_mapping or {}
    name, library = mapping.get("base_model_class"), mapping.get("parent_library") or ""
    source = base or config.base_model_name_or_path
    if not name or not source or not library.startswith("transformers."):
        raise SFAError(
            f"{path}: neither {_SPEC_NAME} nor {CONFIG_NAME} says which model of transformers the "
            f"adapter belongs to (class {name or 'unknown'}, weights {source or 'unknown'}). Name "
            "its weights with base=... (--base), or load it in Python onto your own model"
        )
    return _pretrained(getattr(importlib.import_module(library), name), source)


def load_saved(folder: str | PathLike[str], base: str | None = None) -> PeftModel:
    """Return the model that a saved adapter belongs to, with the adapter; see `load_base`.

    Raises:
        SFAError: As `load_base`.
        AdapterFileError: If the adapter is damaged or belongs to another model.
    """
    path = find_folder(fspath(folder))
    return PeftModel.from_pretrained(load_base(path, base), str(path))


# --- checked, merged, written otherwise --------------------------------------------------------


@dataclass(frozen=True)
class VerifyReport:
    """What was compared; there is one only if all of it agreed.

    Attributes:
        source: The adapter.
        tensors: Pretrained tensors that hold the very values it was trained on.
        unknown: Those of another type than in training, which no digest can tell.
        chain: Earlier adapters that were found as they were.
    """

    source: str
    tensors: int
    unknown: int
    chain: int

    def __str__(self) -> str:
        lines = [f"{self.source}: whole, and {self.tensors} pretrained tensors are those of then"]
        if self.unknown:
            lines.append(f"{self.unknown} tensors are of another type, and cannot be compared")
        if self.chain:
            lines.append(f"{self.chain} earlier adapters are there as they were")
        return "\n".join(lines)


def verify(folder: str | PathLike[str], base: str | None = None) -> VerifyReport:
    """Check a saved adapter: its checksums, its base's values and config, what it builds on.

    Args:
        folder: The adapter's folder or Hub id.
        base: As for `load_base`.

    Raises:
        SFAError: As `load_base`.
        AdapterFileError: Naming the first thing that is damaged or another one.
    """
    path = find_folder(fspath(folder))
    saved = read_saved(load_base(path, base), str(path))
    check_function(str(path), saved.plan, strict=True)
    tensors = saved.plan.record.tensors
    unknown = sum(not tensor.digests for tensor in tensors)
    return VerifyReport(str(folder), len(tensors) - unknown, unknown, len(saved.chain))


def merge(
    folder: str | PathLike[str], out: str | PathLike[str], base: str | None = None
) -> nn.Module:
    """Write a model with an adapter's change in its weights; such a model needs no SFA.

    Args:
        folder: The adapter's folder or Hub id.
        out: Folder for `save_pretrained` of the merged model.
        base: As for `load_base`.

    Returns:
        The merged model.

    Raises:
        SFAError: If there are external adapters, which no class of transformers has a place for;
            and as `load_base`.
    """
    model: Any = load_saved(folder, base)
    config = model.peft_config["default"]
    external = isinstance(config, SFAConfig) and any(
        layer.get("width") for layer in (config.resolved or {}).get("layers", ())
    )
    if external:
        raise SFAError(
            f"{folder}: has external adapters, which cannot be folded into weights. Only adapters "
            "that were trained with rho=0 can be merged"
        )
    merged = model.merge_and_unload()
    merged.save_pretrained(fspath(out))
    copy_spec(folder, out)
    return merged


def convert(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    saved_values: str,
    base: str | None = None,
) -> int:
    """Write an adapter again with its changes stored otherwise.

    Args:
        folder: The adapter's folder or Hub id.
        out: Folder for the new one.
        saved_values: "exact", "bfloat16" or "int8"; see `SFAConfig`.
        base: As for `load_base`.

    Returns:
        Bytes of the new file of tensors.

    Raises:
        ConfigError: If the values are of another kind.
        SFAError: As `load_base`.
    """
    if saved_values not in SAVED_VALUES:
        raise ConfigError(
            f"saved_values: expected one of {', '.join(SAVED_VALUES)}, got {saved_values!r}"
        )
    model = load_saved(folder, base)
    config: Any = model.peft_config["default"]
    config.saved_values = saved_values
    model.save_pretrained(fspath(out))
    copy_spec(folder, out)
    return sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))


def load_like(checkpoint: str | PathLike[str], base: str) -> Any:
    """Return the pretrained model that a fully fine-tuned checkpoint was made of.

    Args:
        checkpoint: Folder or Hub id of the fine-tuned model.
        base: Folder or Hub id of the pretrained model, or of its backbone where a `task.json` is
            beside the checkpoint.

    Raises:
        SFAError: If its class is none of transformers', or the weights cannot be loaded.
    """
    if (Path(checkpoint) / _SPEC_NAME).is_file():
        return _described(Path(checkpoint), base)
    import transformers

    try:
        names = AutoConfig.from_pretrained(fspath(checkpoint)).architectures or []
    except (OSError, ValueError) as error:
        raise SFAError(f"{checkpoint}: no config of a model ({error})") from error
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise SFAError(f"{checkpoint}: its config names no class of transformers, but {names}")
    return _pretrained(kind, base)


def find_folder(name: str, revision: str | None = None) -> Path:
    """Return a local folder, or that of a download from the Hub.

    Raises:
        SFAError: If there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise SFAError(f"{name}: no such folder, and not on the Hub ({error})") from error


def _described(path: Path, source: str | None) -> Any:
    """Return the plain model that a `task.json` describes; it knows its task."""
    # Here and not above: it needs pillow, which loading an adapter does not.
    from ..dense.prediction.spec import TaskSpec, attach_spec

    spec = TaskSpec.read(path)
    base = spec.build(path, source=source)
    attach_spec(base, spec)
    return base


def image_size(folder: str | PathLike[str]) -> tuple[int, int] | None:
    """Return height and width of a task's images; None where it has no `task.json` or none says."""
    path = find_folder(fspath(folder))
    if not (path / _SPEC_NAME).is_file():
        return None
    from ..dense.prediction.spec import TaskSpec

    preprocessing = TaskSpec.read(path).preprocessing
    return preprocessing.frame(preprocessing.size).padded if preprocessing.size else None


def pretrained_source(folder: str | PathLike[str]) -> str | None:
    """Return what a folder's `task.json` names as pretrained weights; None where there is none."""
    if not (Path(folder) / _SPEC_NAME).is_file():
        return None
    from ..dense.prediction.spec import TaskSpec

    return TaskSpec.read(Path(folder)).pretrained.source


def copy_spec(folder: str | PathLike[str], out: str | PathLike[str]) -> None:
    """Write the `task.json` of a folder into another one, if there is one."""
    if (Path(folder) / _SPEC_NAME).is_file():
        from ..dense.prediction.spec import TaskSpec

        TaskSpec.read(Path(folder)).write(Path(out))


def _pretrained(kind: Any, source: str) -> Any:
    load: Callable[..., Any] = kind.from_pretrained
    try:
        return load(source).eval()
    except (OSError, ValueError) as error:
        raise SFAError(f"base {source!r}: cannot be loaded ({error})") from error


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Load the tensors of a head, or of a whole model, that were trained without an adapter."""
    trained, whole = folder / TRAINED_NAME, next(folder.glob("model*.safetensors"), None)
    if not trained.is_file() and whole is None:
        raise SFAError(
            f"{folder}: a task, but neither {CONFIG_NAME}, {TRAINED_NAME} nor model.safetensors "
            "beside it. Copy the whole folder"
        )
    is_part, kind = trained.is_file(), type(model)
    try:
        # Of a whole model transformers knows the names in files of other releases.
        state = load_file(trained) if is_part else _pretrained(kind, str(folder)).state_dict()
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{folder}: weights cut short or damaged ({error})") from error
    result = model.load_state_dict(state, strict=not is_part)
    if result.unexpected_keys:
        raise AdapterFileError(
            f"{trained}: holds {len(result.unexpected_keys)} tensors that the model has no place "
            f"for, first `{result.unexpected_keys[0]}`. Baselines of examples/ that add layers of "
            "their own, such as adaptformer, are loaded by the script that trained them"
        )
