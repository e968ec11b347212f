# SPDX-License-Identifier: Apache-2.0
"""One backbone in several task models: checked, put in, given adapters, and all of it undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbones import Backbone, describe_model, find_backbone, role_modules
from ..blocks import join
from ..config import SFAConfig
from ..errors import SFAError
from ..tuner.base_model_config import OUTPUTS, config_fields
from ..tuner.feature_map import forget_unused
from ..tuner.layer import SFALayer


def find_shareable(model: nn.Module) -> nn.Module:
    """Return the backbone in a model, or the model itself if it has none that is known.

    Raises:
        SFAError: If a tuner has wrapped its layers already.
    """
    found = find_backbone(model)
    backbone = found.module if found else model
    refuse_tuned(backbone, "backbone")
    return backbone


def refuse_tuned(model: nn.Module, what: str) -> None:
    """Raise an SFAError if a model has a tuner's layers."""
    name = next((n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None)
    if name is not None:
        raise SFAError(
            f"{what}: `{name}` belongs to an adapter already. Give the plain model, as it is "
            "before get_peft_model or PeftModel.from_pretrained (or unload() that one first)."
        )


def share(shared: nn.Module, model: nn.Module, *, check_weights: bool) -> dict[str, nn.Module]:
    """Put the shared backbone into a task model in the place of its own.

    Where the two are of one class and return the same features, the whole module is shared;
    otherwise the parts of equal name and class are, which must hold every transformer block.

    Args:
        shared: The backbone, which may hold adapters of other tasks.
        model: The task model; its own backbone is released.
        check_weights: Whether to compare all weights that are shared.

    Returns:
        What was replaced, by path, for `put_back`.

    Raises:
        SFAError: If the task model has no backbone or another one.
    """
    if model is shared:
        raise SFAError(
            "the task model is the shared backbone itself. Give a task model around it; for the "
            "plain backbone there is bank.activate(None)."
        )
    if any(module is shared for module in model.modules()):
        return {}
    refuse_tuned(model, "task model")
    found = find_backbone(model)
    if found is None:
        raise SFAError(
            f"no vision backbone found in the task model ({describe_model(model)}). Build the task "
            "model around the bank's own backbone (`bank.backbone`)."
        )
    own, where = found.module, found.name
    differences = _compare_configs(shared, own)
    structural = [d for d in differences if d.partition("=")[0] not in OUTPUTS]
    if structural:
        raise SFAError(
            f"task model: its backbone `{where}` has another config than the bank's: "
            f"{'; '.join(structural)}. Build it from the same checkpoint and options."
        )
    if where and not differences and not found.heads and type(own) is type(shared):
        pairs = {where: (own, shared)}
    else:
        pairs = _match_parts(shared, found)
        _check_tensors(where, _own_tensors(own), _own_tensors(shared), values=check_weights)
    for path, (old, new) in pairs.items():
        expected = dict(_plain_tensors(new))
        _check_tensors(path, dict(_plain_tensors(old)), expected, values=check_weights)
    for path, (_, new) in pairs.items():
        model.set_submodule(path, new)
    return {path: old for path, (old, _) in pairs.items()}


def put_back(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo `share`."""
    for path, module in replaced.items():
        model.set_submodule(path, module)


def read_config(folder: str | PathLike[str]) -> SFAConfig:
    """Read an adapter's config.

    Raises:
        SFAError: If there is none, or it is not SFA's.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, SFAConfig):
            return SFAConfig.from_pretrained(str(folder))  # which remembers the folder
    except SFAError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise SFAError(f"{folder}: no adapter can be read there ({error}).") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    raise SFAError(f"{folder}: a {kind} adapter, but a bank takes SFA adapters.")


def load_frozen(
    name: str,
    folder: str | PathLike[str],
    config: SFAConfig,
    model: nn.Module,
    shared: nn.Module,
) -> PeftModel:
    """Return a task model with its adapter, in eval mode and with nothing to train.

    Raises:
        SFAError: If the adapter holds a whole copy of a part of the shared backbone.
        AdapterFileError: If the adapter is damaged or does not fit the model.
    """
    peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
    copied = next((n for n, m in shared.named_modules() if isinstance(m, ModulesToSaveWrapper)), "")
    if copied:
        raise SFAError(
            f"{folder}: modules_to_save={config.modules_to_save} names `{copied}` of the backbone "
            "too, so the adapter holds a whole copy of that, which a bank cannot share. Train it "
            "with target_parameters, or name the head by a longer path."
        )
    peft_model.eval().requires_grad_(False)
    for module in model.modules():
        # Let the trained copy of a head stand for the original too: that acts only where adapters
        # are disabled, and a second head would double what a task costs.
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            module.original_module = module.modules_to_save[name]
    return peft_model


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of a task model, and wrappers that serve no other one."""
    for layer in adapted_layers(model):
        if layer.has_adapter(name):
            layer.set_adapter([])  # PEFT would choose another active adapter, each layer its own
            layer.delete_adapter(name)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, SFALayer) and not _serves_any(child):
                setattr(parent, child_name, child.unload())
            elif isinstance(child, ModulesToSaveWrapper):
                setattr(parent, child_name, child.original_module)
    forget_unused(model)
    model.__dict__.pop("peft_config", None)


def guard_forward(model: nn.Module, use: Callable[[], AbstractContextManager[Any]]) -> None:
    """Make every forward of a task model run inside `use()`, whoever calls it in whatever way."""
    forward = model.forward

    @functools.wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with use():
            return forward(*args, **kwargs)

    model.forward = guarded


def adapted_layers(module: nn.Module) -> list[SFALayer]:
    """Return the wrapped layers in a module."""
    return [m for m in module.modules() if isinstance(m, SFALayer)]


def _compare_configs(shared: nn.Module, own: nn.Module) -> list[str]:
    """Return the fields that differ, as "field=value, the bank's value"."""
    first, second = config_fields(shared), config_fields(own)
    return [
        f"{field}={second.get(field)!r}, the bank's {first.get(field)!r}"
        for field in sorted(first.keys() | second.keys())
        if first.get(field) != second.get(field)
    ]


def _match_parts(shared: nn.Module, found: Backbone) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return (own, shared) by path of the parts that have equal names and classes."""
    own, where = found.module, found.name
    theirs = dict(shared.named_children())
    matched = {
        name: (module, theirs[name])
        for name, module in own.named_children()
        if type(module) is type(theirs.get(name)) and found.holds(join(where, name))
    }
    backbone = find_backbone(own)
    blocks = [r.name for r in role_modules(backbone)] if backbone else []
    left = [b for b in blocks if b.partition(".")[0] not in matched]
    if left or not blocks:
        raise SFAError(
            f"task model: its backbone `{where}` is a {type(own).__name__}, the bank's a "
            f"{type(shared).__name__}, and they do not hold their blocks under the same names"
            f"{f' (`{left[0]}`)' if left else ''}. Build the task model around `bank.backbone`."
        )
    return {join(where, name): pair for name, pair in matched.items()}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what is in no part of a module, such as the position embeddings of a timm model."""
    return {name: tensor for name, tensor in _plain_tensors(module) if "." not in name}


def _check_tensors(
    path: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, values: bool
) -> None:
    for name in sorted(expected.keys() ^ found.keys()):
        where = "the bank's has it" if name in expected else "the bank's has not"
        raise SFAError(
            f"task model: its backbone differs from the bank's in `{join(path, name)}`: {where}. "
            "Build it from the same checkpoint and options."
        )
    for name, tensor in found.items():
        full, other = join(path, name), expected[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise SFAError(
                f"task model: `{full}` is {list(tensor.shape)} {tensor.dtype}, the bank's "
                f"{list(other.shape)} {other.dtype}. Build it from the same checkpoint, in the "
                "same dtype."
            )
        if values and (tensor.is_meta or not torch.equal(tensor.to(other.device), other)):
            raise SFAError(
                f"task model: `{full}` holds other values than the bank's, and an adapter "
                "fits only the weights it was trained on. Build the task model from the same "
                "checkpoint, or pass check_weights=False if it is built without pretrained weights."
            )


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers as they are without adapters, under their plain names."""
    for name, tensor in module.state_dict().items():
        if not any(part.startswith("sfa_") for part in name.split(".")):
            yield name.replace(".base_layer.", ".").removeprefix("base_layer."), tensor


def _serves_any(layer: SFALayer) -> bool:
    return bool(layer.sfa_down) or any(weight.slices for weight in layer.weights.values())
