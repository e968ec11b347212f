# SPDX-License-Identifier: Apache-2.0
"""The distribution of the scores that one pick compared, out of the counts that it makes anyway."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

#: Bits of a float32 below those that name a bin (sign left out: 8 of exponent, 8 of mantissa).
LOW_BITS = 15
NUM_BINS = 1 << 16
#: What `ScoreDistribution.summary` reports.
QUANTILES = (0.5, 0.9, 0.99)


class ScoreDistribution:
    """Counts of absolute scores by bin, and the smallest score that was admitted.

    Attributes:
        counts: Number of scores in each bin, int64 ``(NUM_BINS,)``, on the CPU. A bin holds the
            float32 numbers whose bit patterns agree above the lowest `LOW_BITS`.
        threshold: Smallest absolute score that was admitted; None where none was.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64, device="cpu")
        self.threshold: float | None = None

    def add(self, counts: Tensor, threshold: int | None) -> None:
        """Add the scores of one comparison.

        Args:
            counts: As the attribute.
            threshold: Bit pattern of the smallest score admitted, None where none was.
        """
        self.counts += counts
        if threshold is not None:
            value = _float(threshold)
            self.threshold = value if self.threshold is None else min(self.threshold, value)

    def add_scores(self, scores: Tensor, admitted: Tensor) -> None:
        """Add the scores of one comparison, which are at hand.

        Args:
            scores: All of them, float32, not negative, on the CPU.
            admitted: Those of them that were admitted.
        """
        bins = scores.view(torch.int32) >> LOW_BITS
        smallest = int(admitted.view(torch.int32).min()) if admitted.numel() else None
        self.add(torch.bincount(bins, minlength=NUM_BINS), smallest)

    def quantile(self, share: float) -> float:
        """Return the smallest score that at least a share of all scores do not exceed.

        It is rounded down to the bin's first number, by less than 0.4 % for normal numbers. NaN
        without any score.
        """
        total = int(self.counts.sum())
        if not total:
            return math.nan
        rank = max(1, math.ceil(share * total))
        return _float(int(torch.searchsorted(self.counts.cumsum(0), rank)) << LOW_BITS)

    def summary(self) -> dict[str, float]:
        """Return `p50`, `p90`, `p99`, `max` and, where something was admitted, `threshold`."""
        found = {f"p{round(100 * q)}": self.quantile(q) for q in QUANTILES}
        found["max"] = self.quantile(1)
        if self.threshold is not None:
            found["threshold"] = self.threshold
        return found


def _float(key: int) -> float:
    """Return the float32 of a bit pattern."""
    return struct.unpack("<f", struct.pack("<I", key))[0]
