# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing that was switched on before `get_peft_model`.

PEFT then asks Transformers to make the input embeddings' output require gradients, by a forward
hook that expects a tensor. Hierarchical backbones return a tuple there: a hook of ours, which comes
before that one, lets the tuple be asked.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


class _Features(tuple):
    """Features with the size of their grid."""

    def requires_grad_(self, requires_grad: bool = True) -> _Features:
        self[0].requires_grad_(requires_grad)
        return self


def _as_features(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return _Features(output) if type(output) is tuple else None


def prepare_checkpointing(model: nn.Module) -> None:
    """Let the input embeddings of a model with gradient checkpointing require gradients."""
    for module in model.modules():
        if not (isinstance(module, PreTrainedModel) and _is_checkpointed(module)):
            continue
        try:
            embeddings = module.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            hooks = embeddings._forward_hooks.values()
            if _as_features not in hooks:
                embeddings.register_forward_hook(_as_features)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
