# SPDX-License-Identifier: Apache-2.0
"""The loop with Accelerate as users run it: alone, killed and taken up again, on two processes."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import Swinv2ForImageClassification

from sfa_peft.dense import TaskSpec
from sfa_peft.tuner.adapted_layers import find_pool
from tests.processes import free_port, run_ranks, start
from tests.tiny import swinv2_config

SCRIPT = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
STEPS, WORLD, IMAGES = 6, 2, 5  # 5 images: two processes must not count one twice


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_loop_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(folder: Path, out: Path, *more: str) -> list[str]:
    settings = {
        "backbone": folder / "backbone",
        "output_dir": out,
        "max_steps": STEPS,
        "batch_size": 2,
        "eval_images": IMAGES,
        "checkpoint_steps": 2,
    }
    return [part for k, v in settings.items() for part in (f"--{k}", str(v))] + list(more)


def run(folder: Path, out: Path, *more: str):
    """Run the script here; return the trained model and the scores."""
    script, found = load_script(), []

    def evaluate(accelerator, model, loader):
        found.extend([accelerator.unwrap_model(model), scores(accelerator, model, loader)])
        return found[-1]

    scores, script.evaluate = script.evaluate, evaluate
    before, sys.argv = sys.argv, [str(SCRIPT), *options(folder, out, *more)]
    try:
        script.main()
    finally:
        sys.argv = before
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small backbone and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("accelerate")
    torch.manual_seed(0)
    backbone = Swinv2ForImageClassification(swinv2_config(image_size=64))
    backbone.save_pretrained(folder / "backbone")
    model, scores = run(folder, folder / "straight")
    assert find_pool(model, "default").num_assigned == find_pool(model, "default").size
    assert 0 < scores["pixel_accuracy"] < 1
    return folder


def test_a_run_leaves_checkpoints_and_an_adapter_that_loads(folder):
    out = folder / "straight"
    names = {path.name for path in out.iterdir()}
    assert {"step_2", "step_4", "step_6", "adapter_config.json"} <= names
    assert not [name for name in names if "partial" in name]
    script = load_script()
    base = script.make_model(str(folder / "backbone"))
    pool = find_pool(PeftModel.from_pretrained(base, out), "default")
    assert pool.num_assigned == pool.size


def test_a_killed_run_that_is_taken_up_ends_with_the_same_bits(folder):
    out = folder / "killed"
    process = start(run, folder, out)
    until = time.monotonic() + 120
    while not (out / "step_2").is_dir() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert (out / "step_2").is_dir()
    run(folder, out, "--resume_from_checkpoint", str(out / "step_2"))
    assert adapter(out) == adapter(folder / "straight")


# --- two processes -----------------------------------------------------------------------------


def _worker(rank: int, folder: Path, ports: list[int]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}  # as the launcher
    resume = ["--resume_from_checkpoint", str(folder / "two" / "step_2")]
    for name, port, more in (("two", ports[0], []), ("resumed", ports[1], resume)):
        os.environ["MASTER_PORT"] = str(port)
        model, scores = run(folder, folder / name, *more)
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        slots = find_pool(model, "default").slots
        torch.save((trained | {"slots": slots}, scores), folder / f"{name}-{rank}.pt")


def test_two_processes_train_one_adapter_and_count_each_image_once(folder):
    run_ranks(_worker, folder, [free_port(), free_port()])
    names = [f"{name}-{rank}.pt" for name in ("two", "resumed") for rank in range(WORLD)]
    (first, scores), *others = [torch.load(folder / name) for name in names]
    for tensors, same_scores in others:
        assert not [n for n in first if not torch.equal(first[n], tensors[n])]
        assert scores == same_scores
    assert (folder / "two" / "step_2" / "random_states_1.pkl").is_file()  # there were two
    assert (first["slots"] >= 0).all()
    assert adapter(folder / "two") == adapter(folder / "resumed")
    assert adapter(folder / "two") != adapter(folder / "straight")  # twice as many images

    script = load_script()
    base = script.make_model(str(folder / "backbone"))
    model = PeftModel.from_pretrained(base, folder / "two")
    loader = torch.utils.data.DataLoader(script.SceneDataset(IMAGES, seed=1), IMAGES)
    assert TaskSpec.read(folder / "two").metrics["pixel_accuracy"] == scores["pixel_accuracy"]
    alone = script.evaluate(script.Accelerator(cpu=True), model, loader)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert scores["pixel_accuracy"] == pytest.approx(alone["pixel_accuracy"], abs=1e-4)
