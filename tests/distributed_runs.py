# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes, compared with one process on the same batches; and what is refused.

python -m tests.distributed_runs    # prints the tables of docs/distributed.md
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sfa_peft import SFAConfig, SFAError, SFASelector, register_score
from sfa_peft.tuner.adapted_layers import find_pool
from tests.processes import free_port, run_ranks

STEPS, WORLD = 12, 2
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
#: By name: options of the config, options of the run.
CASES = {
    "DDP, AdamW": ({}, {"wrap": "ddp"}),
    "DDP, ZeroRedundancyOptimizer(AdamW)": ({}, {"wrap": "ddp", "optimizer": "divided"}),
    "DDP, an optimizer on copies of the parameters": (
        {"late_bias_correction": False},
        {"wrap": "ddp", "optimizer": "copies"},
    ),
    "FSDP2, AdamW": ({}, {}),
    "FSDP2, fused AdamW": ({}, {"optimizer": "fused"}),
    "FSDP2, SGD": ({}, {"optimizer": "SGD"}),
    "FSDP2, one group for all": ({}, {"blocks": False}),
    "FSDP2, reshard_after_forward=False": ({}, {"policy": {"reshard_after_forward": False}}),
    "FSDP2, CPUOffloadPolicy": (
        {},
        {"policy": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}},
    ),
    "FSDP2, MixedPrecisionPolicy(bfloat16)": ({}, {"policy": {"mp_policy": BF16}, "exact": False}),
    "FSDP2, gradient accumulation": ({}, {"micro": 2}),
    "FSDP2, gradient clipping": ({}, {"clip": 0.05}),
    "FSDP2, gradient checkpointing": ({}, {"checkpoints": True}),
    "FSDP2, evaluation between steps": ({}, {"evaluates": True}),
    "FSDP2, torch.compile": ({}, {"compiled": True}),
    "FSDP2, external adapters": ({"rho": 0.5, "budget": 0.9, "external_modules": ["second"]}, {}),
    "FSDP2, target_parameters": ({"target_parameters": ["bias"]}, {}),
    "FSDP2, late_bias_correction=False": ({"late_bias_correction": False}, {}),
    "FSDP2, internal_lr_ratio": ({"internal_lr_ratio": 2.0}, {}),
    "FSDP2, weight_decay_on='weight', AdamW": (
        {"weight_decay_on": "weight"},
        {"weight_decay": 0.1},
    ),
    "FSDP2, weight_decay_on='weight', SGD": (
        {"weight_decay_on": "weight"},
        {"weight_decay": 0.1, "optimizer": "SGD"},
    ),
    "FSDP2, score='absolute_gradient'": ({"score": "absolute_gradient"}, {}),
    "FSDP2, a score of one's own, elementwise": ({"score": "own_by_entry"}, {}),
    "FSDP2, score='movement'": ({"score": "movement"}, {}),
    "FSDP2, score='weight_difference'": ({"score": "weight_difference"}, {}),
    "FSDP2, score_dtype='bfloat16'": ({"score_dtype": "bfloat16"}, {"exact": False}),
    "FSDP2, score_every=2": ({"score_every": 2}, {}),
    "FSDP2, ranking='layer'": ({"ranking": "layer"}, {}),
    "FSDP2, granularity='row'": ({"granularity": "row"}, {}),
    "FSDP2, granularity='row', ranking='layer'": ({"granularity": "row", "ranking": "layer"}, {}),
}


register_score("own_by_entry", lambda w, g, state: state.add_(g * w.abs()), elementwise=True)


class Net(nn.Module):
    """Layers whose rows do not divide evenly."""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 17), nn.Linear(17, 16)
        self.third, self.head = nn.Linear(16, 3), nn.Linear(3, 4)
        self.checkpoints = checkpoints

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in (self.second, self.third):
            if self.checkpoints:
                x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
            else:
                x = torch.tanh(layer(x))
        return self.head(x)


def adapted(*, checkpoints=False, **options):
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second", "third"]}
    config |= {"selection_steps": 3, "select_until": 1, "modules_to_save": ["head"]}
    return get_peft_model(Net(checkpoints), SFAConfig(**(config | options)))


def sharded(model, *, blocks=True, **policy):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model()
    for block in (base.first, base.second, base.third) if blocks else ():
        fully_shard(block, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 12, generator=generator) for _ in range(STEPS)]


class MasterCopies:
    """AdamW on float32 copies: steps those, then writes what they hold into the parameters."""

    def __init__(self, params, loss_scale: float = 1.0, **options) -> None:
        self.params = list(params)
        self.masters = [p.detach().clone() for p in self.params]
        self.inner = torch.optim.AdamW(self.masters, **options)
        self.loss_scale = loss_scale

    def step(self) -> None:
        for master, param in zip(self.masters, self.params, strict=True):
            master.grad = param.grad
        self.inner.step()
        for master, param in zip(self.masters, self.params, strict=True):
            param.data.copy_(master)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None


def make_optimizer(model, kind="AdamW", weight_decay=0.0):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "SGD":
        return torch.optim.SGD(trained, lr=1e-2, momentum=0.9, weight_decay=weight_decay)
    options = {"lr": 1e-3, "weight_decay": weight_decay}
    if kind == "divided" and dist.is_initialized():
        return ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **options)
    if kind == "copies" and dist.is_initialized():
        return MasterCopies(trained, **options)
    return torch.optim.AdamW(trained, fused=kind == "fused", **options)


def train(model, selector, optimizer, rank, world, steps, *, micro=1, clip=None, evaluates=False):
    losses = []
    for x in batches()[steps]:
        for part in x[rank::world].chunk(micro):
            loss = (model(part) - 1).square().mean() / micro
            loss.backward()
        losses.append(float(loss.detach()))
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
        if evaluates:
            model.eval()
            with torch.no_grad():
                model(x)
                with model.disable_adapter():
                    model(x)
            model.train()
    return losses


def outcome(model):
    pool = find_pool(model, "default")
    return {
        "slots": pool.slots.clone(),
        "values": whole(pool.values),
        "state": {k: whole(v) for k, v in model.state_dict().items()},
    }


def run(rank, world, name):
    """Train as a case says; return what was selected and learned."""
    options, how = CASES[name]
    how = {"wrap": "fsdp2", "blocks": True, "policy": {}, "exact": True, "compiled": False} | how
    model = adapted(checkpoints=how.pop("checkpoints", False), **options)
    wrap, blocks, policy = how.pop("wrap"), how.pop("blocks"), how.pop("policy")
    del how["exact"]
    if world > 1 and wrap == "fsdp2":
        sharded(model, blocks=blocks, **policy)
    net = DistributedDataParallel(model) if world > 1 and wrap == "ddp" else model.train()
    if how.pop("compiled") and world > 1:
        net = torch.compile(net, backend="aot_eager")
    optimizer = make_optimizer(model, how.pop("optimizer", "AdamW"), how.pop("weight_decay", 0.0))
    selector = SFASelector(net, total_steps=STEPS)
    losses = train(net, selector, optimizer, rank, world, slice(None), **how)
    return outcome(model) | {"losses": losses}


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    with process_group(rank, world, port):
        torch.save({name: run(rank, world, name) for name in CASES}, f"{folder}/rank{rank}.pt")


@contextmanager
def process_group(rank=0, world=1, port=None):
    """Be one of several processes that find each other on a port of this machine."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rows_of_cases() -> list[list[str]]:
    """Run everything on two processes and on one; return what came out, a row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_worker, WORLD, free_port(), folder)
        ranks = [torch.load(Path(folder, f"rank{r}.pt")) for r in range(WORLD)]
    return [[name, *verdict(name, ranks)] for name in CASES]


def verdict(name, ranks) -> tuple[str, str]:
    """Return whether the selection is that of one process, and how far the values are from its."""
    one, two = (rank[name] for rank in ranks)
    if not (torch.equal(one["slots"], two["slots"]) and torch.equal(one["values"], two["values"])):
        return "ranks differ", ""
    if not CASES[name][1].get("exact", True):
        return "the same on both ranks", "rounds otherwise"
    alone = run(0, 1, name)
    if not torch.equal(one["slots"], alone["slots"]):
        return "differs", ""
    difference = float((one["values"] - alone["values"]).abs().max())
    return "identical", next(f"<= {b}" for b in (0, 1e-7, 1e-6, 1) if difference <= b)


# --- what is refused -------------------------------------------------------------------------


def _made_before():
    model = adapted()
    SFASelector(model, total_steps=STEPS)
    sharded(model).train()
    return lambda: model(torch.randn(2, 12))


def _added_afterwards():
    net = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
    return lambda: get_peft_model(net, SFAConfig(budget=0.3, rho=0, target_modules=["first"]))


def _without_train():
    model = adapted(score="magnitude")
    sharded(model, blocks=False)
    return lambda: model(torch.randn(2, 12))


def _partly_cut():
    model = adapted()
    fully_shard(model.get_base_model().second, mesh=init_device_mesh("cpu", (1,)))
    return lambda: SFASelector(model, total_steps=STEPS)


def _fsdp1():
    device = torch.device("cpu")
    net = FullyShardedDataParallel(adapted(), device_id=device, use_orig_params=True)
    return lambda: SFASelector(net, total_steps=STEPS)


def _zero3():
    model = adapted()
    model.get_base_model().second.get_base_layer().weight.ds_id = 0
    return lambda: SFASelector(model, total_steps=STEPS)


def _tensor_parallel():
    model = adapted()
    layer = model.get_base_model().second.get_base_layer()
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]), False)
    return lambda: model(torch.randn(2, 12))


def _hsdp():
    model, mesh = adapted(), init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
    fully_shard(model, mesh=mesh)
    return lambda: SFASelector(model, total_steps=STEPS)


def _layers_by_themselves():
    model = adapted()
    fully_shard(model.get_base_model().second.get_base_layer(), mesh=init_device_mesh("cpu", (1,)))
    sharded(model).train()
    return lambda: SFASelector(model, total_steps=STEPS)


def _by_output():
    model = adapted(ranking="output")
    sharded(model).train()
    return lambda: SFASelector(model, total_steps=STEPS)


def _of_whole_weights():
    register_score("of_whole_weights", lambda w, g, state: state.add_(g / w.norm()))
    model = adapted(score="of_whole_weights")
    sharded(model).train()
    return lambda: SFASelector(model, total_steps=STEPS)


def _other_rate_on_copies():
    model = adapted(internal_lr_ratio=2.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    selector, optimizer = SFASelector(model, total_steps=STEPS), MasterCopies(trained, lr=1e-3)

    def step():
        model(torch.randn(2, 12)).sum().backward()
        optimizer.step()
        selector.step()

    return step


def _data_parallel():
    model = adapted()
    return model.get_base_model().second._replicate_for_data_parallel


#: By name, what sets a model up and returns the call that is refused.
REFUSED: dict[str, Callable[[], Callable[[], object]]] = {
    "FSDP1 (FullyShardedDataParallel)": _fsdp1,
    "DeepSpeed ZeRO-3": _zero3,
    "tensor parallelism": _tensor_parallel,
    "FSDP2 over a mesh of two dimensions (HSDP)": _hsdp,
    "FSDP2 of a part of the adapted layers": _partly_cut,
    "an adapter added after fully_shard": _added_afterwards,
    "an SFASelector made before fully_shard": _made_before,
    "FSDP2 of the whole in one group without model.train()": _without_train,
    "FSDP2 of an adapted layer by itself": _layers_by_themselves,
    "FSDP2, ranking='output'": _by_output,
    "FSDP2, a score of one's own": _of_whole_weights,
    "internal_lr_ratio with an optimizer on copies": _other_rate_on_copies,
    "nn.DataParallel": _data_parallel,
}


def refusal(name: str) -> SFAError | None:
    """Return the error that a case of `REFUSED` ends in, None without one."""
    with process_group():
        call = REFUSED[name]()
        try:
            call()
        except SFAError as error:
            return error
    return None


def tables() -> str:
    """Return both tables of the page."""
    lines = ["| setting | selection | difference of values |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows_of_cases()]
    lines += ["", "| setting | error |", "|---|---|"]
    for name in REFUSED:
        error = refusal(name)
        text = "none" if error is None else f"{type(error).__name__}: {error}"
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")
