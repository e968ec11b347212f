# SPDX-License-Identifier: Apache-2.0
"""What a round adds up per weight tensor (Alg. 1 line 8), on one rank or several.

Sums in bfloat16 are rounded stochastically, so that many small gradients are kept on average. A
bfloat16 is the upper half of a float32: adding a uniform 16-bit number to the lower half before
cutting it off rounds up with the probability that makes the expected value right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import GradientWarning, SelectionError, warn
from ..sparse.shards import Shard
from .scores import Score
from .topk import TensorSource

SCORE_DTYPES = ("float32", "bfloat16")

#: Entries rounded together; also the length of the noise that is used again, turned each time:
#: as many as there are 16-bit numbers.
_TILE = 1 << 16
_INF_BITS = 0x7F800000


class Accumulator:
    """The score of one weight tensor: takes its gradients, gives what is to be ranked.

    Args:
        score: How gradients become a state.
        weight: Returns the weight (it may be replaced while the round lasts).
        dtype: Of the state, "float32" or "bfloat16".
        key: Name of the tensor, for reproducible rounding.
        loss_scale: Returns the factor that the loss is multiplied with now; None where there is
            none. Steps are then brought together first, so that one with an overflow can be left
            out.
        shard: Where the weight is cut over ranks, this rank's part of it: the state is of that
            part, and gets the mean gradient of all ranks.
        can_drop: Whether the present step is kept apart, as `drop_step` needs it: float32, in the
            weight's shape. Scores that are no sums always are.

    Attributes:
        state: What is ranked in the end, in the weight's shape.
        left_out: Number of gradients that were not finite, in the steps of the round that ended;
            on the weight's device.
        change: For a dense score the trained change of every entry, whose data the state is; it
            gets the gradient of an update step as its own. None for other scores.
    """

    def __init__(
        self,
        score: Score,
        weight: Callable[[], Tensor],
        *,
        dtype: str = "float32",
        key: str = "",
        loss_scale: Callable[[], float] | None = None,
        can_drop: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self.score, self.weight, self.key, self.loss_scale = score, weight, key, loss_scale
        self.shard = shard
        self._shares = shard is None and num_ranks() > 1  # each rank has a share of every sum
        like = weight()
        self.state = torch.zeros(like.shape, dtype=getattr(torch, dtype), device=like.device)
        self.change = nn.Parameter(self.state) if score.dense else None
        self.num_added = 0  # what rounding depends on; saved, so that a resumed run rounds alike
        self.can_drop = can_drop or loss_scale is not None or not score.additive
        self.left_out = torch.zeros((), dtype=torch.int64, device=like.device)
        self._left_out_now = torch.zeros_like(self.left_out)  # in the present step
        self._noise = Noise(0, like.device) if dtype == "bfloat16" else None
        self._step: Tensor | None = None  # gradient of the present update step

    def __call__(self, gradient: Tensor) -> None:
        """Take the gradient of one backward (any float dtype, before clipping).

        One that is not finite counts as zero, whatever the loop does about it: it, or what is left
        of it, would outweigh all others.
        """
        low, high = gradient.aminmax()
        finite = torch.isfinite(low) & torch.isfinite(high)
        self._left_out_now += ~finite
        if not (gradient.is_cpu and finite):  # elsewhere, to look would be to wait for the device
            gradient = torch.where(finite, gradient, 0)
        if self.shard is not None:
            gradient = self.shard.averaged(gradient)
        if not self.can_drop:
            self._add(gradient)
            return
        if self.loss_scale is not None:
            gradient = gradient.float() / self.loss_scale()
        if self._step is None:
            self._step = gradient.detach().to(torch.float32, copy=True)
        else:
            self._step.add_(gradient)

    def end_step(self) -> None:
        """Add the gradient of the update step that ended; a call for every rank to make."""
        self.left_out += self._left_out_now
        self._left_out_now.zero_()
        if self._step is None and not self.score.additive and self._shares:
            self._step = torch.zeros_like(self.state, dtype=torch.float32)  # others may have one
        if self._step is None:
            return
        gradient, self._step = self._step, None
        if self.score.additive:
            self._add(gradient)
            return
        if self._shares:
            _average_over_ranks(gradient)
        with torch.no_grad():
            self._update(gradient)

    def drop_step(self) -> None:
        """Forget the gradient of an update step that was skipped."""
        self._left_out_now.zero_()
        self._step = None

    def reset(self) -> None:
        """Forget the round."""
        self.state.zero_()
        self.left_out.zero_()
        self.drop_step()

    def source(self) -> TensorSource:
        """Return what is ranked."""
        return TensorSource(self.state, self.weight() if self.score.times_weight else None)

    def reduce(self) -> None:
        """Add the states of all ranks where each holds a share; at the end of a round."""
        if self.score.additive and self._shares:
            self.state.copy_(_sum_over_ranks(self.state))

    def gather(self) -> Tensor:
        """Return the state of all ranks together, for a checkpoint; a call for every rank."""
        if self.shard is not None:
            return self.shard.joined(self.state).cpu()  # no accelerator has room for all of them
        return _sum_over_ranks(self.state) if self.score.additive else self.state

    def scatter(self, state: Tensor) -> None:
        """Take up what `gather` returned: shares go to the first rank, the others start at zero."""
        if self.shard is not None:
            self.state.copy_(self.shard.part(state))
        elif self.score.additive and self._shares and dist.get_rank() > 0:
            self.reset()
        else:
            self.state.copy_(state)

    def _add(self, gradient: Tensor) -> None:
        self.num_added += 1
        if self._noise is None:
            self.state.add_(gradient)
        else:
            add_rounded(self.state, gradient, self._noise, f"{self.key}/{self.num_added}")

    def _update(self, gradient: Tensor) -> None:
        if self.change is not None:
            self.change.grad = gradient
            return
        if self._noise is None:
            after = self._next_state(gradient, self.state)
            if after is not self.state:  # copied: it may be the weight itself, which we must keep
                self.state.copy_(after)
            return
        before = self.state.float()
        change = self._next_state(gradient, before.clone()).float() - before
        self.num_added += 1
        add_rounded(self.state, change, self._noise, f"{self.key}/{self.num_added}")

    def _next_state(self, gradient: Tensor, state: Tensor) -> Tensor:
        """Return what the score's function makes of a state, if it can be one."""
        weight, update = self.weight(), self.score.update
        stamp = None if weight.is_inference() else weight._version
        found: object = update(weight, gradient, state) if update else state
        if stamp is not None and weight._version != stamp:
            raise SelectionError(
                f"score={self.score.name!r}: the function changed the weight `{self.key}` in "
                "place; it may change the state only. Copy the weight first."
            )
        if isinstance(found, Tensor) and found.shape == self.state.shape:
            return found
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SelectionError(
            f"score={self.score.name!r}: the function must return the new state of `{self.key}`, a "
            f"tensor of shape {list(self.state.shape)}, but it returned {got}."
        )


def warn_of_gaps(accumulators: Mapping[str, Accumulator]) -> None:
    """Say at the end of a round what is missing from its scores."""
    left_out = {name: int(a.left_out) for name, a in accumulators.items() if a.left_out}
    for name, count in list(left_out.items())[:1]:
        others = f" (and some of {len(left_out) - 1} other tensors)" if len(left_out) > 1 else ""
        warn(
            f"`{name}`{others}: {count} gradient{'s' * (count > 1)} of this round held NaN or "
            "infinity and count for nothing in its scores.",
            GradientWarning,
        )
    for name, accumulator in accumulators.items():
        if not bool(torch.isfinite(accumulator.state).all()):
            warn(
                f"`{name}`: scores are NaN or infinite; those weights are skipped.", GradientWarning
            )


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _average_over_ranks(gradient: Tensor) -> None:
    """Replace a gradient by its mean over ranks, as DistributedDataParallel does."""
    _all_reduce(gradient)
    gradient /= num_ranks()


def _sum_over_ranks(state: Tensor) -> Tensor:
    if num_ranks() == 1:
        return state
    total = state.to(torch.float32, copy=True)
    _all_reduce(total)
    return total.to(state.dtype)


def _all_reduce(tensor: Tensor) -> None:
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise SelectionError(
            "The processes could not add up their scores. Did another one fail, or not call "
            f"SFASelector.step after each of its optimizer steps? ({error})"
        ) from error


class Noise:
    """Uniform 16-bit numbers: one tile, turned by another offset for every piece it is used on.

    Args:
        seed: Seed of the tile and of the offsets.
        device: Where the tile lies.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Every number once, so that over all offsets an entry meets each equally often.
        tile = torch.randperm(_TILE, dtype=torch.int32, generator=generator)
        self._tile = torch.cat([tile, tile]).to(device)

    def draw(self, size: int, key: str) -> Tensor:
        """Return `size` numbers (int32, at most a tile) that depend on the key alone."""
        first = Random(key).randrange(_TILE)
        return self._tile[first : first + size]


def add_rounded(target: Tensor, addend: Tensor, noise: Noise, key: str) -> None:
    """Add to a bfloat16 tensor in place, rounding stochastically.

    Args:
        target: bfloat16, contiguous.
        addend: Any float dtype, same number of entries.
        noise: Where random bits come from.
        key: What the bits depend on; the same key gives the same result.
    """
    flat, more = target.view(-1), addend.reshape(-1)
    for first in range(0, flat.numel(), _TILE):
        piece = flat[first : first + _TILE]
        exact = piece.float().add_(more[first : first + _TILE])
        piece.copy_(round_stochastically(exact, noise, f"{key}/{first}"))


def round_stochastically(exact: Tensor, noise: Noise, key: str) -> Tensor:
    """Return a float32 piece (at most a tile, overwritten) rounded to what bfloat16 can hold."""
    bits = exact.view(torch.int32)
    special = (bits & _INF_BITS) == _INF_BITS  # infinity and NaN stay as they are
    rounded = (bits + noise.draw(bits.numel(), key).masked_fill(special, 0)) & -0x10000
    return rounded.view(torch.float32)
