# SPDX-License-Identifier: Apache-2.0
"""What a forward costs in Python: many layers so small that nothing else takes time.

A GPU waits for that; on a CPU it hides behind the products. Processor time of this thread only, so
load from elsewhere does not count; the least of many forwards, in turns::

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

import torch
from cost_table import align
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sfa_peft import SFAConfig

WIDTH = 16


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


def make_models(layers: int) -> dict[str, nn.Module]:
    """Return the models by the names of rows."""
    names = [f"layers.{i}" for i in range(layers)]
    common: dict[str, Any] = {"target_modules": names, "modules_to_save": ["head"]}
    sfa = common | {"score": "random", "external_modules": names}
    inner = sfa | {"rho": 0.0, "budget": 0.1, "external_modules": None}
    configs = {
        "LoRA": LoraConfig(r=2, **common),
        "SFA, selected weights": SFAConfig(**inner),
        "SFA, external adapters": SFAConfig(**sfa | {"rho": 1.0, "budget": 0.3}),
        "SFA, both": SFAConfig(**sfa | {"rho": 0.5, "budget": 0.6}),
        "SFA, selected weights, loaded": SFAConfig(**inner, inference_mode=True),
    }
    adapted = {name: get_peft_model(Tower(layers), config) for name, config in configs.items()}
    return {"bare": Tower(layers), **adapted}


def milliseconds(model: nn.Module, x: Tensor) -> float:
    """Return the processor time of a forward."""
    start = time.thread_time()
    model(x)
    return 1e3 * (time.thread_time() - start)


def measure(layers: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each model: the least time of a forward in training and in eval mode."""
    models, x = make_models(layers), torch.randn(4, WIDTH)
    rows = [{"model": name} for name in models]
    for mode in ("training", "eval"):
        times: list[list[float]] = [[] for _ in models]
        for model in models.values():
            model.train(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            for _ in range(rounds):
                for own, model in zip(times, models.values(), strict=True):
                    own.append(milliseconds(model, x))
        for row, own in zip(rows, times, strict=True):
            row[mode] = min(own)
            row[f"{mode}_per_layer"] = 1e3 * (row[mode] - rows[0][mode]) / layers
    return rows


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
    heads = ["method", "training ms", "a layer, us", "eval ms", "a layer, us"]
    cells = [
        [row["model"], *(f"{row[mode + kind]:.1f}" for mode in ("training", "eval")
                         for kind in ("", "_per_layer"))]
        for row in rows
    ]  # fmt: skip
    print(align(heads, cells))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"layers": args.layers, "rounds": args.rounds, "torch": torch.__version__}
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
