# SPDX-License-Identifier: Apache-2.0
"""BitFit (https://arxiv.org/abs/2106.10199): the biases of the backbone, nothing else."""

from common.peers.peer import Peer
from sfa_peft import Backbone


def add(backbone: Backbone, _size: int = 1) -> None:
    """Train the biases of a backbone: of linears, convolutions and norms."""
    for name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(_is_bias(name))


def parameters(backbone: Backbone, _size: int = 1) -> int:
    """Return how many biases a backbone has."""
    return sum(p.numel() for name, p in backbone.module.named_parameters() if _is_bias(name))


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


BITFIT = Peer("BitFit", add, parameters, is_new=False)
