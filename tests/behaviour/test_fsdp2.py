# SPDX-License-Identifier: Apache-2.0
"""Two processes under `fully_shard` select, learn and save what one does on the same batch."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from benchmarks.sharded_memory import per_rank
from sfa_peft import ResumedRunWarning, SelectionError, SFASelector
from sfa_peft.sparse import shards
from tests.distributed_runs import (
    CASES,
    REFUSED,
    STEPS,
    WORLD,
    Net,
    adapted,
    batches,
    free_port,
    make_optimizer,
    outcome,
    process_group,
    refusal,
    run,
    sharded,
    train,
    verdict,
    whole,
)
from tests.processes import run_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
MIXED = {"rho": 0.5, "budget": 0.9, "external_modules": ["second"]}


def begin(world, **options):
    """Return a model that is cut where there are several processes, with what trains it."""
    model = adapted(**options)
    if world > 1:
        sharded(model)
    optimizer = make_optimizer(model.train())
    return model, SFASelector(model, total_steps=STEPS), optimizer


def saved(rank, world, folder):
    """Train, save by every rank and from a whole state dict by one; return what is in the model."""
    model, selector, optimizer = begin(world, **MIXED)
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
    after, _, _ = begin(world, **MIXED)
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


def fsdp1(*_):
    """Return what a forward of an adapter without a selector says under FSDP1."""
    model, device = adapted(score="magnitude"), torch.device("cpu")
    net = FullyShardedDataParallel(model, device_id=device, use_orig_params=True)
    try:
        net(batches()[0])
    except SelectionError as error:
        return str(error)
    return None


def accelerated(rank, world, folder):
    """Train, stop, and go on as Accelerate does with fsdp_version=2."""
    accelerator = Accelerator(cpu=True)
    # Accelerate takes FSDP up on accelerators only; nothing else of it depends on the device.
    for state in (PartialState._shared_state, accelerator.state.__dict__):
        state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SFALayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    found = {}
    for way in ("stopped", "resumed"):
        model = adapted(**MIXED)
        model, optimizer = accelerator.prepare(model, make_optimizer(model))
        selector = SFASelector(model.train(), total_steps=STEPS)
        accelerator.register_for_checkpointing(selector)
        half = STEPS // 2
        if way == "stopped":
            train(model, selector, optimizer, rank, world, slice(0, half))
            accelerator.save_state(f"{folder}/accelerate")
        else:
            accelerator.load_state(f"{folder}/accelerate")
        train(model, selector, optimizer, rank, world, slice(half, None))
        found[way] = outcome(model)
        accelerator.free_memory()
        accelerator._custom_objects.clear()
    state = accelerator.get_state_dict(model)
    if rank == 0:
        model.save_pretrained(f"{folder}/accelerated", state_dict=state)
    dist.barrier()
    return found


def held(rank, world, _folder):
    """Return the bytes of a trained pool that one rank holds, by what they are for."""
    model, selector, optimizer = begin(world)
    train(model, selector, optimizer, rank, world, slice(None))
    pool = selector.pool
    own = [*(t for s in pool.slices for t in s.entries)]
    own += [t for w in pool.weights for t in w.kept("default")]
    state = optimizer.state[pool.values]
    return {
        "candidates": pool.starts[-1],
        "selected": pool.size,
        "values": pool.held.nbytes,
        "their optimizer's state (AdamW)": sum(
            state[name].to_local().nbytes for name in ("exp_avg", "exp_avg_sq")
        ),
        "slots": pool.slots.nbytes,
        "where gradients are gathered": sum(
            s.everywhere(w.tensor).nbytes for s, w in zip(pool.slices, pool.weights, strict=True)
        ),
        "own entries: places, slots, originals": sum(t.nbytes for t in own),
    }


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    with process_group(rank, world, port):
        found = {name: run(rank, world, name) for name in CASES}
        for function in (saved, loaded, stopped, resumed, held, fsdp1, accelerated):
            found[function.__name__] = function(rank, world, folder)
        torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_worker, WORLD, free_port(), str(folder))
    return [torch.load(folder / f"rank{r}.pt") | {"folder": folder} for r in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_the_page_says_what_two_processes_select_and_learn_beside_one(ranks, name):
    selection, difference = verdict(name, ranks)
    assert selection == (
        "identical" if CASES[name][1].get("exact", True) else "the same on both ranks"
    )
    assert difference in ("<= 0", "<= 1e-07", "<= 1e-06", "rounds otherwise")
    assert f"| {name} | {selection} |" in PAGE.read_text("utf-8")


def test_bf16_forwards_select_much_of_what_float32_ones_do(ranks):
    pair = "FSDP2, AdamW", "FSDP2, MixedPrecisionPolicy(bfloat16)"
    exact, rounded = (set(ranks[0][name]["slots"].tolist()) for name in pair)
    assert len(exact & rounded) > 0.8 * len(exact)


@pytest.mark.parametrize("name", REFUSED)
def test_the_page_says_what_is_refused_in_the_errors_own_words(name):
    error = refusal(name)
    assert error is not None
    assert f"| {name} | {type(error).__name__}: {error} |" in PAGE.read_text("utf-8")


def test_fsdp1_is_refused_at_the_first_forward_too(ranks):
    assert all("sharded by FullyShardedDataParallel (FSDP1)" in rank["fsdp1"] for rank in ranks)


def test_ranks_hold_together_what_the_benchmarks_formula_says(ranks):
    held = [rank["held"] for rank in ranks]
    formula = per_rank(0, held[0]["candidates"], held[0]["selected"], WORLD)
    for name in held[0].keys() - {"candidates", "selected"}:
        assert sum(rank[name] for rank in held) == pytest.approx(WORLD * formula[name])


@pytest.mark.parametrize("way", ["together", "alone"])
def test_files_are_those_that_one_process_writes_byte_for_byte(ranks, way, tmp_path):
    one = ranks[0]["saved"]
    model = adapted(**MIXED)
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
    for found in (found for rank in ranks for found in (rank, rank["accelerated"])):
        for key, tensor in found["stopped"]["state"].items():
            assert torch.equal(found["resumed"]["state"][key], tensor)


def test_accelerate_selects_and_learns_what_one_process_does(ranks):
    model, selector, optimizer = begin(1, **MIXED)
    train(model, selector, optimizer, 0, 1, slice(None))
    alone = outcome(model)
    for rank in ranks:
        found = rank["accelerated"]["stopped"]
        assert torch.equal(found["slots"], alone["slots"])
        torch.testing.assert_close(found["values"], alone["values"], rtol=0, atol=1e-6)


def test_an_adapter_saved_from_accelerates_state_dict_is_loaded_by_one_process(ranks):
    model = PeftModel.from_pretrained(Net(), ranks[0]["folder"] / "accelerated")
    expected = adapted(**MIXED)
    expected.load_state_dict(ranks[0]["accelerated"]["resumed"]["state"])
    x = batches()[0]
    assert torch.equal(model.eval()(x), expected.eval()(x))


def test_a_run_resumed_on_one_rank_selects_the_same(ranks):
    with process_group():
        found = resumed(0, 1, ranks[0]["folder"])
    assert torch.equal(found["slots"], ranks[0]["stopped"]["slots"])
    torch.testing.assert_close(found["values"], ranks[0]["stopped"]["values"], rtol=0, atol=1e-6)


def test_a_part_that_is_offloaded_from_a_card_stays_where_it_is():
    """Its gradient must not go to the card: autograd would refuse it for values on the CPU."""
    part = torch.arange(12.0).view(4, 3)
    with process_group():
        mesh = DeviceMesh("cuda", [0])
        meta = TensorMeta(part.shape, part.stride(), part.dtype)
        tensor = DTensor(
            part, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False
        )
        found = shards.Shard(tensor).like(part.bfloat16())

    assert found.device.type == "cpu"
    assert found.dtype == found.to_local().dtype == torch.bfloat16
    assert found.shape == part.shape
