# SPDX-License-Identifier: Apache-2.0
"""Memory of one process of several under FSDP2: by formula, and counted on a model without data.

The model is cut by `fully_shard` over processes that are only imagined, on the meta device: sizes
are real, nothing is computed. Three billion parameters take half a minute and no memory.

python benchmarks/sharded_memory.py
python benchmarks/sharded_memory.py --embed_dim 128 --depths 2 2 18 2 --ranks 2
"""

import argparse
import warnings

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Swinv2Config, Swinv2Model

from sfa_peft import SFAConfig, SFASelector, SFAWarning

GIB = 1 << 30


def per_rank(parameters: int, candidates: int, selected: int, ranks: int) -> dict[str, float]:
    """Return the bytes that one process holds, float32 throughout.

    Args:
        parameters: Of the model, without the adapter.
        candidates: How many of them may be selected.
        selected: How many of them the budget is.
        ranks: Number of processes.
    """
    position = 4 if candidates < 1 << 31 else 8
    return {
        "parameters": 4 * parameters / ranks,
        "scores, until the last pick": 4 * candidates / ranks,
        "values": 4 * selected / ranks,
        "their optimizer's state (AdamW)": 8 * selected / ranks,
        "slots": position * selected,
        "where gradients are gathered": 4 * selected,
        "own entries: places, slots, originals": 16 * selected / ranks,
        "for a moment, after each step: all values": 4 * selected,
        "for a moment, in each backward: their gradient": 8 * selected,
    }


def counted(model, selector, ranks: int) -> dict[str, float]:
    """Return the bytes of what is there on the meta device, by the same names."""
    pool = selector.pool
    own = [p.to_local().nbytes for n, p in model.named_parameters() if ".sfa_pool." not in n]
    return {
        "parameters": sum(own),
        "scores, until the last pick": sum(
            a.state.nbytes for a in selector._rounds.accumulators.values()
        ),
        "values": pool.held.nbytes,
        "slots": pool.slots.nbytes,
    }


def cut(embed_dim: int, depths: list[int], budget: float, ranks: int):
    """Return a SwinV2 with an adapter, cut, and its selector."""
    heads = [embed_dim // 32 << stage for stage in range(len(depths))]
    config = Swinv2Config(embed_dim=embed_dim, depths=depths, num_heads=heads, image_size=256)
    with torch.device("meta"):
        backbone = Swinv2Model(config)
    model = get_peft_model(backbone, SFAConfig(budget=budget, rho=0))
    mesh = init_device_mesh("cpu", (ranks,))
    for stage in model.get_base_model().encoder.layers:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh).train()
    return model, SFASelector(model, total_steps=10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embed_dim", type=int, default=512)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 2, 42, 4])
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    warnings.simplefilter("ignore", SFAWarning)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.ranks)
    model, selector = cut(args.embed_dim, args.depths, args.budget, args.ranks)
    pool = selector.pool
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".sfa_" not in n)
    formula = per_rank(parameters, pool.starts[-1], pool.size, args.ranks)
    there = counted(model, selector, args.ranks)
    print(
        f"{parameters:,} parameters, {pool.starts[-1]:,} candidates, {pool.size:,} selected, "
        f"{args.ranks} ranks\n"
    )
    print("| one rank holds | GiB by formula | GiB counted |\n|---|---|---|")
    for name, size in formula.items():
        found = f"{there[name] / GIB:.2f}" if name in there else ""
        print(f"| {name} | {size / GIB:.2f} | {found} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
