# SPDX-License-Identifier: Apache-2.0
"""The scripts share what is the same, and use the library by its public names."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ("semantic_segmentation", "depth_estimation", "object_detection", "instance_segmentation")
PUBLIC = {"sfa_peft", "sfa_peft.dense", "sfa_peft.tasks"}
# What measures the insides of files and pools has to reach them.
INSIDE = {
    "benchmarks/file_size.py": {"sfa_peft.checkpoint.container", "sfa_peft.checkpoint.values"},
    "benchmarks/switching_cases.py": {"sfa_peft.tuner.model"},
    "benchmarks/trained_size.py": {
        "sfa_peft.checkpoint.container",
        "sfa_peft.checkpoint.packing",
        "sfa_peft.tuner.model",
        "sfa_peft.tuner.pool",
    },
}
RUN, ALLOWED = 6, 20  # lines


def imported(source: str) -> set[str]:
    """Return the modules of this package that a file imports, or imports from."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "sfa_peft"}


def code(source: str) -> list[str]:
    """Return the lines of a file that are neither empty, comments nor imports."""
    imports = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = [(i, line.strip()) for i, line in enumerate(source.splitlines(), 1)]
    return [line for i, line in lines if line and not line.startswith("#") and i not in imports]


def shared(first: str, second: str) -> int:
    """Return how many lines of a file stand, `RUN` or more in a row, in another one too."""
    a, b = code(first), code(second)
    runs = {tuple(b[i : i + RUN]) for i in range(len(b) - RUN + 1)}
    starts = [i for i in range(len(a) - RUN + 1) if tuple(a[i : i + RUN]) in runs]
    return len({line for start in starts for line in range(start, start + RUN)})


def scripts() -> list[Path]:
    return sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_a_script_imports_public_names_only(path: Path) -> None:
    inside = INSIDE.get(path.relative_to(ROOT).as_posix(), set())

    assert imported(path.read_text()) - PUBLIC == inside


@pytest.mark.parametrize("pair", [*combinations(TASKS, 2)], ids="~".join)
def test_two_task_scripts_share_no_code_that_could_be_common(pair: tuple[str, str]) -> None:
    first, second = ((ROOT / "examples" / f"{name}.py").read_text() for name in pair)

    assert shared(first, second) <= ALLOWED
    assert shared(second, first) <= ALLOWED


def test_shared_lines_are_counted_whatever_stands_between_them() -> None:
    lines = [f"x{i} = {i}" for i in range(7)]
    spread = "\n\n# a comment\nimport os\n".join(lines)

    assert shared("\n".join(lines), spread) == 7
    assert shared("\n".join(lines), "\n".join(lines[:5])) == 0
    assert shared("\n".join([*lines, "y = 1", *lines[:6]]), spread) == 13


def test_an_import_from_inside_the_package_is_seen() -> None:
    source = "def f():\n    from sfa_peft.dense.losses import SILogLoss\nimport sfa_peft.config"

    assert imported(source) == {"sfa_peft.dense.losses", "sfa_peft.config"}
