# SPDX-License-Identifier: Apache-2.0
"""Every count finds what was put there to be found, so a zero means something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import counts
from tests.house.__main__ import Number, largest, none_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in which `b` and `c` import each other, and `d` needs what is not there."""
    files = {
        "__init__.py": "from . import c\n",
        "a.py": "from . import b\n",
        "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import X\n",
        "c.py": "from .b import TYPE_CHECKING\nX = 1\n",
        "inner/__init__.py": "from .e import Y\n",
        "inner/d.py": "from .e import missing\n",
        "inner/e.py": "Y = 2\n",
    }
    for name, text in files.items():
        path = tmp_path / "small_house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "small_house"


def test_a_circle_of_which_one_half_is_for_type_checkers_is_found(package):
    assert counts.circles("small_house") == ["small_house.b <-> small_house.c"]


def not_alone(package: Path) -> list[str]:
    """What `counts.not_alone` finds, in a process without pytest's threads, because it forks."""
    code = (
        "import json, pathlib, sys; from tests.house.counts import not_alone;"
        "print(json.dumps(not_alone(pathlib.Path(sys.argv[1]), sys.argv[2], ['json'])))"
    )
    command = [sys.executable, "-c", code, str(package.parent), package.name]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(found.stdout)


def test_a_module_that_needs_what_is_not_there_is_named_with_its_error(package):
    (line,) = not_alone(package)
    assert line.startswith("small_house.inner.d: ImportError: cannot import name 'missing'")


def test_a_module_that_only_works_after_another_is_found(package):
    (package / "__init__.py").write_text("from . import second, first\n")
    (package / "first.py").write_text("from .second import B\nA = 1\n")
    (package / "second.py").write_text("B = 2\nfrom .first import A\n")
    (package / "inner" / "d.py").write_text("import os\nos._exit(3)\n")
    first, dead = sorted(not_alone(package))
    assert first.startswith("small_house.first: ImportError")
    assert dead.startswith("small_house.inner.d: ended with status")


def test_a_function_counts_from_its_def_to_its_end_with_its_docstring(tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        'class A:\n    @staticmethod\n    def f():\n        """One.\n\n        Two."""\n'
    )
    assert list(counts.function_lengths(file)) == [(4, "f")]
    assert counts.num_lines(file) == 6


def test_what_two_files_share_is_counted_wherever_it_stands(tmp_path):
    shared = ["a = 1", "b = 2", "c = 3", "d = 4"]
    one = ["x = 0", *shared, "y = 0", "e = 5", "f = 6", "g = 7"]
    other = ["e = 5", "f = 6", "g = 7", *shared]
    assert counts.repeated(one, other) == 4
    assert counts.repeated(one, other, run=3) == 7
    assert counts.repeated(one, one) == len(one)
    assert counts.repeated(one[:3], one[:3]) == 0


def test_imports_docstrings_and_comments_are_no_code(tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        '"""Doc."""\nfrom a import (\n    b,\n)\n\n# why\ndef f():\n    """D."""\n    b()\n'
    )
    assert counts.code_lines(file) == ["def f():", "b()"]


def test_imports_below_the_public_names_are_found(tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        "import p.q\nimport p, os\nfrom p.r import s\nfrom p.open import t\nfrom pq import u\n"
    )
    assert counts.deep_imports(file, "p", ("p", "p.open")) == ["p.q", "p.r"]


def test_private_names_of_others_are_found(tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        "import p._a, p.b\nfrom p.c import d, _e\nfrom p._f import g\nfrom ._h import i\n"
        "from q._j import k\n"
    )
    assert counts.private_imports(file, ("p",)) == ["p._a", "p.c._e", "p._f.g"]


def test_a_test_without_its_file_is_found(tmp_path):
    for name in ("src/sparse/pool.py", "src/top.py", "src/dense/scenes/render.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = ("sparse/test_pool.py", "test_top.py", "dense/test_scenes.py", "behaviour/test_x.py")
    for name in (*names, "sparse/test_gone.py", "gone/test_pool.py", "test_gone.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    found = counts.without_source(tmp_path / "tests", tmp_path / "src")
    assert found == ["gone/test_pool.py", "sparse/test_gone.py", "test_gone.py"]


def test_a_page_that_names_a_file_or_module_that_is_not_there_is_found(package):
    page = package.parent / "page.md"
    page.write_text(
        "`inner/e.py`, `small_house/b.py`, `inner/f.py`; a bare `f.py` may be of another project\n"
        "`sfa_peft.files.values`, `sfa_peft.tasks.TaskBank`, `sfa_peft.nowhere`, `sfa_peft.SFAGone`"
    )
    found = counts.absent_files(page, [package, package.parent, ROOT / "src"])
    assert found == ["inner/f.py", "sfa_peft.nowhere", "sfa_peft.SFAGone"]


def test_the_drawing_must_have_every_file_and_no_other(package):
    page = package.parent / "page.md"
    page.write_text(
        "# A\n\n```text\nfolder | files | does\n-- | -- | --\n"
        "- | a b | x\ninner | d gone | x\n```\n\n| no | floor |\n"
    )
    files = sorted(package.rglob("*.py"))
    assert counts.misdrawn(page, package, files) == [
        "c: not drawn",
        "inner/e: not drawn",
        "inner/gone: drawn, but no file",
    ]


def test_a_bar_is_missed_on_its_wrong_side_and_by_what_was_not_measured():
    assert Number("n", 3, 3).kept
    assert not Number("n", 4, 3).kept
    assert Number("n", 3, 3, at_least=True).kept
    assert not Number("n", 2.9, 3, at_least=True).kept
    assert not Number("n", None, 0, at_least=True).kept
    assert Number("n", 4, 3).row() == ["n", "4", "<= 3", "", "WORSE"]
    assert Number("n", 4, 3, reached=4).row() == ["n", "4", "<= 3", "<= 4", "missed"]
    assert Number("n", 4, 3, reached=4).allowed
    assert not Number("n", 4, 3, reached=4).kept
    assert not Number("n", 5, 3, reached=4).allowed
    assert not none_of("n", ["x"]).kept
    assert largest("n", [(1, "a"), (5, "b"), (4, "c")], 3).where == ("5 lines: b", "4 lines: c")
