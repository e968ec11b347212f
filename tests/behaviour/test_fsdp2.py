# SPDX-License-Identifier: Apache-2.0
"""Two processes under `fully_shard` select, learn and save what one does on the same batch."""

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from sfa_peft import ResumedRunWarning, SFAConfig, SFASelector
from sfa_peft.tuner.layers import find_pool

STEPS, WORLD = 12, 2
#: By name: options of the config, options of the run.
CASES = {
    "default": ({}, {}),
    "SGD": ({}, {"optimizer": "SGD"}),
    "no correction": ({"late_bias_correction": False}, {}),
    "absolute": ({"score": "absolute_gradient"}, {}),
    "movement": ({"score": "movement"}, {}),
    "candidates": ({"score": "weight_difference"}, {}),
    "every second step": ({"score_every": 2}, {}),
    "by layer": ({"ranking": "layer"}, {}),
    "rows": ({"granularity": "row"}, {}),
    "rows by layer": ({"granularity": "row", "ranking": "layer"}, {}),
    "ratio": ({"internal_lr_ratio": 2.0}, {}),
    "decay of weights": ({"weight_decay_on": "weight"}, {"weight_decay": 0.1}),
    "coupled decay": ({"weight_decay_on": "weight"}, {"weight_decay": 0.1, "optimizer": "SGD"}),
    "external": ({"rho": 0.5, "budget": 0.9, "external_modules": ["second"]}, {}),
    "norms and biases": ({"target_parameters": ["bias"]}, {}),
    "accumulated": ({}, {"micro": 2}),
    "clipped": ({}, {"clip": 0.05}),
    "checkpointing": ({}, {"checkpoints": True}),
    "offload": ({}, {"policy": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}}),
    "one group": ({}, {"blocks": False}),
    "kept after forward": ({}, {"policy": {"reshard_after_forward": False}}),
    "evaluated": ({}, {"evaluates": True}),
}
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


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


def make_optimizer(model, kind="AdamW", weight_decay=0.0):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "SGD":
        return torch.optim.SGD(trained, lr=1e-2, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=weight_decay)


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
        "seen": {n: whole(p) for n, p in model.named_parameters()},
    }


def run(rank, world, name):
    options, how = CASES[name]
    how = dict(how)
    model = adapted(checkpoints=how.pop("checkpoints", False), **options)
    blocks, policy = how.pop("blocks", True), how.pop("policy", {})
    if world > 1:
        sharded(model, blocks=blocks, **policy)
    model.train()
    optimizer = make_optimizer(model, how.pop("optimizer", "AdamW"), how.pop("weight_decay", 0.0))
    selector = SFASelector(model, total_steps=STEPS)
    losses = train(model, selector, optimizer, rank, world, slice(None), **how)
    return outcome(model) | {"losses": losses}


# --- files and checkpoints -------------------------------------------------------------------


def begin(world, **options):
    """Return a model that is cut where there are several processes, with what trains it."""
    model = adapted(**options)
    if world > 1:
        sharded(model)
    optimizer = make_optimizer(model.train())
    return model, SFASelector(model, total_steps=STEPS), optimizer


def saved(rank, world, folder):
    """Train, save by every rank and from a whole state dict by one; return what is in the model."""
    model, selector, optimizer = begin(world, rho=0.5, budget=0.9, external_modules=["second"])
    train(model, selector, optimizer, rank, world, slice(None))
    model.save_pretrained(f"{folder}/together", is_main_process=rank == 0)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/alone", state_dict=state)
    dist.barrier()
    return outcome(model)


def loaded(rank, world, folder):
    """Load a saved adapter before and after the base is cut; return outputs and originals."""
    x, found = batches()[0], {}
    before = PeftModel.from_pretrained(Net(), f"{folder}/together", is_trainable=True)
    sharded(before)
    after, _, _ = begin(world, rho=0.5, budget=0.9, external_modules=["second"])
    after(x)
    after.load_adapter(f"{folder}/together", "default", is_trainable=True)
    for name, model in (("before", before), ("after", after)):
        found[name] = {"out": whole(model.eval()(x)), "state": outcome(model)["state"]}
        with model.disable_adapter():
            found[name]["disabled"] = whole(model(x))
        found[name]["again"] = whole(model(x))
    return found


def stopped(rank, world, folder):
    """Train for a while, then write a checkpoint as torch does and one as Accelerate does."""
    model, selector, optimizer = begin(world)
    train(model, selector, optimizer, rank, world, slice(0, STEPS // 2))
    parts = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=f"{folder}/dcp")
    state = selector.state_dict()  # by all ranks
    if rank == 0:
        torch.save(state, f"{folder}/selector.pt")
    dist.barrier()
    train(model, selector, optimizer, rank, world, slice(STEPS // 2, None))
    return outcome(model)


def resumed(rank, world, folder):
    """Go on from the checkpoint, on as many ranks or another number of them."""
    model, selector, optimizer = begin(world)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=f"{folder}/dcp")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResumedRunWarning)
        selector.load_state_dict(torch.load(f"{folder}/selector.pt"))
    train(model, selector, optimizer, rank, world, slice(STEPS // 2, None))
    return outcome(model)


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {name: run(rank, world, name) for name in CASES}
    for function in (saved, loaded, stopped, resumed):
        found[function.__name__] = function(rank, world, folder)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (WORLD, _free_port(), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{r}.pt") | {"folder": folder} for r in range(WORLD)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_and_select_and_learn_what_one_process_does(ranks, name):
    one, two = (rank[name] for rank in ranks)
    alone = run(0, 1, name)
    assert torch.equal(one["slots"], two["slots"])
    assert torch.equal(one["values"], two["values"])
    assert torch.equal(one["slots"], alone["slots"])
    torch.testing.assert_close(one["values"], alone["values"], rtol=0, atol=1e-6)
    for key, tensor in alone["state"].items():
        torch.testing.assert_close(one["state"][key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["together", "alone"])
def test_files_are_those_that_one_process_writes_byte_for_byte(ranks, way, tmp_path):
    one = ranks[0]["saved"]
    model = adapted(rho=0.5, budget=0.9, external_modules=["second"])
    model.load_state_dict(one["state"])
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        expected = (tmp_path / name).read_bytes()
        assert (ranks[0]["folder"] / way / name).read_bytes() == expected


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_saved_adapter_is_loaded_onto_a_base_that_is_cut(ranks, when):
    model = PeftModel.from_pretrained(Net(), ranks[0]["folder"] / "together")
    x = batches()[0]
    expected = {"out": model(x), "again": model(x)}
    with model.disable_adapter():
        expected["disabled"] = model(x)
    for rank in ranks:
        for name, out in expected.items():
            assert torch.equal(rank["loaded"][when][name], out)
        base = Net().state_dict()
        for key, tensor in rank["loaded"][when]["state"].items():
            if ".base_layer." in key:
                name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
                assert torch.equal(tensor, base[name])


def test_a_run_resumed_on_as_many_ranks_ends_bit_for_bit_as_without_a_stop(ranks):
    for rank in ranks:
        for key, tensor in rank["stopped"]["state"].items():
            assert torch.equal(rank["resumed"]["state"][key], tensor)


def test_a_run_resumed_on_one_rank_selects_the_same(ranks, mesh_of_one):
    found = resumed(0, 1, ranks[0]["folder"])
    assert torch.equal(found["slots"], ranks[0]["stopped"]["slots"])
    torch.testing.assert_close(found["values"], ranks[0]["stopped"]["values"], rtol=0, atol=1e-6)


@pytest.fixture
def mesh_of_one():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
