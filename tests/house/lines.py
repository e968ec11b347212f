# SPDX-License-Identifier: Apache-2.0
"""Which lines of the package run, noted by the lines themselves.

A trace function, as coverage sets before Python 3.12, makes each line of torch, of PEFT and of the
tests slower too: the suite took half as long again. Here only the package's statements get a note
in front of them, when they are imported. What is written is coverage's data, so that `coverage
combine` and `coverage report` read it.
"""

import ast
import importlib.abc
import importlib.machinery
import marshal
import os
import sys
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path

from coverage import CoverageData

PACKAGE = "sfa_peft"
#: Names the folder that each process leaves its lines in; without it, nothing is noted.
FOLDER = "LINES_FOLDER"
_NOTE, _COMPILING = "_line_runs", "_lines_are_compiled"
_ran: dict[str, set[int]] = {}


def begin() -> None:
    """Note lines of the package from its import on, if the environment asks for it.

    Raises:
        RuntimeError: The package has been imported already.
    """
    if FOLDER not in os.environ or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} was imported before its lines could be noted")
    sys.meta_path.insert(0, _Finder())


def write() -> None:
    """Leave what has run in a file of its own, if the environment asks for it."""
    if FOLDER in os.environ:
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        save(_ran, folder / f".coverage.{uuid.uuid4().hex}")


def save(lines: dict[str, set[int]], file: Path) -> None:
    """Write lines by path as coverage's data."""
    data = CoverageData(basename=str(file))
    data.add_lines(lines)
    data.write()


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs meanwhile, and in processes started meanwhile, does not count."""
    before = {path: set(lines) for path, lines in _ran.items()}
    folder = os.environ.pop(FOLDER, None)
    try:
        yield
    finally:
        if folder is not None:
            os.environ[FOLDER] = folder
        for path, lines in _ran.items():
            lines.intersection_update(before.get(path, ()))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the package where they are, and has them noted."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and fullname == PACKAGE:  # also what is never imported has lines
            for folder in spec.submodule_search_locations or ():
                _ran.update((str(file), set()) for file in Path(folder).rglob("*.py"))
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module whose lines note that they run."""

    def get_code(self, fullname: str) -> types.CodeType:
        """Compile once for all processes of a run, beside their lines and not beside the module."""
        kept = Path(os.environ[FOLDER], f"{fullname}.code") if FOLDER in os.environ else None
        if kept is not None and kept.exists():
            return marshal.loads(kept.read_bytes())
        tree = noted(self.get_data(self.path), self.path)
        code = compile(tree, self.path, "exec", dont_inherit=True)
        if kept is not None:
            partial = kept.with_suffix(f".{uuid.uuid4().hex}")
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(marshal.dumps(code))
            partial.replace(kept)
        return code


def noter(path: str) -> Callable[[int], None]:
    """Return what a line of a file calls when it runs."""
    return _ran.setdefault(path, set()).add


def noted(source: bytes, path: str) -> ast.Module:
    """Parse a module, and put a note in front of each statement."""
    tree = _Noter().visit(ast.parse(source))
    start = f"""
{_NOTE} = __import__({__name__!r}, fromlist=["noter"]).noter({path!r})
{_COMPILING} = __import__("torch").compiler.is_compiling
"""
    first = next((i for i, s in enumerate(tree.body) if not _must_be_first(s)), len(tree.body))
    tree.body[first:first] = ast.parse(start).body
    return ast.fix_missing_locations(tree)


def _must_be_first(statement: ast.stmt) -> bool:
    """It is a docstring, or another constant; or an import from the future."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


class _Noter(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [new for old in statements for new in _with_notes(old)])
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        self.generic_visit(node)
        _note_tried(node.handlers, [handler.lineno for handler in node.handlers])
        return node

    def visit_Match(self, node: ast.Match) -> ast.AST:
        self.generic_visit(node)
        _note_tried(node.cases, [case.pattern.lineno for case in node.cases])
        return node


def _note_tried(branches: Sequence[ast.ExceptHandler | ast.match_case], places: list[int]) -> None:
    """Where a branch is taken, its line has run, and those of the branches before it."""
    for i, branch in enumerate(branches):
        branch.body[:0] = [_note(line, branch.body[0]) for line in places[: i + 1]]


def _with_notes(statement: ast.stmt) -> list[ast.stmt]:
    if isinstance(statement, ast.Expr) and _must_be_first(statement):
        return [statement]  # no constant runs
    decorators = getattr(statement, "decorator_list", [])
    lines = [statement.lineno, *(decorator.lineno for decorator in decorators)]
    notes = [_note(line, statement) for line in lines]
    return [statement, *notes] if _must_be_first(statement) else [*notes, statement]


def _note(line: int, where: ast.stmt) -> ast.stmt:
    """Return the note; torch.compile drops it, for nothing may be done beside the work there."""
    compiling = ast.Call(ast.Name(_COMPILING, ast.Load()), [], [])
    runs = ast.Call(ast.Name(_NOTE, ast.Load()), [ast.Constant(line)], [])
    return ast.copy_location(ast.Expr(ast.BoolOp(ast.Or(), [compiling, runs])), where)
