# SPDX-License-Identifier: Apache-2.0
"""Exact global top-k over many tensors, streamed.

Absolute values of floats order like the integers of their bit patterns, so two histograms (16 and
15 bits) give the exact k-th largest without sorting or concatenating. Ties go to the entry that
comes first (tensor order, then index order). Extra memory does not depend on the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import SelectionError

_LOW_BITS = 15
_NUM_HIGH = 1 << 16
_INF_KEY = 0x7F800000  # bit pattern of infinity; larger patterns are NaN
_CHUNK = 1 << 22  # entries looked at together: 16 MiB of keys


def streaming_topk(
    scores: Sequence[Tensor], k: int, excluded: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Return the positions of the k largest absolute values over all tensors.

    Args:
        scores: float32 tensors of any shape; only their absolute values count. Entries that are
            not finite are never selected.
        k: Number of entries to select over all tensors together.
        excluded: For each tensor the flat positions (int64, strictly increasing) that must not be
            selected, or None.

    Returns:
        For each tensor its selected flat positions, int64, strictly increasing, on its device.

    Raises:
        SelectionError: If fewer than k entries may be selected.
    """
    banned = list(excluded) if excluded is not None else [None] * len(scores)
    high = _histogram(scores, banned, lambda key: (key >> _LOW_BITS) + 1, _NUM_HIGH + 1)[1:]
    available = int(high.sum())
    if k > available:
        raise SelectionError(
            f"Cannot select {k} weights: only {available} have a finite score and are not selected "
            "yet. Are gradients NaN or infinite?"
        )
    if k == 0:
        return [torch.empty(0, dtype=torch.int64, device=s.device) for s in scores]
    top, above = _kth_bin(high, k)
    low = _histogram(
        scores,
        banned,
        lambda key: torch.where((key >> _LOW_BITS) == top, (key & ((1 << _LOW_BITS) - 1)) + 1, 0),
        (1 << _LOW_BITS) + 1,
    )[1:]
    bottom, above_low = _kth_bin(low, k - above)
    threshold = (top << _LOW_BITS) | bottom
    return _collect(scores, banned, threshold, ties=k - above - above_low)


def _chunks(score: Tensor, banned: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, keys) of a tensor's pieces; keys are -1 where not to be selected."""
    flat = score.detach().reshape(-1)
    if flat.dtype != torch.float32:
        flat = flat.float()
    for start in range(0, flat.numel(), _CHUNK):
        keys = flat[start : start + _CHUNK].view(torch.int32) & 0x7FFFFFFF
        keys.masked_fill_(keys >= _INF_KEY, -1)
        if banned is not None and banned.numel():
            ends = torch.tensor([start, start + keys.numel()], device=banned.device)
            first, last = torch.searchsorted(banned, ends).tolist()
            keys[banned[first:last] - start] = -1
        yield start, keys


def _histogram(
    scores: Sequence[Tensor],
    banned: Sequence[Tensor | None],
    bin_of: Callable[[Tensor], Tensor],
    size: int,
) -> Tensor:
    """Count entries by bin; bin 0 takes what does not count."""
    counts = torch.zeros(size, dtype=torch.int64)
    for score, ban in zip(scores, banned, strict=True):
        for _, keys in _chunks(score, ban):
            counts += torch.bincount(bin_of(keys), minlength=size).cpu()
    return counts


def _kth_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest entry and how many lie in bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(k)))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def _collect(
    scores: Sequence[Tensor], banned: Sequence[Tensor | None], threshold: int, ties: int
) -> list[Tensor]:
    selected = []
    for score, ban in zip(scores, banned, strict=True):
        parts = []
        for start, keys in _chunks(score, ban):
            take = keys > threshold
            if ties:
                equal = (keys == threshold).nonzero().squeeze(1)[:ties]
                take[equal] = True
                ties -= equal.numel()
            parts.append(take.nonzero().squeeze(1) + start)
        empty = torch.empty(0, dtype=torch.int64, device=score.device)
        selected.append(torch.cat(parts) if parts else empty)
    return selected
