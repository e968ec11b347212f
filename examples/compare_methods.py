# SPDX-License-Identifier: Apache-2.0
"""Several methods on one task, same seed and data: a table, and pictures side by side.

What `make demo` runs (rendered scenes, under five minutes on two cores)::

    python examples/compare_methods.py --task semantic_segmentation \
        --runs frozen sfa@0.05 sfa@0.2 full --output_dir out/demo

A run is a method, or `method@budget`. Every other option goes to the task's script as it is, so
`--dataset_name`, `--recipe`, `--max_steps` and so on hold for all runs. Each run leaves its adapter
in a folder of its own in `--output_dir`; the table is written anew after each of them.
"""

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from common.arguments import METHODS, ONE_SIZE, parse
from common.methods import prepare_method
from common.reporting import (
    CURVE_NAME,
    RESULTS_NAME,
    SHEET_NAME,
    Result,
    folder_name,
    open_output,
    run_name,
    table,
    to_json,
    write_text,
)
from common.training import run_script

from sfa_peft.dense import curve_plot

TASKS = (
    "semantic_segmentation",
    "depth_estimation",
    "object_detection",
    "instance_segmentation",
)
RUNS = ("frozen", "sfa@0.05", "sfa@0.2", "full")
FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # of torchrun's


def parse_command(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and those for the task's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="Script to run.")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(RUNS),
        metavar="METHOD[@BUDGET]",
        help=f"Rows of the table, of {', '.join(METHODS)}; by default {' '.join(RUNS)}.",
    )
    parser.add_argument("--output_dir", default="out/compare", help="Folder for everything.")
    args, others = parser.parse_known_args(argv)
    for run in args.runs:
        method, _, budget = run.partition("@")
        if method not in METHODS:
            parser.error(f"--runs {run}: expected one of {', '.join(METHODS)}, or with @budget")
        if "@" in run and method in ONE_SIZE:
            parser.error(f"--runs {run}: {method} has no budget; got {budget}")
    for option in ("--method", "--budget"):
        if any(other.split("=")[0] == option for other in others):
            parser.error(f"{option}: say it in --runs, as in `sfa@0.05`")
    return args, others


def command_of(run: str, script: ModuleType, out: Path, others: list[str]) -> list[str]:
    """Return the command line of one run."""
    method, _, budget = run.partition("@")
    options = [*others, "--method", method, *(["--budget", budget] if budget else [])]
    options += ["--output_dir", str(out)]
    name = folder_name(run_name(parse(script.Arguments, options, script.__name__)))
    return [*options[:-1], str(out / name)]


def write_comparison(results: list[Result], out: Path, others: list[str]) -> None:
    """Write table and pictures of the runs so far."""
    rows = [result.row for result in results]
    write_text(out / RESULTS_NAME, to_json({"options": others, "rows": rows}))
    write_text(out / "results.md", table(results, " | ") + "\n")
    curves = {result.name: result.curve for result in results}
    curve_plot(curves, out / CURVE_NAME, xlabel="update step", ylabel="training loss")
    columns = {title: pictures for r in results for title, pictures in r.columns.items()}
    results[0].draw(columns, out / SHEET_NAME)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args, others = parse_command(argv)
    script = importlib.import_module(args.task)
    out = Path(args.output_dir)

    # 1. Set all up once, so that mistakes show before training
    commands = [command_of(run, script, out, others) for run in dict.fromkeys(args.runs)]
    for command in commands:
        options = parse(script.Arguments, command, script.__name__)
        open_output(options)
        prepare_method(script.make_model(options, script.load_data(options)), options)

    # 2. Run, and write what there is after each
    results: list[Result] = []
    for command in commands:
        print(f"\n--- {' '.join(command[len(others) :])} ---", flush=True)
        results.append(script.main(command))
        if FIRST_PROCESS:
            write_comparison(results, out, others)

    # 3. Table
    if FIRST_PROCESS:
        print(f"\n{table(results)}\n\nTable, pictures and adapters are in {out}/")
    return results


if __name__ == "__main__":
    run_script(main)
