# SPDX-License-Identifier: Apache-2.0
"""Several processes of `pretrain_backbone.py`, as torchrun starts them: each takes a part."""

import os

import torch
from torch import distributed

from sfa_peft import SFAError


class Processes:
    """This process among all; the only one if torchrun did not start it.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    def __init__(self, device: str, batch_size: int) -> None:
        self.rank, self.count = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        if batch_size % self.count:
            raise SFAError(f"--batch_size {batch_size}: expected a multiple of {self.count}")
        if self.count > 1:
            if device != "cpu":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("gloo" if device == "cpu" else "nccl")

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def part(self, items: torch.Tensor) -> torch.Tensor:
        """Return every n-th item, begun at this process's number."""
        return items[self.rank :: self.count]

    def sum(self, value: float) -> float:
        """Return the sum of all processes' values."""
        if self.count == 1:
            return value
        device = "cpu" if distributed.get_backend() == "gloo" else "cuda"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return total.item()

    def mean(self, value: float) -> float:
        """Return the mean of all processes' values."""
        return self.sum(value) / self.count

    def average_gradients(self, model: torch.nn.Module) -> None:
        """Replace each gradient by its mean over the processes; all have the same layout."""
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def close(self) -> None:
        """Wait for the others, then leave them."""
        if self.count > 1:
            distributed.barrier()
            distributed.destroy_process_group()
