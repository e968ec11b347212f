# SPDX-License-Identifier: Apache-2.0
"""Exact global top-k over many tensors, streamed.

Absolute values of floats order like the integers of their bit patterns, so two histograms (16 and
15 bits) give the exact k-th largest without sorting or concatenating. Ties go to the entry that
comes first (tensor order, then index order). Extra memory does not depend on the model's size, nor
on how many entries are selected already: those are marked in their scores.

On a GPU nothing is asked for each piece. Counts stay there until all of a device are together, and
a piece gives its positions once it is known how many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SelectionError
from .score_distribution import LOW_BITS, NUM_BINS, ScoreDistribution

_LOW_MASK = (1 << LOW_BITS) - 1
_INF_KEY = 0x7F800000  # bit pattern of infinity; larger patterns are NaN
_CHUNK = 1 << 20  # entries looked at together: 4 MiB of keys, which stay in cache
_DEVICE_CHUNK = 1 << 22  # the same where a launch costs more than a miss: 16 MiB of keys
#: Score of an entry that must not be selected (again).
TAKEN = float("inf")
_RANDOM_BLOCK = 1 << 16


class Source(Protocol):
    """Scores of one tensor, read piece by piece."""

    @property
    def numel(self) -> int:
        """Number of entries."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the pieces lie."""
        ...

    def read(self, first: int, last: int) -> Tensor:
        """Return the scores of flat positions first to last - 1, float32."""
        ...


class Ranks(Protocol):
    """Processes that each hold a part of every tensor (see `sparse.shards.Ranks`)."""

    # ruff: disable[D102]
    @property
    def rank(self) -> int: ...
    def total(self, counts: Tensor) -> Tensor: ...
    def table(self, numbers: list[int]) -> Tensor: ...
    def concatenated(self, part: Tensor) -> Tensor: ...

    # ruff: enable[D102]


@dataclass(frozen=True)
class TensorSource:
    """Scores that lie in a tensor, or in the product of two.

    Attributes:
        tensor: Scores, any shape and float dtype.
        factor: A tensor of the same shape to multiply them by, or None.
    """

    tensor: Tensor
    factor: Tensor | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.tensor.numel()

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.tensor.device

    def read(self, first: int, last: int) -> Tensor:
        """Return a piece, float32 (a view where the tensor is float32 and has no factor)."""
        piece = self.tensor.detach().reshape(-1)[first:last].float()
        if self.factor is None:
            return piece
        product = piece * self.factor.detach().reshape(-1)[first:last].float()
        return product.masked_fill_(piece.isinf(), TAKEN)  # times 0 it would not be a number


@dataclass(frozen=True)
class RandomSource:
    """Uniform random scores that are made when they are read, the same each time.

    Attributes:
        numel: Number of entries.
        seed: What the scores depend on, with the position alone.
        device: Where the pieces shall lie.
    """

    numel: int
    seed: str
    device: torch.device

    def read(self, first: int, last: int) -> Tensor:
        """Return a piece; its values do not depend on how the tensor is cut."""
        blocks = range(first // _RANDOM_BLOCK, (last - 1) // _RANDOM_BLOCK + 1)
        drawn = torch.cat([self._block(block) for block in blocks])
        start = first - blocks.start * _RANDOM_BLOCK
        return drawn[start : start + last - first].to(self.device)

    def _block(self, block: int) -> Tensor:
        seed = Random(f"{self.seed}/{block}").getrandbits(63)
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.rand(_RANDOM_BLOCK, generator=generator, dtype=torch.float32, device="cpu")


def streaming_topk(
    scores: Sequence[Tensor | Source],
    k: int,
    distribution: ScoreDistribution | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Return the positions of the k largest absolute values over all tensors.

    Args:
        scores: Float tensors of any shape, or sources of scores; only absolute values count,
            compared in float32. Entries that are not finite are never selected, such as those that
            are `TAKEN`.
        k: Number of entries to select over all tensors together.
        distribution: Gets the finite scores, and the k-th largest of them.
        ranks: Where each rank has a part of every tensor, the ranks; then k counts over all of
            them, and positions are in the part.

    Returns:
        For each tensor its selected flat positions, int64, strictly increasing, on its device.

    Raises:
        SelectionError: If fewer than k entries may be selected.
    """
    sources = [TensorSource(s) if isinstance(s, Tensor) else s for s in scores]
    return topk_of_each([sources], [k], distribution, ranks)[0]


def topk_of_each(
    groups: Sequence[Sequence[Source]],
    quotas: Sequence[int],
    distribution: ScoreDistribution | None = None,
    ranks: Ranks | None = None,
) -> list[list[Tensor]]:
    """Return the same for several groups of tensors, each of which has a k of its own."""
    highs = _histograms(groups, NUM_BINS, [lambda keys: (keys >> LOW_BITS, None)] * len(groups))
    highs = _totals(highs, ranks)
    for high, k in zip(highs, quotas, strict=True):
        high[_INF_KEY >> LOW_BITS :] = 0  # infinite and NaN
        if k > (available := int(high.sum())):
            raise SelectionError(
                f"Cannot select {k} weights: only {available} have a finite score and are not "
                "selected yet. Are gradients NaN or infinite?"
            )
    tops = [_kth_bin(high, k) if k else (0, 0) for high, k in zip(highs, quotas, strict=True)]
    lows = _histograms(groups, 1 << LOW_BITS, [partial(_low_bits, top) for top, _ in tops])
    lows = _totals(lows, ranks)
    thresholds, ties = [], []
    for high, low, (top, above), k in zip(highs, lows, tops, quotas, strict=True):
        bottom, above_low = _kth_bin(low, k - above) if k else (0, 0)
        thresholds.append((top << LOW_BITS) | bottom if k else _INF_KEY)
        ties.append(k - above - above_low)
        if distribution is not None:
            distribution.add(high, thresholds[-1] if k else None)
    if ranks is not None:
        return _collect_over_ranks(groups, thresholds, ties, ranks)
    return _collect(groups, thresholds, ties)


def _totals(counts: list[Tensor], ranks: Ranks | None) -> list[Tensor]:
    return counts if ranks is None else list(ranks.total(torch.stack(counts)))


def _collect_over_ranks(
    groups: Sequence[Sequence[Source]],
    thresholds: Sequence[int],
    ties: Sequence[int],
    ranks: Ranks,
) -> list[list[Tensor]]:
    """Return this rank's share of what `_collect` would return of all ranks."""
    every = [threshold for own, threshold in zip(groups, thresholds, strict=True) for _ in own]
    single = [[source] for own in groups for source in own]
    equal = torch.stack([_num_equal(own, t).cpu() for (own,), t in zip(single, every, strict=True)])
    table, shares = ranks.table(equal.tolist()), []
    for own, most in zip(groups, ties, strict=True):
        first = len(shares)
        shares += share_ties(table[:, first : first + len(own)], most, ranks.rank)
    found = iter(_collect(single, every, shares))
    return [[next(found)[0] for _ in own] for own in groups]


def share_ties(counts: Tensor, ties: int, rank: int) -> list[int]:
    """Return how many of a rank's equal scores are among the first ones of all ranks.

    Args:
        counts: Number of equal scores by rank and tensor, int64 (ranks, tensors).
        ties: How many may be taken over all tensors and ranks, in the order of positions: by
            tensor, then by rank, since a rank's part of a tensor follows that of the one before.
        rank: The rank.
    """
    every = counts.T  # (tensors, ranks)
    before = every.flatten().cumsum(0).view_as(every) - every
    left = (ties - before[:, rank]).clamp(min=0)
    return torch.minimum(left, every[:, rank]).tolist()


def _num_equal(source: Source, threshold: int) -> Tensor:
    """Count entries of a tensor that are equal to the threshold; on its device."""
    found = torch.zeros((), dtype=torch.int64, device=source.device)
    for _, keys in _keys(source):
        found += (keys == threshold).sum()
    return found


def _low_bits(top: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low bits of keys, and which of them are in one bin of the first histogram."""
    return keys & _LOW_MASK, (keys >> LOW_BITS) == top


def _keys(source: Source) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, keys) of a tensor's pieces."""
    size = _CHUNK if source.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, source.numel, size):
        piece = source.read(start, min(start + size, source.numel))
        yield start, piece.view(torch.int32) & 0x7FFFFFFF


def _histograms(
    groups: Sequence[Sequence[Source]],
    size: int,
    bins_of: Sequence[Callable[[Tensor], tuple[Tensor, Tensor | None]]],
) -> list[Tensor]:
    """Count entries of each group by bin, on the CPU.

    Args:
        groups: Tensors by group.
        size: Number of bins.
        bins_of: For each group what returns the bins of keys, and which of them count.
    """
    counts: list[dict[torch.device, Tensor]] = []
    for sources, bins in zip(groups, bins_of, strict=True):
        counts.append({})
        for source in sources:
            if source.device not in counts[-1]:
                zeros = torch.zeros(size, dtype=torch.int64, device=source.device)
                counts[-1][source.device] = zeros
            for _, keys in _keys(source):
                _count(counts[-1][source.device], *bins(keys))
    totals = torch.zeros(len(groups), size, dtype=torch.int64, device="cpu")
    for device in {device for own in counts for device in own}:
        having = [number for number, own in enumerate(counts) if device in own]
        totals[having] += torch.stack([counts[number][device] for number in having]).cpu()
    return list(totals)


def _count(counts: Tensor, bins: Tensor, counting: Tensor | None) -> None:
    if bins.is_cpu:
        bins = bins if counting is None else bins[counting]
        counts += torch.bincount(bins, minlength=counts.numel())
    else:  # neither `bincount` nor a mask works without waiting; those left out add 0
        ones = torch.ones_like(bins) if counting is None else counting
        counts.index_add_(0, bins, ones.to(counts.dtype))


def _kth_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest entry and how many lie in bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def _collect(
    groups: Sequence[Sequence[Source]], thresholds: Sequence[int], ties: Sequence[int]
) -> list[list[Tensor]]:
    """Return each group's entries above its threshold, and its first `ties` that are equal."""
    known = iter(_sizes(groups, thresholds))
    selected = []
    for sources, threshold, most in zip(groups, thresholds, ties, strict=True):
        selected.append([])
        left = most
        for source in sources:
            parts = [torch.empty(0, dtype=torch.int64, device=source.device)]
            for start, keys in _keys(source):
                keys.masked_fill_(keys >= _INF_KEY, -1)
                num_equal, num_above = next(known) if not keys.is_cpu else (-1, -1)
                found, first = keys > threshold, 0
                if left:
                    equal = keys == threshold
                    num_equal = int(equal.sum()) if keys.is_cpu else num_equal
                    first = min(left, num_equal)
                    left -= first
                    found |= equal if first == num_equal else equal & (equal.cumsum(0) <= first)
                parts.append(_places(found, num_above + first) + start)
            selected[-1].append(torch.cat(parts))
    return selected


def _sizes(groups: Sequence[Sequence[Source]], thresholds: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many entries are equal to the threshold and above it, for pieces on devices."""
    found = [
        torch.stack([(keys == threshold).sum(), ((keys > threshold) & (keys < _INF_KEY)).sum()])
        for sources, threshold in zip(groups, thresholds, strict=True)
        for source in sources
        if source.device.type != "cpu"
        for _, keys in _keys(source)
    ]
    if not found:
        return []
    return torch.stack([own.to(found[0].device) for own in found]).tolist()


def _places(mask: Tensor, count: int) -> Tensor:
    """Return where a mask is true, which is `count` times."""
    if mask.is_cpu:
        return mask.nonzero().squeeze(1)
    places = mask.cumsum(0).sub_(1).masked_fill_(~mask, count)  # the others share one more place
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    found.scatter_(0, places, torch.arange(mask.numel(), device=mask.device))
    return found[:count]
