# SPDX-License-Identifier: Apache-2.0
"""Methods that PEFT has, on the layers that SFA adapts and as large as a budget allows.

LoRA (https://arxiv.org/abs/2106.09685), SHiRA (https://arxiv.org/abs/2406.13175) and Super-Tuning
(https://arxiv.org/abs/2607.09287).
"""

from peft import LoraConfig, ShiraConfig, SupertuningConfig
from torch import nn

from common.peers.peer import allowed, inside, largest
from sfa_peft import Backbone, BudgetError, role_modules


def lora(backbone: Backbone, budget: float, head: list[str]) -> LoraConfig:
    """Return LoRA on all attention and MLP linears, of the largest rank within the budget."""
    layers = _layers(backbone)
    per_rank = sum(layer.in_features + layer.out_features for layer in layers.values())
    rank = largest(lambda r: r * per_rank, backbone, budget, "LoRA of rank 1")
    return LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1, so that one learning rate serves all ranks
        target_modules=list(layers),
        modules_to_save=head,
    )


def shira(backbone: Backbone, budget: float, head: list[str]) -> ShiraConfig:
    """Return SHiRA with the largest r within the budget; its positions are PEFT's random ones.

    A layer of m x n weights gets r (m + n) of them, as many as LoRA has numbers there. Layers that
    have fewer than that (the first ones of a large budget) stay frozen, as PEFT refuses them.

    Raises:
        BudgetError: If not even r = 1 is small enough.
    """
    layers = _layers(backbone)
    per_rank = sum(layer.in_features + layer.out_features for layer in layers.values())
    largest(lambda r: r * per_rank, backbone, budget, "SHiRA with r = 1")
    limit = allowed(backbone, budget)
    r, fitting = 1, _fitting(layers, 1)
    while (more := _fitting(layers, r + 1)) and _shira_size(layers, more, r + 1) <= limit:
        r, fitting = r + 1, more
    return ShiraConfig(r=r, target_modules=fitting, modules_to_save=head)


def super_tuning(backbone: Backbone, budget: float, head: list[str]) -> SupertuningConfig:
    """Return Super-Tuning: the largest weights of each layer, the same share of all.

    Raises:
        BudgetError: If the budget is more than all weights of these layers, or less than one each.
    """
    sizes = {name: layer.weight.numel() for name, layer in _layers(backbone).items()}
    share = int(allowed(backbone, budget)) / sum(sizes.values())
    if share > 1 or share * min(sizes.values()) < 1:
        raise BudgetError(
            f"budget={budget} is {share:.3g} of the weights of attention and MLP: Super-Tuning "
            f"needs at least {1 / min(sizes.values()):.1g} and at most 1 of them"
        )
    return SupertuningConfig(sparsity=1 - share, target_modules=list(sizes), modules_to_save=head)


OF_PEFT = {"lora": lora, "shira": shira, "super_tuning": super_tuning}


def _layers(backbone: Backbone) -> dict[str, nn.Module]:
    """Return the attention and MLP linears of a backbone by their path in the model."""
    return {
        entry.name: backbone.module.get_submodule(inside(backbone, entry.name))
        for entry in role_modules(backbone)
    }


def _fitting(layers: dict[str, nn.Module], r: int) -> list[str]:
    """Return the layers that have r (m + n) weights."""
    return [
        name
        for name, layer in layers.items()
        if r * (layer.in_features + layer.out_features) <= layer.weight.numel()
    ]


def _shira_size(layers: dict[str, nn.Module], names: list[str], r: int) -> int:
    return sum(r * (layers[name].in_features + layers[name].out_features) for name in names)
