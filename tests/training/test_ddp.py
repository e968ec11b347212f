# SPDX-License-Identifier: Apache-2.0
"""Two processes select what one does on the same global batch."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.tuner.model import find_pool
from tests.tiny import MLP

STEPS, MICRO = 12, 2


def run(rank: int, world: int):
    """Train with two micro-batches a step; return slots and values."""
    torch.manual_seed(0)
    config = SFAConfig(budget=0.3, rho=0, target_modules=["first", "second"], selection_steps=3)
    model = get_peft_model(MLP(), config)
    net = DistributedDataParallel(model) if world > 1 else model
    if world > 1:  # positions are not sent around before each forward
        assert any("sfa_slots" in name for name in net.parameters_to_ignore)
    selector = SFASelector(net, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        if step == STEPS // 2 + 1:  # a checkpoint in the middle of a round
            state = selector.state_dict()
            selector = SFASelector(net, total_steps=STEPS)
            selector.load_state_dict(state)
        for _ in range(MICRO):
            x = torch.randn(8, 12, generator=generator)
            mine = x[rank::world]
            (net(mine).square().mean() / MICRO).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    pool = find_pool(model, "default")
    return pool.slots.clone(), pool.values.detach().clone()


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(run(rank, world), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_select_what_one_process_selects(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (2, port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    slots, values = run(0, 1)
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert torch.equal(ranks[0][1], ranks[1][1])
    assert torch.equal(ranks[0][0], slots)
    torch.testing.assert_close(ranks[0][1], values, rtol=0, atol=1e-6)
