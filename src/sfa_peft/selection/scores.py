# SPDX-License-Identifier: Apache-2.0
"""Score accumulators: what a round adds up per weight (Eq. 4, Alg. 1 line 8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class AccumulatedGradient:
    """Signed sum of a weight's gradient over the micro-batches of a round.

    Sums are linear, so ranks add locally and one reduction per round is exact.

    Args:
        weight: The weight that is scored; the sum has its shape, fp32, on its device.
    """

    def __init__(self, weight: Tensor) -> None:
        self.sum = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def __call__(self, grad: Tensor) -> None:
        """Add one dense gradient (any float dtype, unscaled, before clipping)."""
        self.sum.add_(grad)

    def reset(self) -> None:
        """Forget the round."""
        self.sum.zero_()


def reduce_over_ranks(accumulators: Mapping[str, AccumulatedGradient]) -> None:
    """Add the sums of all ranks, so that every rank ranks the same scores; once per round."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for accumulator in accumulators.values():
            dist.all_reduce(accumulator.sum)


def non_finite(accumulators: Mapping[str, AccumulatedGradient]) -> list[str]:
    """Return the names of the tensors whose scores hold NaN or infinity."""
    return [name for name, acc in accumulators.items() if not bool(torch.isfinite(acc.sum).all())]
