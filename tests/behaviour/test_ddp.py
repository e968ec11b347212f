# SPDX-License-Identifier: Apache-2.0
"""Two processes select what one does on the same global batch, and send no more than they must."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sfa_peft import SelectionError, SFAConfig, SFAError, SFASelector
from sfa_peft.selection import accumulators
from sfa_peft.tuner.adapted_layers import find_pool
from tests.processes import free_port, run_ranks
from tests.tiny import MLP

STEPS, MICRO, WORLD = 12, 2, 2
PICKS = STEPS // 3 - 1
SETTINGS = {
    "default": {},
    "absolute": {"score": "absolute_gradient"},
    "bfloat16": {"score_dtype": "bfloat16"},
    "every second step": {"score_every": 2},
    "candidates": {"score": "weight_difference"},
    "divided": {"internal_lr_ratio": 2.0, "weight_decay_on": "weight"},
    "divided candidates": {"score": "weight_difference"},
}
DIVIDED = ("divided", "divided candidates")  # steps divided over ranks (ZeroRedundancyOptimizer)


class Traffic:
    """Counts what is sent: scores by `all_reduce`, gradients by DDP's buckets."""

    def __init__(self, net: nn.Module) -> None:
        self.scores, self.gradients = [], 0
        self._send = dist.all_reduce
        if isinstance(net, DistributedDataParallel):
            net.register_comm_hook(None, self._hook)

    def __enter__(self):
        def count(tensor, *args, **kwargs):
            self.scores.append(tensor.numel())
            return self._send(tensor, *args, **kwargs)

        dist.all_reduce = count
        return self

    def __exit__(self, *_error) -> None:
        dist.all_reduce = self._send

    def _hook(self, _state, bucket):
        buffer = bucket.buffer()
        self.gradients += buffer.numel() * buffer.element_size()
        work = dist.distributed_c10d.all_reduce(buffer.div_(WORLD), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])


def run(
    rank: int,
    world: int,
    *,
    resumes: bool = False,
    allocates: bool = False,
    divides: bool = False,
    **options,
):
    """Train with two micro-batches a step; return what was selected, learned and sent.

    It selects by a selector, or as a loop made for AdaLoRA does.
    """
    torch.manual_seed(0)
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "selection_steps": 3}
    config["select_until"] = 1
    model = get_peft_model(MLP(), SFAConfig(**(config | {"modules_to_save": ["head"]} | options)))
    net = DistributedDataParallel(model) if world > 1 else model
    if world > 1:  # positions are not sent around before each forward
        assert any("sfa_slots" in name for name in net.parameters_to_ignore)
    selector = None if allocates else SFASelector(net, total_steps=STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    if divides and world > 1:
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-2)
        assert len({optimizer._param_to_rank[p] for p in trained}) == world
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    with Traffic(net) as traffic:
        for step in range(STEPS):
            if resumes and step == STEPS // 2 + 1:  # a checkpoint in the middle of a round
                state = selector.state_dict()
                selector = SFASelector(net, total_steps=STEPS)
                selector.load_state_dict(state)
            for micro in range(MICRO):
                x = torch.randn(8, 12, generator=generator)
                waits = world > 1 and micro < MICRO - 1
                with net.no_sync() if waits else nullcontext():
                    (net(x[rank::world]).square().mean() / MICRO).backward()
            optimizer.step()
            if selector is None:
                model.base_model.update_and_allocate(step)
            else:
                selector.step(optimizer)
            optimizer.zero_grad()
    pool = find_pool(model, "default")
    return {
        "slots": pool.slots.clone(),
        "values": pool.values.detach().clone(),
        "scores": traffic.scores,
        "gradients": traffic.gradients,
        "trained": sum(p.numel() * p.element_size() for p in trained),
        "tensors": [pool.weights[i].tensor.numel() for i in range(len(pool.weights))],
    }


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {
        name: run(rank, world, divides=name in DIVIDED, **options)
        for name, options in SETTINGS.items()
    }
    results["resumed"] = run(rank, world, resumes=True)
    results["allocated"] = run(rank, world, allocates=True, total_steps=STEPS)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_worker, WORLD, free_port(), str(folder))
    return [torch.load(folder / f"rank{r}.pt") for r in range(WORLD)]


def test_a_loop_made_for_adalora_selects_and_learns_the_same(ranks):
    for results in ranks:
        assert torch.equal(results["allocated"]["slots"], results["default"]["slots"])
        assert torch.equal(results["allocated"]["values"], results["default"]["values"])


@pytest.mark.parametrize("name", [*SETTINGS, "resumed"])
def test_both_processes_select_the_same_and_what_one_process_selects(ranks, name):
    one, two = (rank[name] for rank in ranks)
    assert torch.equal(one["slots"], two["slots"])
    assert torch.equal(one["values"], two["values"])
    if name == "bfloat16":
        return  # ranks round sums of their own: the same on all, but not those of one process
    alone = run(0, 1, **SETTINGS.get(name, {}))
    assert torch.equal(one["slots"], alone["slots"])
    torch.testing.assert_close(one["values"], alone["values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "exchanges"), [("default", PICKS), ("absolute", 3 * PICKS)])
def test_scores_are_sent_once_a_round_or_once_a_step(ranks, name, exchanges):
    for rank in ranks:
        assert rank[name]["scores"] == rank[name]["tensors"] * exchanges


def test_gradients_that_are_sent_are_those_of_the_budget(ranks):
    for name in SETTINGS:
        for rank in ranks:
            assert rank[name]["gradients"] == STEPS * rank[name]["trained"]
    wide = ranks[0]["default"]
    assert wide["trained"] < 4 * sum(wide["tensors"])


# --- a call that one process leaves out ------------------------------------------------------


def _forgetful(rank: int, world: int, port: int, folder: str, forgotten: int, every: int) -> None:
    """Train until an error; on rank 1 one call of the selector's step is missing."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    net = DistributedDataParallel(adapted(score_every=every, modules_to_save=["head"]))
    selector = SFASelector(net, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    error = "none"
    try:
        for step in range(STEPS):
            net(torch.randn(4, 12)).square().mean().backward()
            optimizer.step()
            if rank == 0 or step != forgotten:
                selector.step(optimizer)
            optimizer.zero_grad()
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    Path(folder, f"rank{rank}").write_text(error)
    os._exit(0)  # as a process that fails: the other one does not wait for it


@pytest.mark.parametrize(
    ("forgotten", "every"), [(0, 1), (2, 1), (0, 3)], ids=["in a round", "at a pick", "unscored"]
)
def test_a_process_that_leaves_out_a_call_says_so(tmp_path, forgotten, every):
    run_ranks(_forgetful, WORLD, free_port(), str(tmp_path), forgotten, every)
    errors = [(tmp_path / f"rank{rank}").read_text() for rank in range(WORLD)]
    assert errors[1].startswith("SelectionError: Process 1: SFASelector.step was not called after")
    assert f"update step {forgotten + 1}," in errors[1]
    assert "op.preamble" not in errors[1]


def test_scores_that_cannot_be_added_up_say_what_may_have_happened(monkeypatch):
    def fail(_tensor) -> None:
        raise RuntimeError("op.preamble.length <= op.nbytes")

    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(SelectionError, match=r"not call SFASelector\.step .*op\.preamble"):
        accumulators._all_reduce(torch.zeros(1))


# --- sharded models ----------------------------------------------------------------------------


@pytest.fixture
def mesh():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def adapted(**options):
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "select_until": 1}
    return get_peft_model(MLP(), SFAConfig(**(config | {"selection_steps": 3} | options)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_cut_after_the_selector_was_made_is_refused_at_the_first_forward(mesh, whole):
    model = adapted()
    SFASelector(model, total_steps=STEPS)
    fully_shard(model if whole else model.get_base_model().second, mesh=mesh)
    with pytest.raises(SelectionError, match=r"`first\.weight` is not cut, but the model is by"):
        model(torch.randn(2, 12))


@pytest.mark.parametrize("told", [True, False])
def test_a_model_cut_between_two_forwards_is_taken_up_by_train(mesh, told):
    model, x = adapted(score="magnitude").train(), torch.randn(2, 12)
    before = model(x)
    fully_shard(model, mesh=mesh)
    if told:
        assert torch.equal(model.train()(x), before)
        return
    with pytest.raises(SelectionError, match=r"then call model\.train\(\)"):
        model(x)


def test_a_model_that_transformers_cut_is_refused_by_name():
    model = adapted()
    model.get_base_model()._tp_size = 2
    with pytest.raises(SelectionError, match="cut by tensor parallelism"):
        model(torch.randn(2, 12))


# --- copies of the model in one process --------------------------------------------------------


def test_data_parallel_is_refused_at_the_first_step_with_the_remedy(monkeypatch):
    # Its copies need several GPUs; sending tensors to them is replaced, copying modules is not.
    def to_all(tensors, devices, detach=False):
        return [list(tensors) for _ in devices]

    copying = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(copying, "_broadcast_coalesced_reshape", to_all)
    model = adapted()
    assert len(nn.parallel.replicate(MLP(), [0, 1])) == 2  # what has no adapter may be copied
    with pytest.raises(SFAError, match=r"one process per GPU: torchrun --nproc_per_node N"):
        nn.parallel.replicate(model, [0, 1])
