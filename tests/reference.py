# SPDX-License-Identifier: Apache-2.0
"""The method written slowly and obviously: dense masks, torch.topk, one Adam per weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseReference:
    """Alg. 1 on full gradients: every eligible weight keeps a mask, a sum and its own Adam."""

    def __init__(
        self, weights: dict[str, nn.Parameter], quota: int, total: int, rounds_of: int
    ) -> None:
        self.weights = weights
        self.quota, self.steps_per_round = quota, rounds_of
        self.num_picks = total // rounds_of - 1
        self.original = {n: w.detach().clone() for n, w in weights.items()}
        zeros = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.delta = {n: z.clone() for n, z in zeros.items()}
        self.mean = {n: z.clone() for n, z in zeros.items()}
        self.square = {n: z.clone() for n, z in zeros.items()}
        self.age = {n: z.clone() for n, z in zeros.items()}
        self.sums = {n: z.clone() for n, z in zeros.items()}
        self.mask = {n: z.bool() for n, z in zeros.items()}
        self.taken = 0
        for weight in weights.values():
            weight.requires_grad_(True)

    @torch.no_grad()
    def step(self, rate: float, decay: float, betas: tuple[float, float], eps: float) -> None:
        """Do what one optimizer step and one selector step do, from the weights' `.grad`."""
        self.taken += 1
        beta1, beta2 = betas
        for name, weight in self.weights.items():
            grad, mask = weight.grad, self.mask[name]
            self.sums[name] += grad
            self.age[name][mask] += 1
            age = self.age[name]
            self.mean[name] = torch.where(
                mask, beta1 * self.mean[name] + (1 - beta1) * grad, self.mean[name]
            )
            self.square[name] = torch.where(
                mask, beta2 * self.square[name] + (1 - beta2) * grad**2, self.square[name]
            )
            mean = self.mean[name] / (1 - beta1**age)
            square = self.square[name] / (1 - beta2**age)
            update = rate * mean / (square.sqrt() + eps) + rate * decay * self.delta[name]
            self.delta[name] = torch.where(mask, self.delta[name] - update, self.delta[name])
            weight.copy_(self.original[name] + self.delta[name])
            weight.grad = None
        if (
            self.taken % self.steps_per_round == 0
            and self.taken // self.steps_per_round <= self.num_picks
        ):
            self.pick(self.taken // self.steps_per_round)

    def pick(self, number: int) -> None:
        """Admit the largest sums by a sort of everything."""
        count = self.quota * number // self.num_picks - self.quota * (number - 1) // self.num_picks
        scores = torch.cat(
            [s.abs().masked_fill(self.mask[n], -1).flatten() for n, s in self.sums.items()]
        )
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[torch.topk(scores, count).indices] = True
        for name, part in zip(
            self.mask, chosen.split([s.numel() for s in self.sums.values()]), strict=True
        ):
            self.mask[name] |= part.view_as(self.mask[name])
            self.sums[name].zero_()


def masks_of(pool) -> dict[str, Tensor]:
    """Return an adapter's selection as dense masks by parameter name."""
    masks = {}
    for ordinal, name in enumerate(pool.names):
        weight = pool.weight(ordinal)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        for a, b in pool.layout()[ordinal]:
            mask[pool.slots[a:b] - pool.starts[ordinal]] = True
        masks[name] = mask.view_as(weight)
    return masks


def deltas_of(pool) -> dict[str, Tensor]:
    """Return an adapter's change as dense tensors by parameter name."""
    deltas = {}
    for ordinal, name in enumerate(pool.names):
        weight = pool.weight(ordinal)
        delta = torch.zeros(weight.numel())
        for a, b in pool.layout()[ordinal]:
            delta[pool.slots[a:b] - pool.starts[ordinal]] = pool.values.detach()[a:b].float()
        deltas[name] = delta.view_as(weight)
    return deltas
