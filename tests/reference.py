# SPDX-License-Identifier: Apache-2.0
"""The method written slowly and obviously: dense masks, torch.topk, one Adam per weight."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfa_peft.selection.pick import layer_quotas


def _row_means(scores: Tensor) -> Tensor:
    """Return the score of each entry's row: the mean over all that belong to one output."""
    rows = scores.flatten(1).mean(1) if scores.ndim > 1 else scores
    return rows.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)


class DenseReference:
    """Alg. 1 on full gradients: every eligible weight keeps a mask, a sum and its own Adam.

    `score` is a name of `SCORE_STEPS`, "weight_difference", or a function as in `register_score`;
    `targets` says after which step how many are selected (None: equal shares after each round but
    the last).
    """

    SCORE_STEPS: ClassVar = {
        "accumulated_gradient": lambda w, g, s: s + g,
        "absolute_gradient": lambda w, g, s: s + g.abs(),
        "squared_gradient": lambda w, g, s: s + g**2,
        "movement": lambda w, g, s: s + g * w,
    }

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        quota: int,
        total: int,
        rounds_of: int,
        *,
        score: Any = "accumulated_gradient",
        ranking: str = "global",
        granularity: str = "weight",
        targets: dict[int, int] | None = None,
        every: int = 1,
    ) -> None:
        self.weights = weights
        self.score, self.ranking, self.granularity = score, ranking, granularity
        self.update = self.SCORE_STEPS.get(score) if isinstance(score, str) else score
        self.every, self.rounds_of = every, rounds_of
        picks = total // rounds_of - 1
        linear = {i * rounds_of: quota * i // picks for i in range(1, picks + 1)}
        self.targets = linear if targets is None else targets
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

    @property
    def selected(self) -> int:
        return sum(int(m.sum()) for m in self.mask.values())

    @torch.no_grad()
    def step(
        self, rate: float | dict[str, float], decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Do what one optimizer step and one selector step do, from the weights' `.grad`.

        `rate` is one for all weights, or that of each by its name.
        """
        self.taken += 1
        beta1, beta2 = betas
        dense = self.score == "weight_difference" and self.taken <= max(self.targets)
        for name, weight in self.weights.items():
            # Under Eq. 4 every weight trains; what is not selected starts anew in each round.
            grad, mask = weight.grad, self.mask[name]
            trains = torch.ones_like(mask) if dense else mask
            if self.update and (-self.taken) % self.rounds_of % self.every == 0:
                self.sums[name] = self.update(self.original[name], grad, self.sums[name])
            self.age[name][trains] += 1
            age = self.age[name]
            self.mean[name] = torch.where(
                trains, beta1 * self.mean[name] + (1 - beta1) * grad, self.mean[name]
            )
            self.square[name] = torch.where(
                trains, beta2 * self.square[name] + (1 - beta2) * grad**2, self.square[name]
            )
            mean = self.mean[name] / (1 - beta1**age)
            square = self.square[name] / (1 - beta2**age)
            own = rate[name] if isinstance(rate, dict) else rate
            update = own * mean / (square.sqrt() + eps) + own * decay * self.delta[name]
            self.delta[name] = torch.where(trains, self.delta[name] - update, self.delta[name])
            weight.grad = None
        if self.taken in self.targets:
            self.pick(self.targets[self.taken] - self.selected)
        for name, weight in self.weights.items():
            weight.copy_(self.original[name] + self.delta[name])

    def pick(self, count: int) -> None:
        """Admit the largest scores by a sort of everything."""
        scores = self.delta if self.score == "weight_difference" else self.sums
        self.admit({n: s.abs() for n, s in scores.items()}, count)
        for name, mask in self.mask.items():
            self.sums[name].zero_()
            for kept in (self.delta, self.mean, self.square, self.age):
                kept[name][~mask] = 0  # moved only by weight_difference; and a late entry is new
            if self.score == "weight_difference":
                for kept in (self.delta, self.mean, self.square, self.age):
                    kept[name][mask & ~self.before[name]] = 0

    def admit(self, scores: dict[str, Tensor], count: int) -> None:
        """Admit `count` weights by what is given here; whole rows or blocks while they fit."""
        self.before = {n: m.clone() for n, m in self.mask.items()}
        if self.ranking == "global":
            self._admit_among(list(scores), scores, count)
            return
        if self.ranking == "output":
            for _ in range(count):
                self._admit_into_an_emptiest_row(scores)
            return
        sizes = [s.numel() for s in scores.values()]
        have = [int(m.sum()) for m in self.mask.values()]
        for name, own in zip(scores, layer_quotas(count, sizes, have), strict=True):
            self._admit_among([name], scores, own)

    def _admit_blocks(self, names: list[str], scores: dict[str, Tensor], count: int) -> None:
        """Admit blocks of 16 by a sort of all, while a whole one fits."""
        blocks = []
        for name in names:
            shape = scores[name].shape if scores[name].ndim > 1 else (1, -1)
            rows, mask = (t.view(shape).flatten(1) for t in (scores[name], self.mask[name]))
            for row, column in itertools.product(range(len(rows)), range(0, rows.shape[1], 16)):
                place = (row, slice(column, column + 16))
                if not mask[place].any():
                    norm = rows[place].double().square().sum().sqrt().float()
                    blocks.append((float(norm), mask[place]))
        for _, block in sorted(blocks, key=lambda b: -b[0]):  # ties by position
            if count < 16:
                return
            block.fill_(True)
            count -= block.numel()

    def _admit_into_an_emptiest_row(self, scores: dict[str, Tensor]) -> None:
        """Admit the best weight of those in rows that have the fewest and are not full."""
        rows = {n: m.reshape(len(m), -1) for n, m in self.mask.items()}
        fewest = min(int(m.sum(1)[~m.all(1)].min()) for m in rows.values() if not m.all())
        open_scores = {
            n: scores[n].reshape(m.shape).masked_fill(m | (m.sum(1) > fewest)[:, None], -1)
            for n, m in rows.items()
        }
        name = max(open_scores, key=lambda n: float(open_scores[n].max()))
        self.mask[name].view(-1)[int(open_scores[name].argmax())] = True

    def _admit_among(self, names: list[str], scores: dict[str, Tensor], count: int) -> None:
        if self.granularity == "block":
            self._admit_blocks(names, scores, count)
            return
        if self.granularity == "row":
            means = {n: _row_means(scores[n]).masked_fill(self.mask[n], -1) for n in names}
            while True:
                name = max(names, key=lambda n: means[n].max())
                row = (
                    int(means[name].flatten(1).amax(1).argmax())
                    if means[name].ndim > 1
                    else int(means[name].argmax())
                )
                count -= means[name][row].numel()
                if count < 0 or means[name][row].max() < 0:
                    return
                self.mask[name][row] = True
                means[name][row] = -1
        flat = torch.cat([scores[n].masked_fill(self.mask[n], -1).flatten() for n in names])
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[torch.topk(flat, count).indices] = True
        for name, part in zip(names, chosen.split([scores[n].numel() for n in names]), strict=True):
            self.mask[name] |= part.view_as(self.mask[name])


def step_where(optimizer, weights: dict, masks: dict, pretrained: dict) -> None:
    """Let an optimizer of dense weights move what a mask selects, and nothing else."""
    for name, weight in weights.items():
        weight.grad *= masks[name]
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.where(masks[name], weight, pretrained[name]))
            for state in optimizer.state[weight].values():  # decay got into the moments
                if torch.is_tensor(state) and state.shape == weight.shape:
                    state.mul_(masks[name])


def assert_same(pool, reference: DenseReference, atol: float = 1e-6) -> None:
    """Compare an adapter with the reference: the same set, and values to `atol`."""
    masks, deltas = masks_of(pool), deltas_of(pool)
    for name, mask in masks.items():
        assert torch.equal(mask, reference.mask[name]), name
        own = torch.where(mask, reference.delta[name], 0)
        torch.testing.assert_close(deltas[name], own, rtol=0, atol=atol)


def masks_of(pool) -> dict[str, Tensor]:
    """Return an adapter's selection as dense masks by parameter name."""
    masks = {}
    for ordinal, name in enumerate(pool.names):
        weight = pool.weights[ordinal].tensor
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        for a, b in pool.layout()[ordinal]:
            mask[pool.slots[a:b] - pool.starts[ordinal]] = True
        masks[name] = mask.view_as(weight)
    return masks


def deltas_of(pool) -> dict[str, Tensor]:
    """Return an adapter's change as dense tensors by parameter name."""
    deltas = {}
    for ordinal, name in enumerate(pool.names):
        weight = pool.weights[ordinal].tensor
        delta = torch.zeros(weight.numel())
        for a, b in pool.layout()[ordinal]:
            delta[pool.slots[a:b] - pool.starts[ordinal]] = pool.values.detach()[a:b].float()
        deltas[name] = delta.view_as(weight)
    return deltas
