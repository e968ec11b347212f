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
    if _num_ranks() > 1:
        for accumulator in accumulators.values():
            dist.all_reduce(accumulator.sum)


def gather_sums(accumulators: Mapping[str, AccumulatedGradient]) -> dict[str, Tensor]:
    """Return the sums of all ranks together, for a checkpoint; a call for every rank to make.

    The accumulators go on with their own share. On a single process the tensors are theirs.
    """
    if _num_ranks() == 1:
        return {name: accumulator.sum for name, accumulator in accumulators.items()}
    sums = {name: accumulator.sum.clone() for name, accumulator in accumulators.items()}
    for tensor in sums.values():
        dist.all_reduce(tensor)
    return sums


def scatter_sums(
    accumulators: Mapping[str, AccumulatedGradient], sums: Mapping[str, Tensor]
) -> None:
    """Take up what `gather_sums` returned: the first rank all of it, the others nothing."""
    for name, accumulator in accumulators.items():
        if _num_ranks() > 1 and dist.get_rank() > 0:
            accumulator.reset()
        else:
            accumulator.sum.copy_(sums[name])


def non_finite(accumulators: Mapping[str, AccumulatedGradient]) -> list[str]:
    """Return the names of the tensors whose scores hold NaN or infinity."""
    return [name for name, acc in accumulators.items() if not bool(torch.isfinite(acc.sum).all())]


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
