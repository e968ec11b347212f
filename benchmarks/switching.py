# SPDX-License-Identifier: Apache-2.0
"""From one task to another on one backbone, side by side: time, bits left changed, forward latency.

SFA's `set_adapter` against unmerging and merging LoRA, SHiRA and Super-Tuning of PEFT (on the same
layers, with as many parameters) and against copying a full checkpoint that lies in memory::

    python benchmarks/switching.py --backbone base --output out/switching.json

Time is from task A active to task B ready: SFA's includes every write, which is checked. Everything
takes turns, so that load from elsewhere hits all of it. Models are SwinV2 with random weights:
nothing is downloaded. Selections are like trained ones (see `selections.py`), in as many picks as a
training run makes (`--picks`); one row has uniform ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cost import machine, tell, usable_cores
from cost_cases import BACKBONES, window_of
from cost_models import NotAvailable, Task, make_task
from cost_table import MB, Bar, align
from switching_cases import Dense, Merged, Sparse, left_changed

from sfa_peft import limit_switch_memory

#: A switch over a dense copy, by budget, and a way back to the pretrained weights over one.
SWITCH = {0.05: 0.6, 0.2: 1.0}
DISABLE = 0.5
#: Its positions are not like trained ones: no bars.
UNIFORM = "sfa_internal, uniform"
#: Ratio to the bare model's forward; the first is 1.00 as rounded.
FORWARD = {"internal": 1.005, "external": 1.20, "both": 1.15}
#: A second bare model: how far two models of the same kind are apart.
CONTROL = "bare, again"
FORWARD_BUDGET = 0.1
PEERS = ("lora", "shira", "super_tuning")
CYCLES = (1, 1000)

Row = dict[str, Any]


def timed(action: Callable[[], object], device: str) -> float:
    """Return the milliseconds that an action takes."""
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_switches(args: argparse.Namespace, budget: float) -> list[Row]:
    """Return a row per method: switching between two tasks, and back to pretrained weights."""

    def new_task() -> Task:
        return make_task(args.backbone, args.resolution, getattr(torch, args.dtype), args.device)

    makers: dict[str, Callable[[], Any]] = {
        "dense copy": lambda: Dense(new_task()),
        "sfa_internal": lambda: Sparse(new_task(), budget, 0.0, args.picks),
        "sfa_both": lambda: Sparse(new_task(), budget, 0.5, args.picks),
        UNIFORM: lambda: Sparse(new_task(), budget, 0.0, args.picks, uniform=True),
        **{peer: lambda peer=peer: Merged(new_task(), peer, budget) for peer in PEERS},
    }
    rows, pairs = [], []
    for method, make in makers.items():
        tell(f"{budget:.0%}: build {method}")
        row: Row = {"method": method, "budget": budget, "switch": [], "disable": []}
        rows.append(row)
        try:
            one = make()
            row["first"] = [timed(partial(one.switch, name), args.device) for name in "aba"]
        except (NotAvailable, ValueError) as error:
            row["failure"] = f"not run: {error}"
            continue
        row["changed"] = one.changed
        pairs.append((row, one))
    keep_pairs([one for _, one in pairs if isinstance(one, Sparse)], args.switch_memory)
    for number in range(args.rounds):
        tell(f"{budget:.0%}: round {number + 1} of {args.rounds}")
        for row, one in pairs if number % 2 == 0 else reversed(pairs):
            take_turn(row, one, args.device)
    for row, one in pairs:
        summarise(row, rows[0])
        if isinstance(one, Sparse):
            row["task_bytes"] = one.extra_bytes()
        elif isinstance(one, Dense):
            row["task_bytes"] = sum(t.nbytes for t in one.states["a"].values())
    return rows


def keep_pairs(models: list[Sparse], mebibytes: int) -> None:
    """Have two tasks kept to switch in one pass, as if each model had a process of its own."""
    limit_switch_memory(len(models) * mebibytes << 20)
    for name in "baba":
        for model in models:
            model.switch(name)


def summarise(row: Row, dense: Row) -> None:
    """Turn what turns took into medians, and into ratios to a dense copy of the same turn."""
    for key in ("switch", "disable"):
        ratios = [a / b for a, b in zip(row[key], dense[key], strict=True)]
        row[f"{key}_ms"], row[f"{key}_to_dense"] = median(row[key]), median(ratios)
        row[f"{key}_spread"] = [min(ratios), max(ratios)]


def take_turn(row: Row, one: Any, device: str) -> None:
    """Time two switches and the way back to the pretrained weights."""
    for name in ("b", "a"):
        row["switch"].append(timed(partial(one.switch, name), device))
        if isinstance(one, Sparse) and not one.is_ready():
            raise RuntimeError("the next forward would have written more")
    row["disable"].append(timed(one.disable, device))
    one.enable("a")


def measure_exactness(args: argparse.Namespace, budget: float) -> list[Row]:
    """Return a row per method: entries left changed by merging and unmerging in bfloat16."""
    rows = []
    for method in ("sfa_internal", "sfa_both", *PEERS):
        row: Row = {"method": method, "budget": budget}
        rows.append(row)
        try:
            for cycles in CYCLES:
                tell(f"bfloat16: {cycles} merges of {method}")
                task = make_task("nano", 64, torch.bfloat16, args.device)
                row[f"left_{cycles}"], row["touched"] = left_changed(method, task, budget, cycles)
        except (NotAvailable, ValueError) as error:
            row["failure"] = f"not run: {error}"
    return rows


def measure_forward(args: argparse.Namespace) -> list[Row]:
    """Return a row per kind of adapter: latency of a forward against the bare backbone's."""
    budget, dtype = FORWARD_BUDGET, getattr(torch, args.dtype)
    bare = make_task(args.backbone, args.resolution, dtype, args.device).eval()
    again = make_task(args.backbone, args.resolution, dtype, args.device).eval()
    models: dict[str, torch.nn.Module] = {"bare": bare, CONTROL: again}
    for name, rho in (("internal", 0.0), ("external", 1.0), ("both", None)):
        tell(f"forward: build {name}")
        task = make_task(args.backbone, args.resolution, dtype, args.device)
        one = Sparse(task, budget, rho, args.picks)
        one.switch("a")
        models[name] = one.model
    shape = (args.batch_size, 3, args.resolution, args.resolution)
    images = torch.randn(shape).to(args.device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for number in range(args.forward_rounds + 1):
            for name in list(models) if number % 2 == 0 else reversed(models):
                took = timed(lambda n=name: models[n](images), args.device)
                if number:  # the first is for warming up
                    seconds[name].append(took)
    rows = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["bare"], strict=True)]
        row = {"method": name, "budget": None if name in ("bare", CONTROL) else budget}
        row |= {"forward_ms": median(taken), "forwards": taken}
        rows.append(row | {"to_bare": median(ratios), "bare_spread": [min(ratios), max(ratios)]})
    return rows


def bars_hold(args: argparse.Namespace) -> bool:
    """Whether the bars on switches are meant for these settings."""
    return args.backbone == "base" and args.device == "cpu" and args.threads == 2


def bars_of(row: Row, args: argparse.Namespace) -> list[Bar]:
    """Return the bars that apply to a row."""
    method, bars = row["method"], []
    if "failure" in row:
        return []
    limit, is_ours = SWITCH.get(row["budget"]), method.startswith("sfa") and method != UNIFORM
    if limit and "switch_ms" in row and is_ours and bars_hold(args):
        bars.append(Bar("/dense", row["switch_to_dense"], limit))
        bars.append(Bar("back", row["disable_to_dense"], DISABLE))
    if method.startswith("sfa") and "touched" in row:
        bars.append(Bar("changed", max(row[f"left_{c}"] for c in CYCLES), 0))
    if "to_bare" in row and method in FORWARD:
        bars.append(Bar("/bare", row["to_bare"], FORWARD[method]))
    return bars


def render(switches: list[Row], exact: list[Row], forwards: list[Row], args: Any) -> str:
    """Return the three tables."""

    def ratio(row: Row, key: str, spread: str) -> str:
        low, high = row[spread]
        return f"{row[key]:.2f} ±{(high - low) / 2:.2f}"

    def cells(row: Row, *figures: Callable[[Row], str]) -> list[str]:
        share = "-" if row["budget"] is None else f"{100 * row['budget']:g} %"
        shown = ["-" if "failure" in row else figure(row) for figure in figures]
        bars = ", ".join(map(str, bars_of(row, args)))
        return [row["method"], share, *shown, row.get("failure", bars)]

    switch = [
        cells(
            row,
            lambda r: f"{r['changed']:,}",
            lambda r: f"{r['switch_ms']:.1f}",
            lambda r: f"{min(r['switch']):.1f}",
            lambda r: ratio(r, "switch_to_dense", "switch_spread"),
            lambda r: f"{r['disable_ms']:.1f}",
            lambda r: ratio(r, "disable_to_dense", "disable_spread"),
            lambda r: f"{r['first'][0]:.0f}",
            lambda r: f"{r['task_bytes'] / MB:.0f}" if "task_bytes" in r else "-",
        )
        for row in switches
    ]
    left = [
        cells(
            row,
            lambda r: f"{r['touched']:,}",
            *(lambda r, c=c: f"{100 * r[f'left_{c}']:.2f} %" for c in CYCLES),
        )
        for row in exact
    ]
    forward = [
        cells(
            row,
            lambda r: f"{r['forward_ms']:.1f}",
            lambda r: ratio(r, "to_bare", "bare_spread"),
        )
        for row in forwards
    ]
    heads = ["parameters", "A to B ms", "least", "/dense", "to pretrained ms", "/dense"]
    heads += ["first ms", "MB"]
    after = [f"left after {c}" for c in CYCLES]
    tables = [
        align(["method", "budget", *heads, "bars"], switch),
        align(["method", "budget", "touched in bf16", *after, "bars"], left),
        align(["method", "budget", "forward ms", "/bare", "bars"], forward),
    ]
    return "\n\n".join(tables)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="base", help="size of SwinV2 (default: base)")
    add("--resolution", type=int, default=256, help="pixels, a multiple of 32 (default: 256)")
    add("--batch_size", type=int, default=1, help="images per forward (default: 1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    add("--threads", type=int, default=usable_cores(), help="of torch (default: all cores)")
    add("--rounds", type=int, default=10, help="turns of two switches each (default: 10)")
    add("--forward_rounds", type=int, default=10, help="forwards of each model (default: 10)")
    add("--picks", type=int, default=20, help="picks that made a selection (default: 20)")
    add(
        "--switch_memory", type=int, default=512,
        help="MiB that SFA may keep to switch in one pass (default: 512, as limit_switch_memory)",
    )  # fmt: skip
    add("--budget", type=float, nargs="+", default=[0.05, 0.2], help="(default: 0.05 0.2)")
    add("--output", type=Path, help="JSON file for all figures, single switches included")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "threads", "rounds", "forward_rounds", "picks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(args, name)}")
    if wrong := [b for b in args.budget if not 0 < b <= 1]:
        parser.error(f"--budget: expected shares above 0 and at most 1, got {wrong}")
    if not window_of(args.resolution):
        parser.error(f"--resolution: no window fits {args.resolution} px; try 64, 128 or 256")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # PEFT warns of every adapter that is added
    switches: list[Row] = []
    for budget in dict.fromkeys(args.budget):
        switches += measure_switches(args, budget)
        gc.collect()  # models of a budget hang together in cycles
    exact, forwards = measure_exactness(args, args.budget[0]), measure_forward(args)
    about = machine()
    given = sys.argv[1:] if arguments is None else arguments
    about["command"] = shlex.join(["python", "benchmarks/switching.py", *given])
    device = torch.cuda.get_device_name() if args.device == "cuda" else about["cpu"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "peft"))
    print(
        f"{device}, {about['cores']} cores, {args.threads} threads; {versions}\n"
        f"SwinV2 {args.backbone}, {args.resolution} px, batch {args.batch_size}, {args.dtype}; "
        f"selections in {args.picks} picks, {args.switch_memory} MiB for hot pairs\n"
        f"$ {about['command']}\n"
    )
    print(render(switches, exact, forwards, args))
    rows = {"switches": switches, "exactness": exact, "forwards": forwards}
    for row in (row for table in rows.values() for row in table):
        row["bars"] = [bar._asdict() | {"met": bar.is_met} for bar in bars_of(row, args)]
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        results = {"machine": about, "settings": settings, **rows}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
