# SPDX-License-Identifier: Apache-2.0
"""One row of `cost.py`: a model ready for its method, and what is measured on it.

Times of all rows are taken in one process, in turns. The peak memory of a row is that of a process
that does nothing else.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from cost_cases import UNIFORM
from cost_models import (
    ROUNDS,
    NotAvailable,
    Task,
    make_selector,
    make_task,
    prepare,
    trained_parameters,
)
from selections import load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from sfa_peft import SFASelector

WARM_UP_STEPS = 2


class Memory:
    """Present and peak memory in bytes: resident on CPU, allocated by torch on CUDA."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"

    def now(self) -> int:
        """Return the memory in use."""
        return torch.cuda.memory_allocated() if self.is_cuda else _status("VmRSS")

    def peak(self) -> int:
        """Return the largest memory since the start or the last `reset`."""
        # Not ru_maxrss on Linux: a child starts with its parent's.
        return torch.cuda.max_memory_allocated() if self.is_cuda else _status("VmHWM")

    def reset(self) -> None:
        """Let the peak start anew."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")


class Launches(TorchDispatchMode):
    """Counts operations that compute: on a GPU each starts at least one kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and do it."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def trainers_optimizer() -> dict[str, bool]:
    """Return the options of AdamW that transformers' Trainer takes by default."""
    return {"fused": True} if "fused" in TrainingArguments.optim else {}


def backend_settings() -> dict[str, Any]:
    """Return what decides how exactly and how fast a GPU multiplies."""
    return {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_version": torch.backends.cudnn.version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _status(name: str) -> int:
    if sys.platform != "linux":  # macOS gives the peak only, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}")


class Job:
    """A model, its optimizer and its selector: what one row of the table runs.

    Args:
        case: A `Case` as a dict.
        settings: backbone, resolution, batch_size, dtype, device, rounds.
        make: Makes the task's model.
    """

    def __init__(
        self,
        case: dict[str, Any],
        settings: dict[str, Any],
        make: Callable[..., Task] = make_task,
    ) -> None:
        self.device, self.phase = settings["device"], case["phase"]
        self.memory = Memory(self.device)
        dtype = getattr(torch, settings["dtype"])
        task = make(settings["backbone"], settings["resolution"], dtype, self.device)
        self.size = sum(p.numel() for p in task.backbone.parameters())
        self.model = prepare(task, case).train()
        self.selector: SFASelector | None = None
        if case["method"].startswith(("sfa_", "pick")):
            # A pick per round, and one round behind the last.
            total_steps = max(ROUNDS, settings["rounds"] + WARM_UP_STEPS + 1)
            uniform = case["method"] == UNIFORM
            measured = None if uniform else load(case["budget"], case["options"].get("rho", 0.5))
            self.selector = make_selector(self.model, self.phase, total_steps, measured)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, **trainers_optimizer())
        side, generator = settings["resolution"], torch.Generator().manual_seed(0)
        images = torch.randn(settings["batch_size"], 3, side, side, generator=generator)
        self.images = images.to(device=self.device, dtype=dtype)
        self.run_peak = 0
        for _ in range(WARM_UP_STEPS):
            self.step()

    def update(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.model(self.images).backward()
        self.optimizer.step()

    def select(self) -> None:
        """Count the step, and pick if a round ends."""
        if self.selector is not None:
            self.selector.step(self.optimizer)

    def steps(self, count: int) -> dict[str, Any]:
        """Return the seconds of each of `count` training steps, and those until the host is free.

        On a GPU a step that takes the host as long as the device is bound by Python.
        """
        host: list[float] = []

        def step() -> None:
            host.append(_seconds(self.step))

        return {"seconds": [self._time(step) for _ in range(count)], "host_seconds": host}

    def step(self) -> None:
        """Make one training step."""
        self.update()
        self.select()
        self.optimizer.zero_grad()

    def launches(self) -> int:
        """Return how many operations that compute a training step starts."""
        with Launches() as found:
            self.step()
        return found.count

    def pick(self) -> dict[str, Any]:
        """Return time and extra memory of a pick, and of `torch.topk` on the same scores."""
        selector = self.selector
        if selector is None or selector.schedule is None:
            raise RuntimeError("only a row with a growing selection can pick")
        step = self._time(self.update)
        self.run_peak = max(self.run_peak, self.memory.peak())
        steps = selector.update_steps
        count = selector.schedule.selected_after(steps + 1) - selector.selected
        sums = list(selector.state_dict()["sums"].values())
        plain, plain_bytes = self._extra(lambda: _plain_topk(sums, count))
        seconds, extra = self._extra(self.select)
        self.run_peak = max(self.run_peak, self.memory.peak())
        self.optimizer.zero_grad()
        if selector.selected < selector.schedule.selected_after(steps + 1):
            raise RuntimeError("the step that was timed as a pick did not pick")
        self.memory.reset()
        return {
            "step_seconds": step,
            "pick_seconds": seconds,
            "pick_extra_bytes": extra,
            "topk_seconds": plain,
            "topk_extra_bytes": plain_bytes,
            "selected": count,
            "eligible": sum(s.numel() for s in sums),
        }

    def peak(self) -> dict[str, Any]:
        """Return the peak memory of everything so far (without the plain `torch.topk`)."""
        found = {"peak_bytes": max(self.run_peak, self.memory.peak())}
        return found if self.phase == "pick" else found | {"launches": self.launches()}

    def _extra(self, action: Callable[[], object]) -> tuple[float, int]:
        """Return seconds of an action, and by how much memory rose above its start."""
        self.memory.reset()
        before = self.memory.now()
        seconds = self._time(action)
        return seconds, self.memory.peak() - before

    def _time(self, action: Callable[[], object]) -> float:
        """Return the seconds that an action takes, on CUDA by events there."""
        if self.device != "cuda":
            start = time.perf_counter()
            action()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        action()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _plain_topk(sums: list[Tensor], count: int) -> Tensor:
    """Rank as is usually done: join the scores in a copy and sort out the largest."""
    return torch.cat([s.reshape(-1) for s in sums]).abs_().topk(count, sorted=False).indices


def measure_memory(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory of a row and what else is known of it; in a fresh process."""
    imports = Memory("cpu").now()
    torch.set_num_threads(settings["threads"])
    try:
        job = Job(case, settings)
        found = job.pick() if job.phase == "pick" else {}
    except NotAvailable as error:
        return {"failure": f"not run: {error}"}
    except Exception as error:  # whatever a library raises becomes a row that says so
        traceback.print_exc()
        return {"failure": f"FAILED: {type(error).__name__}: {error}"}
    return {key: n for key, n in found.items() if not key.endswith("_seconds")} | {
        "imports_bytes": imports,
        "trained": trained_parameters(job.model),
        "backbone": job.size,
        "optimizer": trainers_optimizer(),
        "backend": backend_settings(),
        **job.peak(),
    }


def in_process(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Do that in a process of its own, which has imported everything already where that works."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(["cost_worker"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(measure_memory, case, settings).result()
        except BrokenProcessPool:
            return {"failure": "FAILED: the process ended (out of memory?)"}
