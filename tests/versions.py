# SPDX-License-Identifier: Apache-2.0
"""Run the tests on the oldest and the newest PEFT and transformers that are supported.

python -m tests.versions [--only NAME] [--python /usr/bin/python3.10]

Each environment is created under .venvs/ and kept; delete the folder to get newer versions. torch
is the version of constraints.txt, but for `torchvision`, which needs the release that it was built
for: that one brings CUDA's libraries along (5.5 GB), and runs on a CPU. The exit status is 1 if
anything failed.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .conformance.outcomes import table

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venvs"
OLDEST_PEFT = "peft==0.21.0"
OLDEST_TRANSFORMERS = "transformers==4.57.*"
# Packages that follow transformers or PEFT: their pins fit the newest of the two only.
FOLLOWERS = {
    "accelerate",
    "click",
    "datasets",
    "fsspec",
    "hf-xet",
    "huggingface-hub",
    "peft",
    "rich",
    "tokenizers",
    "transformers",
    "typer",
}
# The rest of the tests (examples, benchmarks, dense) does not depend on PEFT's version.
TESTS = ("tuner", "tasks", "training", "behaviour", "files", "selection", "sparse")
# Without what they ask for in turn: timm wants torchvision, which may have no build for this torch.
LIGHTNING = ("lightning", "lightning-utilities", "pytorch-lightning", "torchmetrics")
ENCODERS = ("segmentation-models-pytorch", "timm")
AVERAGES = ("diffusers", "einops", "ema-pytorch", "timm", "torch-ema", *LIGHTNING)
# A torch and what was built for it.
TORCHVISION = ("torch==2.14.1", "torchvision==0.29.1")
PASSED = re.compile(r"^(?:\d+ failed, )?(\d+) passed", re.MULTILINE)


@dataclass(frozen=True)
class Environment:
    """A name, what pip is asked for, and what is tested.

    Attributes:
        name: Of the row and the folder.
        peft: Which PEFT.
        transformers: Which transformers.
        others: Packages that are installed without what they ask for.
        only: A test that the environment is for, where it is not for all.
        torch: A torch, and what fits it, in place of that of constraints.txt.
        more: Tests that it is for besides.
    """

    name: str
    peft: str
    transformers: str
    others: tuple[str, ...] = ()
    only: str | None = None
    torch: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def folder(self, python: str) -> Path:
        """Where the environment lives: one for each interpreter."""
        return HOME / f"{self.name}-{Path(python).name}"


ENVIRONMENTS = (
    Environment("oldest", OLDEST_PEFT, OLDEST_TRANSFORMERS),
    Environment("oldest-peft", OLDEST_PEFT, "transformers"),
    Environment("oldest-transformers", "peft", OLDEST_TRANSFORMERS),
    Environment("newest", "peft", "transformers"),
    Environment("averages", "peft", "transformers", AVERAGES, "behaviour/test_average_packages.py"),
    Environment(
        "torchvision",
        "peft",
        "transformers",
        (*LIGHTNING, *ENCODERS),
        torch=TORCHVISION,
        more=("dense", "examples"),
    ),
)


def pins(constraints: str, *, same_python: bool, torch: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of constraints.txt that hold in every environment.

    The pins are for one version of Python; on others only torch's is kept, or another torch's.
    """
    yield from torch
    for line in constraints.splitlines():
        name, separator, _ = line.partition("==")
        name = name.strip().lower().replace("_", "-")
        if not separator or name in FOLLOWERS or (torch and name == "torch"):
            continue
        if same_python or name == "torch":
            yield line


def minor(python: str) -> str:
    """Major and minor version of an interpreter, such as "3.11"."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def create(environment: Environment, python: str) -> Path:
    """The environment's interpreter; everything is installed when it is first asked for."""
    folder = environment.folder(python)
    inside, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.is_file():
        return inside
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    pinned_for = re.search(r"Python (\d+\.\d+)", constraints)
    same = pinned_for is not None and minor(python) == pinned_for[1]
    kept = folder / "constraints.txt"
    lines = pins(constraints, same_python=same, torch=environment.torch)
    kept.write_text("\n".join(lines) + "\n", "utf-8")
    command = [str(inside), "-m", "pip", "install", "--quiet", "-c", str(kept)]
    command += ["-e", f"{ROOT}[test]", environment.peft, environment.transformers]
    command += environment.torch
    subprocess.run(command, check=True)
    if environment.others:
        command = [str(inside), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, *environment.others], check=True)
    stamp.touch()
    return inside


def installed(inside: Path, package: str) -> str:
    """Version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    command = [str(inside), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def tests(inside: Path, log: Path, environment: Environment) -> str:
    """Run our own tests: how many passed, or what the last line says."""
    only = environment.only
    folders = (only,) if only else (*TESTS, *environment.more)
    paths = [str(ROOT / "tests" / folder) for folder in folders]
    if not only:
        paths += sorted(str(path) for path in (ROOT / "tests").glob("test_*.py"))
    command = [str(inside), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *paths]
    return run(command, log)


def conformance(inside: Path, log: Path) -> str:
    """Run PEFT's custom and config suites on SFA."""
    command = [str(inside), "-m", "tests.conformance.run"]
    return run([*command, "--suites", "custom,config", "--methods", "sfa"], log)


def run(command: list[str], log: Path) -> str:
    """Run with the output in a file: "ok", with the number of passed tests, or "FAILED"."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    return verdict(done.returncode, log.read_text("utf-8", errors="replace"))


def verdict(status: int, text: str) -> str:
    """One cell of the table, from an exit status and what was printed."""
    if status:
        return f"FAILED ({status})"
    passed = PASSED.search(text)
    return f"ok, {passed[1]} passed" if passed else "ok"


def check(environment: Environment, python: str) -> list[str]:
    """One row of the table."""
    try:
        inside = create(environment, python)
    except subprocess.CalledProcessError as error:
        return [
            environment.name,
            minor(python),
            "-",
            "-",
            f"not installed ({error.returncode})",
            "-",
        ]
    versions = [installed(inside, package) for package in ("peft", "transformers")]
    folder = environment.folder(python)
    ours = tests(inside, folder / "tests.log", environment)
    theirs = "ok, left out"
    if not environment.only:
        theirs = conformance(inside, folder / "conformance.log")
    return [environment.name, minor(python), *versions, ours, theirs]


def main() -> int:
    """Check the environments, print a table and where the logs are."""
    names = [environment.name for environment in ENVIRONMENTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, action="append", help="may be repeated")
    parser.add_argument("--python", default=sys.executable, help="interpreter to start from")
    args = parser.parse_args()
    rows = []
    for environment in ENVIRONMENTS:
        if environment.name in (args.only or names):
            print(f"== {environment.name}", flush=True)
            rows.append(check(environment, args.python))
    print(table(["environment", "Python", "peft", "transformers", "tests", "PEFT's"], rows))
    print(f"Logs: {HOME}/*/tests.log and conformance.log")
    return 0 if all(cell.startswith("ok") for row in rows for cell in row[4:]) else 1


if __name__ == "__main__":
    sys.exit(main())
