# SPDX-License-Identifier: Apache-2.0
"""Make a model ready for a method, save what the method trained, and load it again.

The head is always trained and saved whole; it is everything that lies beside the backbone.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

import sfa_peft
from common.arguments import OF_SFA, SharedArguments, find_checkpoint
from common.peers import PEERS
from common.peers.of_peft import OF_PEFT
from common.peers.peer import size_of
from sfa_peft import Backbone, SFAConfig, SFAError, TargetError, find_backbone

TRAINED_NAME, METHOD_NAME = "trained.safetensors", "method.json"


@dataclass
class Prepared:
    """A model that is ready to be trained by a method.

    Attributes:
        model: What is trained: the task model, or PEFT's around it.
        base: The task model.
        head: Trained parameters beside the backbone.
        adapted: Trained parameters of the backbone, adapters included.
        share: Trained share of the backbone.
        backbone_size: Parameters of the backbone.
        callbacks: What Trainer needs besides.
        checkpoint: Folder to resume from, if any.
    """

    model: nn.Module
    base: nn.Module
    head: list[nn.Parameter]
    adapted: list[nn.Parameter]
    share: float
    backbone_size: int
    callbacks: list[TrainerCallback]
    checkpoint: str | None = None


def prepare_method(base: nn.Module, args: SharedArguments) -> Prepared:
    """Freeze, wrap or extend a task model as `args.method` wants it.

    Raises:
        SFAError: If the budget is too small for the method, or a checkpoint to resume from is
            missing.
    """
    checkpoint = find_checkpoint(args)
    backbone = _backbone(base)
    size = sum(p.numel() for p in backbone.module.parameters())
    head, model, callbacks = sfa_peft.head_modules(base), base, []
    if args.method in OF_SFA:
        model = get_peft_model(base, sfa_config(backbone, args, head))  # SFA
        callbacks = [sfa_peft.SFACallback(resume_from_checkpoint=checkpoint)]  # SFA
    elif args.method in OF_PEFT:
        model = get_peft_model(base, OF_PEFT[args.method](backbone, args.budget, head))
    else:
        _change_in_place(backbone, args)
    return replace(as_prepared(model, base, size, callbacks), checkpoint=checkpoint)


def sfa_config(backbone: Backbone, args: SharedArguments, head: list[str]) -> SFAConfig:
    """Return SFA, one of its parts, or a selection by another rule: one budget for all of it.

    GPS (https://arxiv.org/abs/2312.10136) gives each output feature as many weights, those of the
    largest accumulated gradient, and trains biases too; norms stay frozen. It picks once, after the
    first round, in which only the head is trained.
    """
    rules: dict[str, Any] = {
        "sfa": {"rho": args.rho, "adapter_dim": args.adapter_dim},
        "internal": {"rho": 0.0},
        "external": {"rho": 1.0},
        "random": {"rho": 0.0, "score": "random"},
        "gps": {
            "rho": 0.0,
            "score": "accumulated_gradient",
            "ranking": "output",
            "schedule": "one_shot",
            "target_parameters": rf"{re.escape(backbone.name)}\.(?!.*norm).*\.(weight|bias)",
        },
    }[args.method]
    options = {
        "budget": args.budget,
        "external_type": args.external_type,
        "score": args.score,
        "schedule": args.schedule,
        "select_until": args.select_until,
        "selection_steps": args.selection_steps,
        "internal_lr_ratio": args.internal_lr_ratio,
        "selection_from": args.selection_from,
        "modules_to_save": head,
    }
    return SFAConfig(**(options | rules))


def save_method(ready: Prepared, args: SharedArguments, folder: Path) -> None:
    """Save what a task needs beside the backbone (of full fine-tuning, all)."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(ready.model, PeftModel) or _is_of_transformers(args):
        ready.model.save_pretrained(folder)
    else:
        trained = {id(p) for p in (*ready.head, *ready.adapted)}
        frozen = {n for n, p in ready.model.named_parameters() if id(p) not in trained}
        # Buffers too: a head's batch norm is nothing without its running statistics.
        state = {
            name: value.detach().cpu().clone()
            for name, value in ready.model.state_dict().items()
            if name not in frozen
        }
        partial = folder / f".{TRAINED_NAME}.partial"
        save_file(state, partial, metadata={"format": "pt"})
        partial.replace(folder / TRAINED_NAME)
        (folder / METHOD_NAME).write_text(
            json.dumps({"method": args.method, "budget": args.budget}, indent=2)
        )


def saved_size(folder: Path) -> int:
    """Return the bytes of the tensor files that `save_method` wrote."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_method(base: nn.Module, args: SharedArguments, folder: Path) -> nn.Module:
    """Return a fresh task model as a method trained it.

    Args:
        base: The task model as before training; changed in place or replaced.
        args: Those of the training.
        folder: What `save_method` wrote.

    Raises:
        SFAError: If it was written for another model, method or budget.
    """
    if _is_of_transformers(args):
        # Copied, since tensors mapped from a file lie otherwise in memory and round otherwise.
        base.load_state_dict(type(base).from_pretrained(folder).state_dict())
        return base.eval()
    if args.method in (*OF_SFA, *OF_PEFT):
        return PeftModel.from_pretrained(base, folder).eval()
    _change_in_place(_backbone(base), args)
    state = load_file(folder / TRAINED_NAME)
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    wrong = [name for name, tensor in state.items() if shapes.get(name) != tensor.shape]
    wrong += [n for n, p in base.named_parameters() if p.requires_grad and n not in state]
    if wrong:
        raise SFAError(f"{folder}: not of this model, method and budget: {wrong[:3]}")
    base.load_state_dict(state, strict=False)
    return base.eval()


def check_loaded_again(
    ready: Prepared, base: nn.Module, args: SharedArguments, folder: Path, pixels: torch.Tensor
) -> None:
    """Load what was saved into a fresh model and compare what both make of some images.

    Args:
        ready: The trained model.
        base: The task model as before training.
        args: Those of the training.
        folder: What `save_method` wrote.
        pixels: Images, float32 `(B, 3, H, W)`.

    Raises:
        SFAError: If an output differs; on a CPU by a bit, elsewhere by more than rounding.
    """
    device = next(ready.model.parameters()).device
    loaded = load_method(base, args, folder).to(device)
    with torch.no_grad():
        pairs = [
            _tensors(model.eval()(pixel_values=pixels.to(device)))
            for model in (ready.model, loaded)
        ]
    close: Callable[..., bool] = torch.equal if device.type == "cpu" else torch.allclose
    if not all(close(a, b) for a, b in zip(*pairs, strict=True)):
        raise SFAError(f"{folder}: loaded again, the model puts out something else")
    print(f"loaded again from {folder}: same outputs")


def _is_of_transformers(args: SharedArguments) -> bool:
    """Tell whether all is trained, and of a model whose class alone can read it again."""
    return args.method == "full" and not args.norm_outputs


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output, in order, however nested."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    if isinstance(outputs, (list, tuple)) or hasattr(outputs, "__iter__"):
        return [tensor for part in outputs for tensor in _tensors(part)]
    return []


def as_prepared(
    model: nn.Module, base: nn.Module, size: int, callbacks: list[TrainerCallback]
) -> Prepared:
    """Tell the head's trained parameters from the others'.

    Args:
        model: What is trained: the task model, or PEFT's around it.
        base: The task model.
        size: Parameters of the backbone before it was adapted.
        callbacks: What Trainer needs besides.
    """
    inside = f"{_backbone(base).name}."
    head, adapted = [], []
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            (adapted if name.startswith(inside) else head).append(parameter)
    count = sum(p.numel() for p in adapted)
    return Prepared(model, base, head, adapted, count / size, size, callbacks)


def _backbone(model: nn.Module) -> Backbone:
    backbone = find_backbone(model)
    if backbone is None or not backbone.name:
        raise TargetError(f"{type(model).__name__}: no known backbone inside a task model")
    return backbone


def _change_in_place(backbone: Backbone, args: SharedArguments) -> None:
    """Freeze a backbone, or not, and put a method of others into it."""
    peer = PEERS.get(args.method)
    if peer is None:
        backbone.module.requires_grad_(args.method == "full")
    else:
        peer.add(backbone, size_of(peer, backbone, args.budget, args.adapter_dim))
