# SPDX-License-Identifier: Apache-2.0
"""How an adapted model runs under `torch.compile`: one graph break, before the forward.

A graph cannot hold what decides whether weights are up to date. So a hook on the model does that
first, for all layers, and the layers' forwards go on with what it prepared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import SFALayer
from .live import eager


def before_forward(model: nn.Module, _args: Any) -> None:
    """Do first what a graph cannot hold, under torch.compile; whoever calls the model."""
    if torch.compiler.is_compiling():
        _prepare(model)


@eager
def _prepare(model: nn.Module) -> None:
    """Let every layer write its weights and look up its taps, outside a compiled graph."""
    for module in model.modules():
        if isinstance(module, SFALayer):
            module.prepare()
