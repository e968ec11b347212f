# SPDX-License-Identifier: Apache-2.0
"""What a round adds up per weight tensor (Alg. 1 line 8), on one rank or several.

Sums in bfloat16 are rounded stochastically, so that many small gradients are kept on average. A
bfloat16 is the upper half of a float32: adding a uniform 16-bit number to the lower half before
cutting it off rounds up with the probability that makes the expected value right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from random import Random

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import GradientWarning, SelectionError, warn
from ..sparse.shards import Shard
from .scores import Score
from .topk import TAKEN, TensorSource

SCORE_DTYPES = ("float32", "bfloat16")

#: Length of the noise that is used again, turned each time: as many as there are 16-bit numbers.
_TILE = 1 << 16
#: Tiles of entries rounded together: one stays in a CPU's cache, many make few launches elsewhere.
_TILES_ON_CPU, _TILES_ELSEWHERE = 1, 1 << 8


class Accumulator:
    """The score of one weight tensor: takes its gradients, gives what is to be ranked.

    Args:
        score: How gradients become a state.
        weight: Returns the weight (it may be replaced while the round lasts).
        dtype: Of the state, "float32" or "bfloat16".
        key: Name of the tensor, for reproducible rounding.
        loss_scale: Multiplies a tensor by what the loss is multiplied with now; None where that is
            nothing. Steps are then brought together first, so that one with an overflow can be
            left out.
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
        loss_scale: Callable[[Tensor], Tensor] | None = None,
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
        self.is_rounded = dtype == "bfloat16"
        self._step: Tensor | None = None  # gradient of the present update step

    def __call__(self, gradient: Tensor) -> None:
        """Take the gradient of one backward (any float dtype, before clipping).

        One that is not finite counts as zero, whatever the loop does about it: it, or what is left
        of it, would outweigh all others.
        """
        if gradient.device != self.left_out.device:
            self.follow(gradient.device)
        low, high = gradient.aminmax()
        broken = (high - high) != (low - low)  # infinity minus itself is not a number
        (self._left_out_now if self.can_drop else self.left_out).add_(broken)
        if not (gradient.is_cpu and not broken):  # to look elsewhere is to wait for the device
            gradient = gradient.masked_fill(broken, 0)
        if self.shard is not None:
            gradient = self.shard.averaged(gradient).to(self.state.device)
        if not self.can_drop:
            self._add(gradient)
            return
        if self.loss_scale is not None:
            one = torch.ones((), dtype=torch.float32, device=gradient.device)
            gradient = gradient.float() / self.loss_scale(one)
        if self._step is None:
            self._step = gradient.detach().to(torch.float32, copy=True)
        else:
            self._step.add_(gradient)

    def follow(self, device: torch.device) -> None:
        """Move to where the weight is, after the model was moved.

        Raises:
            SelectionError: If all candidates train: their optimizer's state is there too.
        """
        if self.change is not None and device != self.state.device:
            raise SelectionError(
                f"score={self.score.name!r} trains all candidates on {self.state.device}, but the "
                f"model was moved to {device}. Make the selector after model.to(device)."
            )
        self.state, self.left_out = self.state.to(device), self.left_out.to(device)
        self._left_out_now = self._left_out_now.to(device)
        self._step = None if self._step is None else self._step.to(device)

    def exclude(self, indices: Tensor) -> None:
        """Mark entries (flat positions, int64) that this round's pick must leave alone."""
        self.state.view(-1).index_fill_(0, indices.to(self.state.device), TAKEN)

    def end_step(self) -> None:
        """Add the gradient of the update step that ended; a call for every rank to make."""
        if self.can_drop:
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
        weight = self.weight() if self.score.times_weight else None
        if weight is not None:
            self.follow(weight.device)
        return TensorSource(self.state, weight)

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
        if self.is_rounded:
            add_rounded(self.state, gradient, f"{self.key}/{self.num_added}")
        else:
            self.state.add_(gradient)

    def _update(self, gradient: Tensor) -> None:
        if self.change is not None:
            self.change.grad = gradient
            return
        if not self.is_rounded:
            after = self._next_state(gradient, self.state)
            if after is not self.state:  # copied: it may be the weight itself, which we must keep
                self.state.copy_(after)
            return
        before = self.state.float()
        change = self._next_state(gradient, before.clone()).float() - before
        self.num_added += 1
        add_rounded(self.state, change, f"{self.key}/{self.num_added}")

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


def check_scores(accumulators: Mapping[str, Accumulator]) -> bool:
    """Say at the end of a round what is missing from its scores; return whether there are any.

    All of them are asked for at once: on a GPU every question waits until it has computed.
    """
    answers = [
        torch.stack([a.left_out, a.state.isfinite().all().long(), a.state.any().long()])
        for a in accumulators.values()
    ]
    found = torch.stack([own.to(answers[0].device) for own in answers]).tolist()
    left_out = {n: count for n, (count, _, _) in zip(accumulators, found, strict=True) if count}
    for name, count in list(left_out.items())[:1]:
        others = f" (and some of {len(left_out) - 1} other tensors)" if len(left_out) > 1 else ""
        warn(
            f"`{name}`{others}: {count} gradient{'s' * (count > 1)} of this round held NaN or "
            "infinity and count for nothing in its scores.",
            GradientWarning,
        )
    for name, (_, is_finite, _) in zip(accumulators, found, strict=True):
        if not is_finite:
            warn(
                f"`{name}`: scores are NaN or infinite; those weights are skipped.", GradientWarning
            )
    return any(has_scores for _, _, has_scores in found)


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


@functools.cache
def noise_on(device: torch.device) -> Tensor:
    """Return uniform 16-bit numbers, int32, on a device: one tile, over and over.

    Every number once in a tile, so that over all offsets an entry meets each equally often. All
    scores of a device share it.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    tile = torch.randperm(_TILE, dtype=torch.int32, generator=generator, device="cpu")
    return tile.repeat(3).to(device)


def add_rounded(target: Tensor, addend: Tensor, key: str) -> None:
    """Add to a bfloat16 tensor in place, rounding stochastically.

    Args:
        target: bfloat16, contiguous.
        addend: Any float dtype, same number of entries.
        key: What the random bits depend on; the same key gives the same result on any device.
    """
    flat, more = target.view(-1), addend.reshape(-1)
    offset = Random(key).randrange(_TILE)
    size = _TILE * (_TILES_ON_CPU if target.is_cpu else _TILES_ELSEWHERE)
    for first in range(0, flat.numel(), size):
        piece = flat[first : first + size]
        exact = piece + more[first : first + size].float()
        piece.copy_(round_stochastically(exact, offset + first // _TILE))


def round_stochastically(exact: Tensor, offset: int) -> Tensor:
    """Return float32 numbers (any number, overwritten) rounded to what bfloat16 can hold.

    Args:
        exact: The numbers.
        offset: Where the noise begins; that of each further tile of numbers begins one later.
    """
    unknown = exact.isnan()
    bits, noise = exact.view(torch.int32), noise_on(exact.device)
    tiles = bits.numel() // _TILE
    whole = bits[: tiles * _TILE].view(tiles, _TILE)
    whole.add_(noise.as_strided((tiles, _TILE), (1, 1), offset % _TILE))
    rest = bits[tiles * _TILE :]
    rest.add_(noise[(offset + tiles) % _TILE :][: rest.numel()])
    bits.bitwise_and_(-0x10000)  # infinity has no lower bits, so that it stays what it is
    return exact.masked_fill_(unknown, torch.nan)
