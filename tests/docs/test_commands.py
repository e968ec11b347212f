# SPDX-License-Identifier: Apache-2.0
"""Commands that readers see exist, with the options that they are given."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from sfa_peft.cli.commands import COMMANDS
from sfa_peft.cli.parser import Parser
from tests.docs.blocks import PAGES, ROOT, blocks_of, name_of

WITH_BASH = [page for page in PAGES if blocks_of(page, "bash")]
STARTERS = {"python", "torchrun", "accelerate"}
NOT_OURS = {"pip", "git", "cd", "for", "done", "do", "recipes=examples/recipes", "pytest"}


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each simple command; assignments before it are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"\s(?:&&|\|)\s", line)]
    found = []
    for part in parts:
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found


def options_of(script: Path) -> set[str]:
    """Return the options that a script takes."""
    text = script.read_text(encoding="utf-8")
    names = set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", text))
    if script.name == "compare_methods.py":  # hands on what it does not know
        return names | options_of(script.with_name("semantic_segmentation.py"))
    if "Arguments):" in text or "Options, " in text:
        names |= {f.name for f in fields(importlib.import_module(script.stem).Arguments)}
    for setup in re.findall(r"from (\w+_setup) import", text):
        names |= options_of(script.with_name(f"{setup}.py"))
    return names


def problem_of(words: list[str]) -> str | None:
    """Return what is wrong with a command."""
    first, *rest = words
    options = {w.split("=")[0][2:] for w in rest if re.match(r"--[a-z]", w)}
    if first == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        return None if re.search(rf"^{rest[0]}:", targets, re.MULTILINE) else "no such target"
    if first == "sfa-peft":
        command = COMMANDS.get(rest[0])
        if command is None:
            return "no such command"
        known = {o[2:] for a in Parser(rest[0], command)._actions for o in a.option_strings}
        return None if command.passes or options <= known else f"unknown {options - known}"
    scripts = [w for w in rest if w.endswith(".py") and "/" in w]
    if first in STARTERS and scripts:
        script = ROOT / scripts[0]
        if not script.is_file():
            return "no such script"
        given = rest[rest.index(scripts[0]) + 1 :]
        options = {w.split("=")[0][2:] for w in given if re.match(r"--[a-z]", w)}
        unknown = options - options_of(script)
        return f"unknown {unknown}" if unknown else None
    if first == "pytest":
        return next((f"no {w}" for w in rest if "/" in w and not (ROOT / w).exists()), None)
    return None if first in NOT_OURS | STARTERS else "not known to this test"


@pytest.mark.parametrize("page", WITH_BASH, ids=name_of)
def test_commands_on_a_page_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    wrong = [
        f"{name_of(page)}:{block.line}: {' '.join(words)}: {problem}"
        for block in blocks_of(page, "bash")
        for words in commands_of(block.text)
        if (problem := problem_of(words))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make tea", "no such target"),
        ("sfa-peft inspekt out", "no such command"),
        ("sfa-peft inspect out --jsn", "unknown {'jsn'}"),
        ("A=1 python examples/predict.py out/task --sise 3", "unknown {'sise'}"),
        ("python examples/segmentation.py", "no such script"),
        ("python examples/semantic_segmentation.py --budgets 3", "unknown {'budgets'}"),
        ("pytest tests/test_nothing.py", "no tests/test_nothing.py"),
        ("nonsense", "not known to this test"),
    ],
)
def test_a_command_that_is_wrong_is_found(
    command: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (words,) = commands_of(command)
    assert problem_of(words) == problem
