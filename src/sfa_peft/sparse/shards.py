# SPDX-License-Identifier: Apache-2.0
"""Tensors that are cut over ranks (FSDP2): the part of one rank, and what ranks tell each other.

`fully_shard` cuts every parameter along its first dimension and shows the whole of it for the time
of a forward and a backward only. What lies on a rank all the time is a shard: changes are written
into it, and scores are kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor import Shard as Cut

from ..errors import SFAError


def local(tensor: Tensor) -> Tensor:
    """Return what lies on this rank of a tensor, sharing its memory; a plain tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; a call for every rank where it is cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        part, mesh = tensor.to_local(), tensor.device_mesh
        if part.device.type == mesh.device_type:
            return tensor.full_tensor()
        # Offloaded. Ranks talk where the mesh is, and `from_local` moves the part there.
        options = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
        there = DTensor.from_local(part, mesh, tensor.placements, **options)
        return there.full_tensor().to(part.device)


class Shard:
    """This rank's part of a tensor.

    Args:
        tensor: A parameter that `fully_shard` has cut.
        name: What an error calls it.

    Attributes:
        first: First flat position of the whole tensor that lies here; `last` is the last one + 1.

    Raises:
        SFAError: If it is cut along several dimensions of a mesh, or another than the first.
    """

    def __init__(self, tensor: DTensor, name: str = "a parameter") -> None:
        self.tensor, self.mesh = tensor, tensor.device_mesh
        if tuple(tensor.placements) != (Cut(0),):
            raise SFAError(
                f"`{name}` is cut as {tensor.placements}. Shard along the first dimension of "
                "parameters only, over a mesh of one dimension: fully_shard(module), without "
                "shard_placement_fn, replication or tensor parallelism."
            )
        rows = tensor.shape[0]
        share, row = -(-rows // self.mesh.size()), tensor.numel() // max(rows, 1)
        rank = self.mesh.get_local_rank()
        self.first, self.last = (min(rows, share * r) * row for r in (rank, rank + 1))

    @property
    def local(self) -> Tensor:
        """The part, sharing the parameter's memory; of its rows."""
        return local(self.tensor)

    def places(self, positions: Tensor) -> Tensor:
        """Return which of flat positions in the whole tensor lie here, int64."""
        return ((positions >= self.first) & (positions < self.last)).nonzero().squeeze(1)

    def ranges(self, every: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Return (first, last + 1, anything) of flat positions as places in the part, if any."""
        inside = ((max(a, self.first), min(b, self.last), other) for a, b, other in every)
        return [(a - self.first, b - self.first, other) for a, b, other in inside if a < b]

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor that every rank has, as a view."""
        return tensor.reshape(-1)[self.first : self.last].view(self.local.shape)

    def show(self, tensor: Tensor) -> None:
        """Bring a parameter up to date that shows the whole of this tensor already.

        As in a forward; a call for every rank.
        """
        if not isinstance(tensor, DTensor):
            tensor.detach().copy_(whole(self.tensor))

    def like(self, part: Tensor) -> DTensor:
        """Return a part as one of a tensor of the whole one's shape, where the part is."""
        if part.device.type != self.mesh.device_type:  # offloaded: `from_local` would move it
            spec = cast(Any, self.tensor)._spec
            meta = spec.tensor_meta._replace(dtype=part.dtype)
            return cast(Any, DTensor)(part, replace(spec, tensor_meta=meta), requires_grad=False)
        shape, stride = self.tensor.shape, self.tensor.stride()
        return DTensor.from_local(
            part, self.mesh, [Cut(0)], run_check=False, shape=shape, stride=stride
        )

    def joined(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks together; a call for every rank."""
        return whole(self.like(part))

    def summed(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of the sum of whole tensors; a call for every rank."""
        found = DTensor.from_local(tensor, self.mesh, [Partial()], run_check=False)
        return local(found.redistribute(placements=[Cut(0)]))

    def averaged(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of the mean of whole tensors, float32 or wider."""
        wide = torch.promote_types(tensor.dtype, torch.float32)
        return self.summed(tensor.to(wide)).div_(self.mesh.size())


class Joined(torch.autograd.Function):
    """Stand for all values of a sharded pool; each rank gets its part of their mean gradient."""

    @staticmethod
    def forward(ctx: Any, values: DTensor, shard: Shard) -> Tensor:
        """Return a tensor of all values' length, without data."""
        ctx.shard = shard
        return shard.local.new_zeros(1).expand(values.numel())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        """Return the gradient of the sharded values."""
        shard = ctx.shard
        return shard.like(shard.averaged(grad).to(shard.local)), None


class Ranks:
    """The processes over which weights are cut, for what they decide together.

    Args:
        shard: One of the parts.
    """

    def __init__(self, shard: Shard) -> None:
        self.group = shard.mesh.get_group()
        self.rank, self.count = shard.mesh.get_local_rank(), shard.mesh.size()
        self.device = torch.device(shard.mesh.device_type)

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum of all ranks' integers, on the CPU."""
        found = counts.to(self.device, copy=True)
        dist.all_reduce(found, group=self.group)
        return found.cpu()

    def table(self, numbers: list[int]) -> Tensor:
        """Return the numbers of all ranks, int64 (ranks, numbers), on the CPU."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own, group=self.group)
        return torch.stack(found).cpu()

    def concatenated(self, part: Tensor) -> Tensor:
        """Return 1-D tensors of all ranks one after the other, of any lengths, where `part` is."""
        lengths = self.table([part.numel()])[:, 0].tolist()
        own = torch.zeros(max(lengths), dtype=part.dtype, device=self.device)
        own[: part.numel()] = part
        found = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(found, own, group=self.group)
        parts = [piece[:length] for piece, length in zip(found, lengths, strict=True)]
        return torch.cat(parts).to(part.device)
