# SPDX-License-Identifier: Apache-2.0
"""One pick: global or per tensor; single weights, blocks or output rows (Eq. 5, Alg. 1 line 10).

And what it fills: a pool, at once without data, or round by round until it is finished.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SelectionError
from ..sparse.pool import Pool
from .rules import SelectionRules
from .score_distribution import ScoreDistribution
from .topk import TAKEN, RandomSource, Ranks, Source, TensorSource, streaming_topk, topk_of_each

#: Over which weights scores are compared.
RANKINGS = ("global", "layer", "output")
#: Neighbours in a row that are selected as one.
BLOCKS = {"block": 16, "block64": 64}
#: What is selected as one.
GRANULARITIES = ("weight", *BLOCKS, "row")
#: Entries that are read together.
_PIECE = 1 << 20
#: Tensors whose own picks are made together: half a MiB of counts for each.
_TOGETHER = 16


def pick(
    sources: Sequence[Source],
    quota: int,
    before: Sequence[int] | None = None,
    *,
    ranking: str = "global",
    granularity: str = "weight",
    row_sizes: Sequence[int] | None = None,
    distribution: ScoreDistribution | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Return the flat positions to admit, for each tensor.

    Args:
        sources: Scores of each tensor; those of entries that were admitted before are `TAKEN`.
        quota: Number of weights to admit over all tensors together. Rows are admitted whole, while
            they fit, blocks while a full one does; the rest of the quota stays open for the next
            pick.
        before: For each tensor (on all ranks) how many were admitted before; None for none.
        ranking: "global" compares all weights with each other; "layer" gives every tensor the
            share of the quota that its size has of all sizes; "output" fills up the rows with the
            fewest weights admitted first, so that all rows of all tensors end with as many.
        granularity: "weight", or "row": all weights of one output feature (channel) together,
            ranked by the mean of their absolute scores. "block" and "block64": 16 and 64
            neighbours in a row (what is left of it at its end), ranked by the norm of their scores.
        row_sizes: The number of weights in a row of each tensor; not needed for "weight", but for
            "output".
        distribution: Gets the scores that are compared (of weights, blocks or rows) and the
            smallest one that is admitted.
        ranks: Where each rank has a part of every tensor (whole rows), the ranks. The quota is for
            all of them, positions are those in the part. Not for "output" and blocks.

    Returns:
        For each tensor positions, int64, strictly increasing.

    Raises:
        SelectionError: If too few weights have a finite score.
    """
    quotas = None
    if ranking == "layer":
        sizes = [source.numel for source in sources]
        sizes = sizes if ranks is None else ranks.table(sizes).sum(0).tolist()
        quotas = layer_quotas(quota, sizes, before or [0] * len(sources))
    if row_sizes is None and (granularity != "weight" or ranking == "output"):
        raise SelectionError(f"pick: {granularity=}, {ranking=} needs row_sizes.")
    if granularity == "row":
        return _pick_rows(sources, quotas or [quota], row_sizes or (), distribution, ranks)
    if granularity in BLOCKS:
        size = BLOCKS[granularity]
        return _pick_blocks(sources, quotas or [quota], row_sizes or (), size, distribution)
    if ranking == "output":
        return _pick_by_output(sources, quota, row_sizes or (), distribution)
    if quotas is None:
        return streaming_topk(sources, quota, distribution, ranks)
    chosen: list[Tensor] = []
    for first in range(0, len(sources), _TOGETHER):
        groups = [[source] for source in sources[first : first + _TOGETHER]]
        found = topk_of_each(groups, quotas[first : first + _TOGETHER], distribution, ranks)
        chosen += [own for (own,) in found]
    return chosen


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
            ranking=rules.ranking,
            granularity=rules.granularity,
            row_sizes=row_sizes(weights),
        )
    )


def is_unfinished(pool: Pool, rules: SelectionRules) -> bool:
    """Whether a run would certainly have selected more.

    Rows and blocks may leave a part of the budget open, and the literal schedule always does. How
    large that part is depends on the run, so the largest possible one passes for finished.
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
    elif rules.granularity in BLOCKS:
        left = BLOCKS[rules.granularity] - 1
        left *= 1 if rules.ranking == "global" else len(pool.weights)
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


def _best(
    choose: Callable[..., list[Tensor]],
    scores: Sequence[Tensor],
    shapes: Sequence[Any],
    quotas: Sequence[int],
) -> list[Tensor]:
    """Return for each tensor what comes first: among all for one quota, else among its own."""
    if len(quotas) == 1:
        return choose(scores, shapes, quotas[0])
    each = zip(scores, shapes, quotas, strict=True)
    return [choose([score], [shape], quota)[0] for score, shape, quota in each]


def _pick_rows(
    sources: Sequence[Source],
    quotas: Sequence[int],
    row_sizes: Sequence[int],
    distribution: ScoreDistribution | None,
    ranks: Ranks | None,
) -> list[Tensor]:
    parts = _row_scores(sources, row_sizes)
    scores = parts if ranks is None else [ranks.concatenated(part) for part in parts]
    rows = _best(_best_rows, scores, row_sizes, quotas)
    if distribution is not None:
        for score, chosen in zip(scores, rows, strict=True):
            distribution.add_scores(score[score >= 0], score[chosen])
    if ranks is not None:
        rows = _own_rows(rows, [part.numel() for part in parts], ranks)
    return [
        (chosen[:, None] * size + torch.arange(size, device=chosen.device))
        .reshape(-1)
        .to(source.device, non_blocking=True)
        for chosen, size, source in zip(rows, row_sizes, sources, strict=True)
    ]


def _own_rows(rows: Sequence[Tensor], counts: list[int], ranks: Ranks) -> list[Tensor]:
    """Return those of chosen rows that lie in this rank's parts, counted from their first row."""
    firsts = ranks.table(counts)[: ranks.rank].sum(0).tolist()
    own = (r - first for r, first in zip(rows, firsts, strict=True))
    return [r[(r >= 0) & (r < count)] for r, count in zip(own, counts, strict=True)]


def _row_scores(sources: Sequence[Source], sizes: Sequence[int]) -> list[Tensor]:
    """Return the mean absolute score of each row, -1 where it is not finite; on the CPU."""
    means, counts = [], []
    for source, size in zip(sources, sizes, strict=True):
        rows = source.numel // size
        step = max(1, (1 << 20) // size)
        means += [
            source.read(first * size, min(first + step, rows) * size).abs().view(-1, size).mean(1)
            for first in range(0, rows, step)
        ]
        counts.append(rows)
    if not means:  # a rank may have no row of any tensor
        return [torch.zeros(0, dtype=torch.float32, device="cpu")] * len(sources)
    joined = torch.cat([part.to(means[0].device) for part in means]).cpu()  # one wait for all
    joined[~torch.isfinite(joined)] = -1
    return list(joined.split(counts))


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


def _pick_by_output(
    sources: Sequence[Source],
    quota: int,
    row_sizes: Sequence[int],
    distribution: ScoreDistribution | None,
) -> list[Tensor]:
    """Admit the best of each row until all rows have as many, the last ones by their scores."""
    tensors = list(zip(sources, row_sizes, strict=True))
    have, room = zip(*(_counts(*tensor, distribution) for tensor in tensors), strict=True)
    level = _level(torch.cat(have), torch.cat(room), quota)
    ranked = [
        _ranked_rows(*tensor, level - 1 - own) for tensor, own in zip(tensors, have, strict=True)
    ]
    left = quota - sum(sure.numel() for sure, _, _, _ in ranked)
    chosen = streaming_topk([scores for _, _, _, scores in ranked], left)
    if distribution is not None:
        for (_, scores, _, last), own in zip(ranked, chosen, strict=True):
            distribution.add_scores(scores[:0].cpu(), torch.cat((scores, last[own])).cpu())
    return [
        torch.cat((sure, last[own])).sort().values
        for (sure, _, last, _), own in zip(ranked, chosen, strict=True)
    ]


def _some_rows(source: Source, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, absolute scores of some rows)."""
    step = max(1, (1 << 20) // size)
    for first in range(0, source.numel // size, step):
        scores = source.read(first * size, min((first + step) * size, source.numel)).abs()
        yield first, scores.view(-1, size)


def _counts(
    source: Source, size: int, distribution: ScoreDistribution | None
) -> tuple[Tensor, Tensor]:
    """Return how many entries each row has given, and how many more it may give, on the CPU."""
    have, room = [], []
    for _, scores in _some_rows(source, size):
        have.append((scores == TAKEN).sum(1).cpu())
        is_open = torch.isfinite(scores)
        room.append(is_open.sum(1).cpu())
        if distribution is not None:
            distribution.add_scores(scores[is_open].cpu(), scores[0, :0].cpu())
    return torch.cat(have), torch.cat(room)


def _level(have: Tensor, room: Tensor, quota: int) -> int:
    """Return how many entries the fullest rows have after a pick that evens all rows out."""
    if quota > int(room.sum()):
        raise SelectionError(
            f"Cannot select {quota} weights: only {int(room.sum())} have a finite score and are "
            "not selected yet. Are gradients NaN or infinite?"
        )
    highest = int((have + room).max())
    return bisect_left(
        range(highest + 1),
        quota,
        key=lambda level: int((level - have).clamp(min=0).minimum(room).sum()),
    )


def _ranked_rows(source: Source, size: int, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return positions and scores before a rank in each row, and those at it; ties by position."""
    found: list[list[Tensor]] = [[], [], [], []]
    for first, rows_of_scores in _some_rows(source, size):
        scores = rows_of_scores.masked_fill(~torch.isfinite(rows_of_scores), -1)
        rows = torch.arange(first, first + len(scores), device=scores.device)[:, None]
        ordered = scores.sort(dim=1, descending=True, stable=True)
        places, column = ordered.indices + rows * size, torch.arange(size, device=scores.device)
        limit = ranks.to(scores.device)[rows]
        is_open = ordered.values >= 0
        before, at = (column < limit) & is_open, (column == limit) & is_open
        for parts, tensor in zip(
            found,
            (places[before], ordered.values[before], places[at], ordered.values[at]),
            strict=True,
        ):
            parts.append(tensor)
    sure, scores, last, last_scores = (torch.cat(parts) for parts in found)
    return sure, scores, last, last_scores


class _Grid(NamedTuple):
    """How a tensor is cut into blocks, counted row after row; the last of a row may be shorter."""

    length: int  # entries of a row
    size: int  # most entries of a block

    @property
    def per_row(self) -> int:
        return -(-self.length // self.size)

    def positions_in(self, blocks: Tensor) -> Tensor:
        """Return the entries of blocks, strictly increasing where these are."""
        columns = (blocks % self.per_row * self.size)[:, None]
        columns = columns + torch.arange(self.size, device=blocks.device)
        rows = blocks // self.per_row * self.length
        return (rows[:, None] + columns)[columns < self.length]


def _pick_blocks(
    sources: Sequence[Source],
    quotas: Sequence[int],
    row_sizes: Sequence[int],
    size: int,
    distribution: ScoreDistribution | None,
) -> list[Tensor]:
    # Single entries are rows of a vector: it is cut as one row.
    lengths = [n if n > 1 else s.numel for n, s in zip(row_sizes, sources, strict=True)]
    grids = [_Grid(length, size) for length in lengths]
    scores = [_block_scores(source, grid) for source, grid in zip(sources, grids, strict=True)]
    blocks = _best(_best_blocks, scores, grids, quotas)
    if distribution is not None:
        for score, chosen in zip(scores, blocks, strict=True):
            distribution.add_scores(score[score.isfinite()].cpu(), score[chosen].cpu())
    return [grid.positions_in(chosen) for grid, chosen in zip(grids, blocks, strict=True)]


def _block_scores(source: Source, grid: _Grid) -> Tensor:
    """Return the norm of each block's scores, float32; not finite where one of them is not."""
    rows, step = source.numel // grid.length, max(1, _PIECE // grid.length)
    parts = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        piece = source.read(first * grid.length, last * grid.length).view(-1, grid.length)
        piece = nn.functional.pad(piece, (0, grid.per_row * grid.size - grid.length))
        # Squares of small scores would vanish in float32.
        norms = torch.linalg.vector_norm(piece.view(-1, grid.size), dim=1, dtype=torch.float64)
        parts.append(norms.float())
    return torch.cat(parts)


def _best_blocks(scores: Sequence[Tensor], grids: Sequence[_Grid], quota: int) -> list[Tensor]:
    """Return for each tensor the blocks that come first, while a full one fits into the quota."""
    available = sum(int(score.isfinite().sum()) for score in scores)
    count, left = 0, quota
    found = [torch.empty(0, dtype=torch.int64, device=score.device) for score in scores]
    while left >= grids[0].size and count < available:
        count = min(count + left // grids[0].size, available)  # more where some are shorter
        found = streaming_topk(scores, count)
        pairs = zip(found, grids, strict=True)
        left = quota - sum(grid.positions_in(chosen).numel() for chosen, grid in pairs)
    return found
