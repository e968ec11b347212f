# SPDX-License-Identifier: Apache-2.0
"""Cost of training, side by side: step time, peak memory, and what a pick of SFA takes.

Frozen backbone, full fine-tuning, LoRA, SHiRA and Super-Tuning (of PEFT, on the layers that SFA
adapts, with as many trained parameters) and SFA while it scores and after its last pick::

    python benchmarks/cost.py --backbone base --output out/cost.json

All rows are timed in one process in turns, so that load from elsewhere hits all of them; the peak
memory of each is that of a process of its own. Models are SwinV2 with random weights: nothing is
downloaded. Selected positions are like those of trained adapters, see `selections.py`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cost_cases import BACKBONES, METHODS, Case, make_cases, window_of
from cost_models import Task, make_task
from cost_table import MB, Row, add_ratios, bars_of, render, turn_seconds
from cost_worker import Job, in_process


def measure(cases: list[Case], settings: dict[str, Any]) -> list[Row]:
    """Run cases in turns and return their rows."""
    # Memory is the same whatever else runs; steps of two processes fill what builds leave idle.
    at_once = 2 if settings["device"] == "cpu" and settings["threads"] > 1 else 1
    shared = settings | {"threads": settings["threads"] // at_once}
    with ThreadPoolExecutor(at_once) as processes:
        rows = list(processes.map(lambda case: measure_alone(case, shared), cases))
    jobs: list[tuple[Row, Job]] = []
    make_again = keep_tasks()
    for row, case in zip(rows, cases, strict=True):
        if "failure" not in row:
            tell(f"build: {case.label}")
            jobs.append((row, Job(case.to_dict(), settings, make_again)))
            row["replies"] = []
    for number in range(settings["rounds"]):
        tell(f"turn {number + 1} of {settings['rounds']}")
        # To and fro, so that nobody always runs behind the same neighbour.
        for row, job in jobs if number % 2 == 0 else reversed(jobs):
            is_pick, count = row["phase"] == "pick", row["cycle"] * settings["steps"]
            row["replies"].append(job.pick() if is_pick else job.steps(count))
    for row in rows:
        summarise(row)
    add_ratios(rows)
    return rows


def measure_alone(case: Case, settings: dict[str, Any]) -> Row:
    """Return a case's row with what a process of its own finds."""
    tell(f"memory: {case.label}")
    row: Row = {"method": case.method, "phase": case.phase, "budget": case.budget}
    return row | {"cycle": case.cycle} | in_process(case.to_dict(), settings)


def keep_tasks() -> Callable[..., Task]:
    """Return a `make_task` that initialises a model once and gives out copies."""
    kept = functools.cache(make_task)
    return lambda *args: copy.deepcopy(kept(*args))


def summarise(row: Row) -> None:
    """Turn what a row's turns took into medians over all of them."""
    replies = row.pop("replies", [])
    if "failure" in row:
        return
    if row["phase"] == "pick":
        row["picks"] = replies
        for key in (key for key in replies[0] if key.endswith("_seconds")):
            row[key] = median(reply[key] for reply in replies)
    else:
        row["rounds"] = [reply["seconds"] for reply in replies]
        row["host_seconds"] = median(s for reply in replies for s in reply["host_seconds"])
        row["step_seconds"] = median(turn_seconds(row))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what ran: device, processor, cores and versions."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        model = names[0].split(":", 1)[1].strip() if names else model
    packages = ("torch", "transformers", "peft")
    return {
        "cpu": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "malloc": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "LD_PRELOAD"))},
    }


def header(rows: list[Row], about: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return the lines above the table."""
    built = next((row for row in rows if "imports_bytes" in row), None)
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "peft"))
    lines = [f"{about['cpu']}, {about['cores']} cores, {settings['threads']} threads; {versions}"]
    if built is not None:
        imports = built["imports_bytes"] / MB
        lines.append(
            f"SwinV2 {settings['backbone']}: {built['backbone']:,} parameters, "
            f"{settings['resolution']} px, batch {settings['batch_size']}, pure "
            f"{settings['dtype']}, {about['device']}; imports alone take {imports:.0f} MB of "
            "a process"
        )
    return "\n".join([*lines, f"$ {about['command']}"])


def usable_cores() -> int:
    """Return how many cores this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def tell(message: str) -> None:
    """Say on stderr what goes on."""
    print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="base", help="size of SwinV2 (default: base)")
    add("--resolution", type=int, default=256, help="pixels, a multiple of 32 (default: 256)")
    add("--batch_size", type=int, default=1, help="images per step (default: 1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    add(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of backbone, head and images, without autocast; adapters keep the dtype that their "
        "library gives them (default: float32)",
    )  # fmt: skip
    add("--threads", type=int, default=usable_cores(), help="of torch (default: all cores)")
    add("--steps", type=int, default=1, help="steps of a method's turn (default: 1)")
    add("--rounds", type=int, default=5, help="turns of each method, and picks (default: 5)")
    add(
        "--budget", type=float, nargs="+", default=[0.05],
        help="shares of the backbone that may be trained; rows for each (default: 0.05)",
    )  # fmt: skip
    add(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"rows to measure (default: all): {', '.join(METHODS)}",
    )  # fmt: skip
    add("--output", type=Path, help="JSON file for all figures, single steps included")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "threads", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(args, name)}")
    if wrong := [b for b in args.budget if not 0 < b <= 1]:
        parser.error(f"--budget: expected shares above 0 and at most 1, got {wrong}")
    if not window_of(args.resolution):
        parser.error(
            f"--resolution: {args.resolution} px leaves no attention window that divides every "
            "stage's grid; try 64, 128, 192, 256, 384 or 512"
        )
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "methods", "budget")}
    budgets = list(dict.fromkeys(args.budget))
    torch.set_num_threads(args.threads)
    rows = measure(make_cases(args.methods, budgets), settings)
    about = machine(args.device)
    given = sys.argv[1:] if arguments is None else arguments
    about["command"] = shlex.join(["python", "benchmarks/cost.py", *given])
    print(f"{header(rows, about, settings)}\n\n{render(rows, settings)}")
    for row in rows:
        if "failure" not in row:
            row["bars"] = [bar._asdict() | {"met": bar.is_met} for bar in bars_of(row, settings)]
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": about, "settings": settings, "rows": rows}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(row.get("failure", "").startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
