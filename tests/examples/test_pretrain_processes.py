# SPDX-License-Identifier: Apache-2.0
"""Pretraining on two processes: one gradient, one file, and a continuation with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfa_peft.errors import SFAError
from tests.class_images import make_npz
from tests.processes import free_port, run_ranks, run_script_on_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_backbone.py"


def launch(*options: Any) -> str:
    """Run the script on two processes; return what it prints, errors included."""
    fixed = ["--device", "cpu", "--threads", "1", "--bf16", "false", "--drop_path", "0.2"]
    return "".join(
        done.stdout + done.stderr for done in run_script_on_ranks(SCRIPT, *options, *fixed)
    )


def test_two_processes_write_once_and_go_on_with_the_same_bits(
    config: Path, tmp_path: Path
) -> None:
    out, rest = tmp_path / "out", tmp_path / "rest"
    options = ["--data", make_npz(tmp_path / "data"), "--config", config]
    options += ["--batch_size", 4, "--epochs", 1.25, "--save_steps", 8, "--mixup", 0.2]

    printed = launch(*options, "--output_dir", out)
    assert printed.count(f"written to {out}/") == 1, printed[-3000:]
    results = json.loads((out / "results.json").read_text())["results"]
    assert (results["processes"], results["steps"], results["val_images"]) == (2, 10, 8)
    assert 8 * results["top1"] == round(8 * results["top1"])  # each image counted once
    readme = (out / "README.md").read_text()
    assert "a CPU, 2 processes, batch 4, muon" in readme
    assert f"torchrun --nproc_per_node 2 {SCRIPT}" in readme

    rest.mkdir()
    shutil.copy(out / "checkpoint.pt", rest)  # of step 8
    printed = launch(*options, "--output_dir", rest, "--resume_from_checkpoint")
    assert "going on after step 8" in printed, printed[-3000:]
    first, second = (load_file(folder / "model.safetensors") for folder in (out, rest))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    sys.path.insert(0, str(SCRIPT.parent))
    from pretrain_processes import Processes

    processes = Processes("cpu", 6)
    torch.manual_seed(0)
    model, images = torch.nn.Linear(5, 3), torch.randn(6, 5)
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
    model(processes.part(images)).square().mean().backward()
    processes.average_gradients(model)
    found = {"sum": processes.sum(rank + 1.0), "mean": processes.mean(rank + 1.0)}
    torch.save({**found, "gradient": model.weight.grad}, f"{folder}/{rank}.pt")
    processes.close()


def test_the_gradient_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    run_ranks(_worker, free_port(), str(tmp_path))

    torch.manual_seed(0)
    model, images = torch.nn.Linear(5, 3), torch.randn(6, 5)
    model(images).square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (first["sum"], first["mean"]) == (second["sum"], second["mean"]) == (3.0, 1.5)
    assert torch.equal(first["gradient"], second["gradient"])
    torch.testing.assert_close(first["gradient"], model.weight.grad)


def test_batches_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain_processes import Processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SFAError, match="--batch_size 5: expected a multiple of 2"):
        Processes("cpu", 5)
