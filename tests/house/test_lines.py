# SPDX-License-Identifier: Apache-2.0
"""Lines that note themselves are those that coverage's trace function sees."""

import importlib.util
import sys

import coverage
import pytest
import torch

from tests.house import lines

SOURCE = '''"""A module of one's own."""

from __future__ import annotations

import enum
from typing import (
    NamedTuple,
)


class Kind(enum.Enum):
    """Two of them."""

    ONE = 1
    TWO = 2


class Pair(NamedTuple):
    a: int
    b: int = 0


def same(function):
    return function


@same
@same
def decorated(a, b=(
    1,
)):
    """Add."""
    return a + (
        len(b)
    )


def never():
    raise NotImplementedError


def branches(x):
    if x > 10:
        return "large"
    elif x > 5:
        return "middle"
    elif x > 3: return "small"
    else:
        pass
    total = 0
    for i in range(x):
        if i == 1:
            continue
        total += i
    else:
        total += 1
    while total > 100:
        total -= 1
    return total


def errors(kind):
    global LAST
    LAST = kind
    try:
        with open(kind) if kind == "file" else same.__class__ and Suppressed() as found:
            if kind == "value":
                raise ValueError(kind)
            if kind == "key":
                raise KeyError(kind)
    except ValueError:
        return "value"
    except (
        KeyError
    ) as error:
        return str(error)
    else:
        return "none"
    finally:
        LAST = None


class Suppressed:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def matched(x):
    match x:
        case 0:
            return "zero"
        case [a, *_] if a:
            return "list"
        case _:
            return "other"


def generated(n):
    def inner(i):
        nonlocal n
        n += 1
        return i

    yield from (inner(i) for i in range(n))
    ...
    assert n, (
        "none"
    )


DOUBLE = lambda x: 2 * x

decorated(1), branches(6), branches(2), errors("key"), matched([1]), list(generated(2))
if DOUBLE(3) != 6:
    never()
'''


def missing(data_file) -> list[int]:
    """Lines of the source that did not run, by coverage's own account."""
    found = coverage.Coverage(data_file=str(data_file), config_file=False)
    found.load()
    (path,) = found.get_data().measured_files()
    return found.analysis2(path)[3]


def run(path, loader) -> None:
    spec = importlib.util.spec_from_loader("of_its_own", loader("of_its_own", str(path)))
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_ran", {})
    monkeypatch.delenv(lines.FOLDER, raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "of_its_own.py"
    path.write_text(SOURCE)
    return path


def test_noted_lines_are_those_that_coverage_traces(module, tmp_path):
    tracing = coverage.Coverage(
        data_file=str(tmp_path / "traced"), include=[str(module)], config_file=False
    )
    with tracing.collect():
        run(module, lines.SourceFileLoader)
    tracing.save()
    run(module, lines.Loader)
    lines.save(lines._ran, tmp_path / "noted")
    assert missing(tmp_path / "noted") == missing(tmp_path / "traced") != []


def test_what_runs_uncounted_does_not_count_and_what_ran_before_does(module):
    with lines.uncounted():
        run(module, lines.Loader)
    assert set().union(*lines._ran.values()) == set()
    run(module, lines.Loader)
    before = {path: set(ran) for path, ran in lines._ran.items()}
    with lines.uncounted():
        run(module, lines.Loader)
    assert lines._ran == before != {str(module): set()}


def test_a_compiled_function_is_one_graph_as_without_notes(module):
    module.write_text("def f(x):\n    y = x + 1\n    return y * 2\n")
    spec = importlib.util.spec_from_loader("of_its_own", lines.Loader("of_its_own", str(module)))
    noted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noted)
    graphs = []

    def count(graph, _inputs):
        graphs.append([node.op for node in graph.graph.nodes])
        return graph.forward

    out = torch.compile(noted.f, backend=count, fullgraph=True)(torch.ones(2))
    assert out.tolist() == [4, 4]
    assert graphs == [["placeholder", "call_function", "call_function", "output"]]
    assert lines._ran == {str(module): {1}}


def test_what_one_process_compiled_notes_the_same_in_another(module, tmp_path, monkeypatch):
    monkeypatch.setenv(lines.FOLDER, str(tmp_path / "folder"))
    run(module, lines.Loader)
    first = {path: set(ran) for path, ran in lines._ran.items()}
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["of_its_own.code"]
    monkeypatch.setattr(lines, "_ran", {})
    monkeypatch.setattr(lines, "noted", None)
    run(module, lines.Loader)
    assert lines._ran == first


def test_a_module_of_the_package_runs_as_a_program_too(module):
    module.write_text("print(1)\n")
    code = lines.Loader("of_its_own", str(module)).get_code("of_its_own")
    exec(code, {"__name__": "__main__"})  # as runpy does, which makes no module
    assert lines._ran == {str(module): {1}}


def test_notes_begin_before_the_package_is_imported_or_not_at_all(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delenv(lines.FOLDER, raising=False)
    lines.begin()
    assert sys.meta_path == []
    monkeypatch.setenv(lines.FOLDER, "anywhere")
    monkeypatch.setitem(sys.modules, lines.PACKAGE, sys)
    with pytest.raises(RuntimeError, match="was imported before"):
        lines.begin()
    monkeypatch.delitem(sys.modules, lines.PACKAGE)
    lines.begin()
    lines.begin()
    assert len(sys.meta_path) == 1
