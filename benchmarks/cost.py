# SPDX-License-Identifier: Apache-2.0
"""Cost of training, side by side: step time, peak memory, and what a pick of SFA takes.

Frozen backbone, full fine-tuning, LoRA, SHiRA and Super-Tuning (of PEFT, on the layers that SFA
adapts, with as many trained parameters) and SFA while it scores and after its last pick::

    python benchmarks/cost.py --backbone base --output out/cost.json

Each method lives in a process of its own and they take turns, a few steps at a time, so that load
from elsewhere hits all of them. Models are SwinV2 with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from cost_cases import BACKBONES, METHODS, Case, in_groups, make_cases, window_of
from cost_table import MB, Row, add_ratios, bars_of, render, turn_seconds

WORKER = Path(__file__).with_name("cost_worker.py")


class WorkerError(RuntimeError):
    """A row cannot be measured; the message goes into the table."""


class Worker:
    """A process that runs one case, see `cost_worker.py`."""

    def __init__(self, case: Case, settings: dict[str, Any]) -> None:
        self.case = case
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        threads = str(settings["threads"])
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",  # a worker that waits for its turn must not spin
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            WorkerError: If the worker could not do it, or is gone.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        try:
            stdin.write(json.dumps({"do": request, "with": arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        reply = json.loads(line)
        if "not_available" in reply:
            raise WorkerError(f"not run: {reply['not_available']}")
        if "error" in reply:
            raise WorkerError(f"FAILED: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        reason = "killed, out of memory?" if code == -9 else lines[-1] if lines else "no message"
        return f"FAILED: the worker ended with code {code} ({reason})"

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def measure(cases: list[Case], settings: dict[str, Any]) -> list[Row]:
    """Run cases in turns and return their rows."""
    rows: list[Row] = []
    workers: list[Worker] = []
    try:
        for case in cases:  # all at once, since they spend seconds on imports
            row: Row = {"method": case.method, "phase": case.phase, "budget": case.budget}
            rows.append(row | {"cycle": case.cycle})
            workers.append(Worker(case, settings))
        pairs = list(zip(rows, workers, strict=True))
        for row, worker in pairs:
            tell(f"build {worker.case.label}")
            answer(row, worker, "build", case=worker.case.to_dict(), settings=settings)
        pairs = [(row, worker) for row, worker in pairs if "failure" not in row]
        for number in range(settings["rounds"]):
            # To and fro, so that nobody always runs behind the same neighbour.
            for row, worker in pairs if number % 2 == 0 else reversed(pairs):
                tell(f"round {number + 1} of {settings['rounds']}: {worker.case.label}")
                if row["phase"] == "pick":
                    answer(row, worker, "pick")
                else:
                    cycles = math.ceil(settings["steps"] / row["cycle"])
                    answer(row, worker, "steps", count=cycles * row["cycle"])
        for row, worker in pairs:
            answer(row, worker, "peak")
    finally:
        for worker in workers:
            worker.close()
    for row in rows:
        summarise(row)
    add_ratios(rows)
    return rows


def answer(row: Row, worker: Worker, request: str, **arguments: Any) -> None:
    """Put a worker's reply into its row, or why there is none."""
    if "failure" in row:
        return
    try:
        reply = worker.ask(request, **arguments)
    except WorkerError as error:
        row["failure"] = str(error)
        tell(f"{worker.case.label}: {error}")
        return
    if request in ("steps", "pick"):
        row.setdefault("replies", []).append(reply)
    else:
        row |= reply


def summarise(row: Row) -> None:
    """Turn a row's replies into medians over all rounds."""
    replies = row.pop("replies", [])
    if "failure" in row:
        return
    if row["phase"] == "pick":
        row["picks"] = replies
        for key in replies[0]:
            values = [reply[key] for reply in replies]
            # A bar on memory is one for every pick.
            row[key] = median(values) if key.endswith("_seconds") else max(values)
    else:
        row["rounds"] = [reply["seconds"] for reply in replies]
        row["host_seconds"] = median(s for reply in replies for s in reply["host_seconds"])
        row["step_seconds"] = median(turn_seconds(row))


def machine() -> dict[str, Any]:
    """Return what ran: processor, cores and versions."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        model = names[0].split(":", 1)[1].strip() if names else model
    packages = ("torch", "transformers", "peft")
    return {
        "cpu": model,
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
            f"{settings['dtype']}, {built['device_name']}; imports alone take {imports:.0f} MB of "
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
    add("--steps", type=int, default=3, help="steps of a method's turn (default: 3)")
    add("--rounds", type=int, default=5, help="turns of each method, and picks (default: 5)")
    add(
        "--budget", type=float, nargs="+", default=[0.05],
        help="shares of the backbone that may be trained; rows for each (default: 0.05)",
    )  # fmt: skip
    add(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"rows to measure (default: all): {', '.join(METHODS)}",
    )  # fmt: skip
    add(
        "--at_once", type=int, default=0,
        help="most models alive at the same time, for large backbones; full and shira run again "
        "with each group, since ratios hold within one (default: 0, no limit)",
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
    if args.at_once < 0 or 0 < args.at_once < 3:
        parser.error(f"--at_once: expected 0, or 3 or more (two are references): {args.at_once}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "methods", "budget")}
    budgets = list(dict.fromkeys(args.budget))
    rows: list[Row] = []
    repeated: list[Row] = []  # references that ran with a later group
    for group in in_groups(make_cases(args.methods, budgets), args.at_once):
        known = {(row["method"], row["phase"], row["budget"]) for row in rows}
        for row in measure(group, settings):
            is_known = (row["method"], row["phase"], row["budget"]) in known
            (repeated if is_known else rows).append(row)
    about = machine()
    given = sys.argv[1:] if arguments is None else arguments
    about["command"] = shlex.join(["python", "benchmarks/cost.py", *given])
    print(f"{header(rows, about, settings)}\n\n{render(rows, settings)}")
    for row in rows:
        if "failure" not in row:
            row["bars"] = [bar._asdict() | {"met": bar.is_met} for bar in bars_of(row, settings)]
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": about, "settings": settings, "rows": rows, "repeated": repeated}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(row.get("failure", "").startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
