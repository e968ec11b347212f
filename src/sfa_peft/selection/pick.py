# SPDX-License-Identifier: Apache-2.0
"""One pick: global or per tensor, single weights or output rows (Eq. 5, Alg. 1 line 10).

And what it fills: a pool, at once without data, or round by round until it is finished.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SelectionError
from ..sparse.pool import Pool
from .distribution import ScoreDistribution
from .rules import SelectionRules
from .topk import RandomSource, Ranks, Source, TensorSource, streaming_topk

#: Over which weights scores are compared.
RANKINGS = ("global", "layer")
#: What is selected as one.
GRANULARITIES = ("weight", "row")


def pick(
    sources: Sequence[Source],
    quota: int,
    selected: Sequence[Tensor],
    *,
    ranking: str = "global",
    granularity: str = "weight",
    row_sizes: Sequence[int] | None = None,
    distribution: ScoreDistribution | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Return the flat positions to admit, for each tensor.

    Args:
        sources: Scores of each tensor.
        quota: Number of weights to admit over all tensors together. Rows are admitted whole, while
            they fit; the rest of the quota stays open for the next pick.
        selected: For each tensor the positions admitted before (int64, strictly increasing).
        ranking: "global" compares all weights with each other; "layer" gives every tensor the
            share of the quota that its size has of all sizes.
        granularity: "weight", or "row": all weights of one output feature (channel) together,
            ranked by the mean of their absolute scores.
        row_sizes: For "row" the number of weights in a row of each tensor.
        distribution: Gets the scores that are compared (of weights, or of rows) and the smallest
            one that is admitted.
        ranks: Where each rank has a part of every tensor (whole rows), the ranks. The quota is for
            all of them, positions are those in the part.

    Returns:
        For each tensor positions, int64, strictly increasing.

    Raises:
        SelectionError: If too few weights have a finite score.
    """
    if granularity == "row":
        if row_sizes is None:
            raise SelectionError("pick: granularity='row' needs row_sizes.")
        return _pick_rows(sources, quota, selected, ranking, row_sizes, distribution, ranks)
    if ranking == "global":
        return streaming_topk(sources, quota, selected, distribution, ranks)
    quotas = _quotas(quota, sources, selected, ranks)
    return [
        streaming_topk([source], own, [before], distribution, ranks)[0]
        for source, own, before in zip(sources, quotas, selected, strict=True)
    ]


def select_without_data(pool: Pool, rules: SelectionRules) -> None:
    """Make the whole selection at once, by a score that needs no gradients."""
    weights = [pool.weights[i].scored(pool.adapter_name) for i in range(len(pool.weights))]
    if any(weight.is_meta for weight in weights) or pool.values.is_meta:
        return
    sources: list[Source] = [TensorSource(w) for w in weights]
    if rules.score == "random":
        sources = [
            RandomSource(w.numel(), f"{rules.seed}/{i}", w.device) for i, w in enumerate(weights)
        ]
    pool.assign(
        pick(
            sources,
            pool.values.numel(),
            [pool.slots[:0].long()] * len(weights),
            ranking=rules.ranking,
            granularity=rules.granularity,
            row_sizes=row_sizes(weights),
        )
    )


def is_unfinished(pool: Pool, rules: SelectionRules) -> bool:
    """Whether a run would certainly have selected more.

    Rows may leave a part of the budget open, and the literal schedule always does. How large that
    part is depends on the run, so the largest possible one passes for finished.
    """
    if not rules.selects_while_training:
        return False
    selected = pool.num_selected
    return selected == 0 or pool.size - selected > _most_left_open(pool, rules)


def _most_left_open(pool: Pool, rules: SelectionRules) -> int:
    """Return the most slots that a finished selection may leave open."""
    left = 0
    if rules.granularity == "row":  # less than the row that did not fit any more
        sizes = row_sizes([weight.tensor for weight in pool.weights])
        left = max(sizes) - 1 if rules.ranking == "global" else sum(sizes) - len(sizes)
    if rules.schedule == "literal":  # 1/n, and n is at least 2
        left += pool.size if rules.select_until not in (None, 1) else pool.size - pool.size // 2
    return left


def row_sizes(weights: Sequence[Tensor]) -> list[int]:
    """Return how many weights belong to one output feature (channel) of each tensor."""
    return [w.numel() // w.shape[0] if w.ndim > 1 else 1 for w in weights]


def layer_quotas(quota: int, sizes: Sequence[int], before: Sequence[int]) -> list[int]:
    """Share a quota so that all tensors end with the same selected share (to one weight).

    Args:
        quota: Weights to admit now.
        sizes: Number of weights of each tensor.
        before: Number of weights admitted before.

    Returns:
        Weights to admit for each tensor; they add up to `quota`, or to all that are left.
    """
    total = sum(sizes)
    after = min(sum(before) + quota, total)
    quota = after - sum(before)
    # What each tensor lacks of its share, in units of 1/total weight: exact in integers.
    lacks = [
        min(max(0, after * size - have * total), (size - have) * total)
        for size, have in zip(sizes, before, strict=True)
    ]
    quotas = [lack // total for lack in lacks]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(lacks[i] % total), i))
    position = 0
    while sum(quotas) != quota:
        step = 1 if sum(quotas) < quota else -1
        place = position % len(sizes)
        chosen = by_remainder[place if step > 0 else -1 - place]
        if 0 <= quotas[chosen] + step <= sizes[chosen] - before[chosen]:
            quotas[chosen] += step
        position += 1
    return quotas


def _quotas(
    quota: int, sources: Sequence[Source], selected: Sequence[Tensor], ranks: Ranks | None
) -> list[int]:
    sizes, before = [s.numel for s in sources], [s.numel() for s in selected]
    if ranks is not None:
        sizes, before = (ranks.table(own).sum(0).tolist() for own in (sizes, before))
    return layer_quotas(quota, sizes, before)


def _pick_rows(
    sources: Sequence[Source],
    quota: int,
    selected: Sequence[Tensor],
    ranking: str,
    row_sizes: Sequence[int],
    distribution: ScoreDistribution | None,
    ranks: Ranks | None,
) -> list[Tensor]:
    parts = [
        _row_scores(source, size, before)
        for source, size, before in zip(sources, row_sizes, selected, strict=True)
    ]
    scores = parts if ranks is None else [ranks.concatenated(part) for part in parts]
    if ranking == "global":
        rows = _best_rows(scores, row_sizes, quota)
    else:
        quotas = _quotas(quota, sources, selected, ranks)
        rows = [
            _best_rows([score], [size], own)[0]
            for score, size, own in zip(scores, row_sizes, quotas, strict=True)
        ]
    if distribution is not None:
        for score, chosen in zip(scores, rows, strict=True):
            distribution.add_scores(score[score >= 0], score[chosen])
    if ranks is not None:
        rows = _own_rows(rows, [part.numel() for part in parts], ranks)
    return [
        (chosen[:, None] * size + torch.arange(size, device=chosen.device))
        .reshape(-1)
        .to(source.device)
        for chosen, size, source in zip(rows, row_sizes, sources, strict=True)
    ]


def _own_rows(rows: Sequence[Tensor], counts: list[int], ranks: Ranks) -> list[Tensor]:
    """Return those of chosen rows that lie in this rank's parts, counted from their first row."""
    firsts = ranks.table(counts)[: ranks.rank].sum(0).tolist()
    own = (r - first for r, first in zip(rows, firsts, strict=True))
    return [r[(r >= 0) & (r < count)] for r, count in zip(own, counts, strict=True)]


def _row_scores(source: Source, size: int, selected: Tensor) -> Tensor:
    """Return the mean absolute score of each row, -1 where it is selected or not finite; on CPU."""
    rows = source.numel // size
    step = max(1, (1 << 20) // size)
    parts = [
        source.read(first * size, min(first + step, rows) * size).abs().view(-1, size).mean(1)
        for first in range(0, rows, step)
    ]
    means = torch.cat(parts).cpu() if parts else torch.zeros(0)
    means[~torch.isfinite(means)] = -1
    means[(selected[::size] // size).cpu()] = -1
    return means


def _best_rows(scores: Sequence[Tensor], sizes: Sequence[int], quota: int) -> list[Tensor]:
    """Return for each tensor the rows that come first, while all of them fit into the quota."""
    every = torch.cat(list(scores))
    counts = [0, *(s.numel() for s in scores)]
    starts = torch.tensor(counts, device=every.device).cumsum(0)
    order = torch.sort(every, descending=True, stable=True).indices
    order = order[every[order] >= 0]
    lengths = every.new_tensor(sizes, dtype=torch.int64).repeat_interleave(starts.diff())
    fits = int((lengths[order].cumsum(0) <= quota).sum())
    chosen = order[:fits].sort().values
    cuts = torch.searchsorted(chosen, starts).tolist()
    return [
        chosen[a:b] - start
        for a, b, start in zip(cuts[:-1], cuts[1:], starts[:-1].tolist(), strict=True)
    ]
