# SPDX-License-Identifier: Apache-2.0
"""Picks over ranks that each hold a part of every tensor, against a stable sort of all scores."""

import random
import threading
from functools import partial

import pytest
import torch

from sfa_peft import SelectionError
from sfa_peft.selection.pick import pick
from sfa_peft.selection.topk import TAKEN, TensorSource


class Threads:
    """Ranks as threads of one process that wait for each other at every exchange."""

    def __init__(self, count: int) -> None:
        self.barrier, self.said = threading.Barrier(count), [None] * count

    def exchange(self, rank, said):
        self.said[rank] = said
        self.barrier.wait(10)
        found = list(self.said)
        self.barrier.wait(10)
        return found

    def run(self, function):
        """Call a function with every rank; return what each gives, or raise what one raises."""
        found = [None] * len(self.said)

        def call(rank):
            try:
                found[rank] = function(Rank(self, rank))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=call, args=(r,)) for r in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Rank:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def total(self, counts):
        return sum(self.threads.exchange(self.rank, counts))

    def table(self, numbers):
        return torch.tensor(self.threads.exchange(self.rank, numbers), dtype=torch.int64)

    def concatenated(self, part):
        return torch.cat(self.threads.exchange(self.rank, part))


def cut(tensor, rank, count):
    """Return the rows of a rank as `fully_shard` cuts them, and the first position of them."""
    share = -(-tensor.shape[0] // count)
    first = min(rank * share, tensor.shape[0])
    return tensor[first : first + share], first * (tensor[0].numel() if tensor.numel() else 1)


def slow_pick(scores, quota, selected):
    """Return the positions over all tensors: largest first, ties in the order of positions."""
    keys = torch.cat([s.reshape(-1).abs() for s in scores])
    keys = torch.where(torch.isfinite(keys), keys, -1.0)
    keys[selected] = -1.0
    return keys.sort(descending=True, stable=True).indices[:quota].sort().values


def picked_here(rank, count, scores, quota, taken):
    """Return the positions over all tensors that one rank picks."""
    parts, firsts, start = [], [], 0
    for tensor in scores:
        part, first = cut(tensor, rank.rank, count)
        inside = taken - start - first
        part = part.clone()
        part.view(-1)[inside[(inside >= 0) & (inside < part.numel())]] = TAKEN
        parts.append(TensorSource(part))
        firsts.append(start + first)
        start += tensor.numel()
    found = pick(parts, quota, ranks=rank)
    return torch.cat([f + first for f, first in zip(found, firsts, strict=True)])


@pytest.mark.parametrize("seed", range(200))
def test_a_schedule_of_picks_over_ranks_is_that_of_a_stable_sort(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count = rng.randint(1, 5)
    shapes = [(rng.randint(1, 9), rng.randint(1, 6))[: rng.randint(1, 2)] for _ in range(3)]
    taken = torch.empty(0, dtype=torch.int64)
    for _ in range(rng.randint(1, 4)):
        levels = rng.choice([1, 2, 5, 1000])  # few levels are many ties
        scores = [
            torch.randint(-levels, levels + 1, s, generator=generator) / levels for s in shapes
        ]
        scores[0].view(-1)[0] = rng.choice([float("nan"), float("inf"), 0.5])
        left = sum(s.numel() for s in scores) - taken.numel() - 1
        quota = rng.randint(0, max(0, left))
        expected = slow_pick(scores, quota, taken)
        found = Threads(count).run(
            partial(picked_here, count=count, scores=scores, quota=quota, taken=taken)
        )
        assert torch.equal(torch.cat(found).sort().values, expected)
        taken = torch.cat([taken, expected])


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["weight", "row"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_kind_of_pick_over_ranks_is_that_of_one_process(ranking, granularity, count):
    generator = torch.Generator().manual_seed(count)
    scores = [torch.randint(-3, 4, s, generator=generator) / 3 for s in [(5, 4), (2, 3), (7, 1)]]
    how = {"ranking": ranking, "granularity": granularity, "row_sizes": [4, 3, 1]}
    alone = pick([TensorSource(s) for s in scores], 15, **how)

    def own_part(rank):
        parts = [cut(s, rank.rank, count) for s in scores]
        found = pick([TensorSource(p) for p, _ in parts], 15, ranks=rank, **how)
        return [f + first for f, (_, first) in zip(found, parts, strict=True)]

    found = Threads(count).run(own_part)
    for ordinal, expected in enumerate(alone):
        assert torch.equal(torch.cat([f[ordinal] for f in found]), expected)


def test_too_few_finite_scores_are_said_on_every_rank():
    found = Threads(3).run(
        lambda rank: pick([TensorSource(torch.ones(2))], 7, ranks=rank),
    )
    assert [type(error) for error in found] == [SelectionError] * 3
    assert all("only 6 have a finite score" in str(error) for error in found)
