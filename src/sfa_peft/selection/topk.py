# SPDX-License-Identifier: Apache-2.0
"""Exact global top-k over many tensors, streamed.

Absolute values of floats order like the integers of their bit patterns, so two histograms (16 and
15 bits) give the exact k-th largest without sorting or concatenating. Ties go to the entry that
comes first (tensor order, then index order). Extra memory does not depend on the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SelectionError
from .distribution import LOW_BITS, NUM_BINS, ScoreDistribution

_LOW_MASK = (1 << LOW_BITS) - 1
_INF_KEY = 0x7F800000  # bit pattern of infinity; larger patterns are NaN
_CHUNK = 1 << 20  # entries looked at together: 4 MiB of keys, which stay in cache
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
        return piece * self.factor.detach().reshape(-1)[first:last].float()


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
    excluded: Sequence[Tensor | None] | None = None,
    distribution: ScoreDistribution | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Return the positions of the k largest absolute values over all tensors.

    Args:
        scores: Float tensors of any shape, or sources of scores; only absolute values count,
            compared in float32. Entries that are not finite are never selected.
        k: Number of entries to select over all tensors together.
        excluded: For each tensor the flat positions (int64, strictly increasing) that must not be
            selected, or None.
        distribution: Gets the finite scores that are not excluded, and the k-th largest of them.
        ranks: Where each rank has a part of every tensor, the ranks; then k counts over all of
            them, and positions are in the part.

    Returns:
        For each tensor its selected flat positions, int64, strictly increasing, on its device.

    Raises:
        SelectionError: If fewer than k entries may be selected.
    """
    sources = [TensorSource(s) if isinstance(s, Tensor) else s for s in scores]
    banned = list(excluded) if excluded is not None else [None] * len(sources)
    high = _total(_histogram(sources, banned, lambda keys: keys >> LOW_BITS, NUM_BINS), ranks)
    high[_INF_KEY >> LOW_BITS :] = 0  # infinite and NaN
    available = int(high.sum())
    if k > available:
        raise SelectionError(
            f"Cannot select {k} weights: only {available} have a finite score and are not selected "
            "yet. Are gradients NaN or infinite?"
        )
    if k == 0:
        _report(distribution, high, None)
        return [torch.empty(0, dtype=torch.int64, device=s.device) for s in sources]
    top, above = _kth_bin(high, k)
    low = _total(
        _histogram(sources, banned, lambda keys: _low_bits(keys, top), 1 << LOW_BITS), ranks
    )
    bottom, above_low = _kth_bin(low, k - above)
    threshold = (top << LOW_BITS) | bottom
    _report(distribution, high, threshold)
    ties = k - above - above_low
    if ranks is None:
        return _collect(sources, banned, threshold, ties)
    pairs = list(zip(sources, banned, strict=True))
    shares = share_ties([_num_equal(*pair, threshold) for pair in pairs], ties, ranks)
    return [
        _collect([source], [ban], threshold, share)[0]
        for (source, ban), share in zip(pairs, shares, strict=True)
    ]


def _total(counts: Tensor, ranks: Ranks | None) -> Tensor:
    return counts if ranks is None else ranks.total(counts)


def share_ties(counts: Sequence[int], ties: int, ranks: Ranks) -> list[int]:
    """Return how many of the equal scores in each part are among the first ones of all ranks.

    Args:
        counts: Number of equal scores in this rank's part of each tensor.
        ties: How many may be taken over all tensors and ranks, in the order of positions: by
            tensor, then by rank, since a rank's part of a tensor follows that of the one before.
        ranks: The ranks.
    """
    every = ranks.table(list(counts)).T  # (tensors, ranks)
    before = every.flatten().cumsum(0).view_as(every) - every
    left = (ties - before[:, ranks.rank]).clamp(min=0)
    return torch.minimum(left, every[:, ranks.rank]).tolist()


def _report(distribution: ScoreDistribution | None, counts: Tensor, threshold: int | None) -> None:
    if distribution is not None:
        distribution.add(counts, threshold)


def _low_bits(keys: Tensor, top: int) -> Tensor:
    """Return the low bits of the keys in one bin of the first histogram."""
    first = top << LOW_BITS
    return keys[(keys >= first) & (keys <= (first | _LOW_MASK))] & _LOW_MASK


def _chunks(source: Source, banned: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (first position, keys, places of banned entries among them) of a tensor's pieces."""
    for start in range(0, source.numel, _CHUNK):
        stop = min(start + _CHUNK, source.numel)
        keys = source.read(start, stop).view(torch.int32) & 0x7FFFFFFF
        inside = None
        if banned is not None and banned.numel():
            ends = torch.tensor([start, stop], device=banned.device)
            first, last = torch.searchsorted(banned, ends).tolist()
            inside = banned[first:last] - start
        yield start, keys, inside


def _histogram(
    sources: Sequence[Source],
    banned: Sequence[Tensor | None],
    bins_of: Callable[[Tensor], Tensor],
    size: int,
) -> Tensor:
    """Count entries that are not banned by bin."""
    counts = torch.zeros(size, dtype=torch.int64, device="cpu")
    for source, ban in zip(sources, banned, strict=True):
        own = torch.zeros(size, dtype=torch.int64, device=source.device)
        for _, keys, inside in _chunks(source, ban):
            own += torch.bincount(bins_of(keys), minlength=size)
            if inside is not None:
                own -= torch.bincount(bins_of(keys[inside]), minlength=size)
        counts += own.cpu()
    return counts


def _num_equal(source: Source, ban: Tensor | None, threshold: int) -> int:
    """Count entries of a tensor that are equal to the threshold and not banned."""
    found = 0
    for _, keys, inside in _chunks(source, ban):
        found += int((keys == threshold).sum())
        if inside is not None:
            found -= int((keys[inside] == threshold).sum())
    return found


def _kth_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest entry and how many lie in bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def _collect(
    sources: Sequence[Source], banned: Sequence[Tensor | None], threshold: int, ties: int
) -> list[Tensor]:
    """Return the entries above the threshold, and the first `ties` that are equal to it."""
    selected = []
    for source, ban in zip(sources, banned, strict=True):
        parts = []
        for start, keys, inside in _chunks(source, ban):
            if inside is not None:
                keys[inside] = -1
            keys[keys >= _INF_KEY] = -1
            if ties:
                equal = (keys == threshold).nonzero().squeeze(1)[:ties]
                keys[equal] = threshold + 1
                ties -= equal.numel()
            parts.append((keys > threshold).nonzero().squeeze(1) + start)
        empty = torch.empty(0, dtype=torch.int64, device=source.device)
        selected.append(torch.cat(parts) if parts else empty)
    return selected
