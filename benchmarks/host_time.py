# SPDX-License-Identifier: Apache-2.0
"""What training steps and forwards cost in Python: many layers so small that nothing else counts.

A GPU waits for that; on a CPU it hides behind the products. Processor time of this thread only, so
load from elsewhere does not count; the least of many steps, in turns::

    python benchmarks/host_time.py --output out/host_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools

import torch
from cost_table import align
from cost_worker import trainers_optimizer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sfa_peft import SFAConfig, SFASelector

WIDTH = 16
#: Parts of a training step, and a forward in eval mode.
PARTS = ("forward", "backward", "update", "step", "eval")


class Tower(nn.Module):
    """Linear layers on top of each other."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each input."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Job:
    """A model and what trains it."""

    def __init__(self, model: nn.Module, *, selects: bool = False) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, **trainers_optimizer())
        # A run so long that it does not get to its first pick.
        self.selector = SFASelector(model.train(), total_steps=1 << 20) if selects else None

    def step(self, x: Tensor) -> list[float]:
        """Return milliseconds of this thread for the parts of a training step."""
        self.model.train()
        ends = [time.thread_time()]
        loss = self.model(x).sum()
        ends.append(time.thread_time())
        loss.backward()
        ends.append(time.thread_time())
        self.optimizer.step()
        if self.selector is not None:
            self.selector.step(self.optimizer)
        self.optimizer.zero_grad()
        ends.append(time.thread_time())
        parts = [1e3 * (b - a) for a, b in itertools.pairwise(ends)]
        return [*parts, sum(parts)]

    def evaluate(self, x: Tensor) -> float:
        """Return milliseconds of a forward in eval mode."""
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            start = time.thread_time()
            self.model(x)
            return 1e3 * (time.thread_time() - start)


def make_jobs(layers: int) -> dict[str, Job]:
    """Return the models by the names of rows."""
    names = [f"layers.{i}" for i in range(layers)]
    common: dict[str, Any] = {"target_modules": names, "modules_to_save": ["head"]}
    inner = common | {"rho": 0.0, "budget": 0.1}
    outer = common | {"score": "random", "external_modules": names}

    def sfa(*, selects: bool = False, **options: Any) -> Job:
        return Job(get_peft_model(Tower(layers), SFAConfig(**options)), selects=selects)

    return {
        "full": Job(Tower(layers)),
        "LoRA": Job(get_peft_model(Tower(layers), LoraConfig(r=2, **common))),
        "SFA, scoring": sfa(selects=True, selection_steps=1 << 10, **inner),
        "SFA, selected weights": sfa(score="random", **inner),
        "SFA, external adapters": sfa(**outer | {"rho": 1.0, "budget": 0.3}),
        "SFA, both": sfa(**outer | {"rho": 0.5, "budget": 0.6}),
    }


def measure(layers: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each model: the least time of each part of a step, and of a forward."""
    jobs, x = make_jobs(layers), torch.randn(4, WIDTH)
    found: dict[str, list[list[float]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found[name].append(job.step(x))
    evals = {name: [job.evaluate(x) for _ in range(rounds)] for name, job in jobs.items()}
    return [
        {"method": name}
        | dict(
            zip(PARTS, [*map(min, zip(*found[name], strict=True)), min(evals[name])], strict=True)
        )
        for name in jobs
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=144, help="(default: 144)")
    parser.add_argument("--rounds", type=int, default=60, help="turns (default: 60)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = measure(args.layers, args.rounds)
    print(f"microseconds a layer, {args.layers} layers")
    cells = [[row["method"], *(f"{1e3 * row[p] / args.layers:.0f}" for p in PARTS)] for row in rows]
    print(align(["method", *PARTS], cells))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"layers": args.layers, "rounds": args.rounds, "torch": torch.__version__}
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
