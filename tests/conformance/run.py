# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's own tests on SFA, and on PEFT's SHiRA beside it.

python -m tests.conformance.run [--suites custom,config] [--methods sfa] [-k EXPRESSION]

The exit status is 1 if a case of SFA failed, if a suite ran none, or if PEFT's tests cannot be had.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from .outcomes import Outcomes, read_report, reasons, side_by_side
from .upstream import UpstreamError, upstream_tests

SUITES = ("custom", "config", "decoder", "feature", "vision")
METHODS = ("sfa", "shira")
# What PEFT's tests have and no row here: said in the report, so that nothing is left out silently.
LEFT_OUT = {
    "custom": ["Embedding, Conv1D, Conv3d and attention modules: SFA adapts Linear and Conv2d"],
    "decoder": ["GPT-2: its layers are Conv1D, which neither SFA nor SHiRA adapts"],
}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".conformance"


def run_suite(suite: str, method: str, tests: Path, keyword: str | None) -> Outcomes:
    """Run one suite on one method in a process of its own; its log stays in the cache."""
    logs = CACHE / f"logs-peft-{version('peft')}-transformers-{version('transformers')}"
    logs.mkdir(parents=True, exist_ok=True)
    report = logs / f"{suite}-{method}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE / "suites" / f"suite_{suite}.py"), "-q"]
    command += ["-c", str(HERE / "suites" / "pytest.ini"), "--confcutdir", str(HERE / "suites")]
    command += ["--tb=short", f"--junitxml={report}"]
    if keyword:
        command += ["-k", keyword]
    with report.with_suffix(".log").open("w") as log:
        # The report tells what failed; a run without a report is a failure, too.
        env = environment(method, tests)
        subprocess.run(
            command, cwd=tests, env=env, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    return read_report(report)


def environment(method: str, tests: Path) -> dict[str, str]:
    """Offline, one thread, with this repository and the staged tests on the path."""
    paths = [str(tests), str(ROOT), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "SFA_CHECK_BASE"}
    return {
        **inherited,
        "CONFORMANCE_METHOD": method,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def names(allowed: tuple[str, ...]):
    """An argparse type: a comma-separated choice of `allowed`."""

    def choose(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return choose


def show(suites: dict[str, dict[str, Outcomes]]) -> Iterator[str]:
    """The report: table, what did not run and why, failures."""
    yield side_by_side(suites)
    for method in next(iter(suites.values())):
        if text := reasons(suites, method):
            yield f"\nNot run, or failing as expected, {method}:\n{text}"
    for suite in suites:
        for text in LEFT_OUT.get(suite, []):
            yield f"\nLeft out of {suite}: {text}"
    for suite, row in suites.items():
        for method, found in row.items():
            for name, message in found.failures:
                yield f"FAILED {suite} {method} {name}: {message}"
            if not found.counts.total():
                yield f"FAILED {suite} {method}: no case ran, see {CACHE}"


def main() -> int:
    """Run, print, and say by the exit status whether SFA passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", type=names(SUITES), default=list(SUITES))
    parser.add_argument("--methods", type=names(METHODS), default=list(METHODS))
    parser.add_argument("-k", dest="keyword", help="pytest's -k")
    args = parser.parse_args()
    try:
        tests = upstream_tests(version("peft"), CACHE)
    except UpstreamError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    suites: dict[str, dict[str, Outcomes]] = {}
    for suite in args.suites:
        suites[suite] = {m: run_suite(suite, m, tests, args.keyword) for m in args.methods}
    for text in show(suites):
        print(text)
    judged = "sfa" if "sfa" in args.methods else args.methods[0]
    return 0 if all(row[judged].good for row in suites.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
