# SPDX-License-Identifier: Apache-2.0
"""Every method on every task set within every budget, equally tuned.

    python -m benchmarks.tradeoff status                       # what is done, what is left
    python -m benchmarks.tradeoff run --budget-minutes 60      # go on, the most telling runs first
    python -m benchmarks.tradeoff run --task segmentation --jobs 2 --nice 19
    python -m benchmarks.tradeoff table5 --jobs 2              # one of the paper's, beside ours
    python -m benchmarks.tradeoff report                       # docs/tradeoff.md and its pictures

Results are files in `benchmarks/tradeoff/results`: commit them, and another machine goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .ablations import ABLATIONS
from .experiments import Experiment, load_experiments
from .plan import Plan
from .store import RESULTS, Store
from .tasks import TASKS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tradeoff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="print what is done and left, in CPU hours")
    run = commands.add_parser("run", help="run what is left")
    running = [run]
    for name, ablation in ABLATIONS.items():
        running.append(commands.add_parser(name, help=f"run and print {ablation.title}"))
    for command in (status, run):
        command.add_argument(
            "--task", nargs="+", choices=list(TASKS), default=[], help="task sets; all by default"
        )
    for command in running:
        add = command.add_argument
        add("--budget-minutes", type=float, help="begin no run that would end later")
        add("--jobs", type=int, default=1, help="processes at a time, one core each")
        add("--threads", type=int, default=1, help="threads of each process")
        add("--nice", type=int, default=0, help="how far to step back behind others")
    report = commands.add_parser("report", help="write the page and its pictures")
    report.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page")
    return parser.parse_args(argv)


def status(plan: Plan, only: Sequence[str]) -> str:
    """Return the table of what is done and left."""
    lines = [f"{'stage':34}{'task set':14}{'done':>6}{'left':>6}{'CPU h left':>12}"]
    total = 0.0
    for stage, task, done, left in plan.status(only):
        hours = left * plan.seconds(task) / 3600
        total += hours
        note = "" if TASKS[task].is_there else f"  ({TASKS[task].folder} names no folder)"
        if done + left:
            lines.append(f"{stage.title:34}{task:14}{done:>6}{left:>6}{hours:>12.1f}{note}")
    lines.append(f"{'all':34}{'':14}{len(plan.results):>6}{'':6}{total:>12.1f}")
    return "\n".join(lines)


def run(
    store: Store,
    args: argparse.Namespace,
    experiments: dict[str, Experiment],
    only: Sequence[str],
) -> None:
    """Work the plan off."""
    os.nice(args.nice)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .runner import Runner  # torch reads the environment when it is imported
    from .train import run_experiment, warm

    runner = Runner(
        store,
        experiments,
        run_experiment,
        warm=warm,
        only=only,
        jobs=args.jobs,
        budget_minutes=args.budget_minutes,
    )
    ended = runner.work()
    print(f"{ended} runs ended, {len(runner.failed)} of them without a result")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command."""
    args = parse(argv)
    store, experiments = Store(args.results), load_experiments()
    if args.command == "status":
        print(status(Plan(experiments, store.read()), args.task))
    elif args.command == "run":
        run(store, args, experiments, args.task)
    elif args.command in ABLATIONS:
        ablation = ABLATIONS[args.command]
        run(store, args, ablation.among(experiments), ablation.tasks)
        print(ablation.table(Plan(experiments, store.read())))
    else:
        from .report import write_report

        print(write_report(Plan(experiments, store.read()), args.output))


if __name__ == "__main__":
    main()
