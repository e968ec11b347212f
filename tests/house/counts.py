# SPDX-License-Identifier: Apache-2.0
"""What is counted in the house: sizes, imports, repetitions, and what pages say of files."""

import ast
import importlib
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import grimp
import networkx

#: So many equal lines in a row count as written twice.
RUN = 4
#: Folders of tests that do not stand for one of the package.
SUITES = {"behaviour", "benchmarks", "conformance", "e2e", "examples", "house", "pretended", "docs"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)
_PATH = re.compile(r"`((?:[\w-]+/)+[\w-]+\.py)`")
_MODULE = re.compile(r"`(sfa_peft(?:\.\w+)+)`")


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text("utf-8"))


def num_lines(path: Path) -> int:
    """Lines of a file, all of them."""
    return len(path.read_text("utf-8").splitlines())


def function_lengths(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of each function, docstring included, and its name."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, _FUNCTIONS):
            yield (node.end_lineno or 0) - node.lineno + 1, node.name


def circles(package: str) -> list[str]:
    """Groups of modules that import each other, also by imports under TYPE_CHECKING."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    edges = [(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)]
    groups = networkx.strongly_connected_components(networkx.DiGraph(edges))
    return sorted(" <-> ".join(sorted(group)) for group in groups if len(group) > 1)


def not_alone(root: Path, package: str, needed: Iterable[str] = ()) -> list[str]:
    """Modules that cannot be the first one of the package to be imported, with the error.

    The outermost `__init__` is left out: it would import the others in an order that works. Each
    module has a process of its own, forked when `needed`, slow packages from elsewhere, are there.
    """
    for name in needed:
        importlib.import_module(name)
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((root / package).rglob("*.py"))
    ]
    errors = {name: _import_in_child(root, package, name) for name in names if name != package}
    return [f"{name}: {error}" for name, error in errors.items() if error]


def _import_in_child(root: Path, package: str, name: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        bare = types.ModuleType(package)
        bare.__path__ = [str(root / package)]
        sys.modules[package] = bare
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever it is, the parent tells
            os.write(write, f"{type(error).__name__}: {error}".encode()[:2000])
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as pipe:
        message = " ".join(pipe.read().split())
    status = os.waitpid(child, 0)[1]
    return message or (f"ended with status {status}" if status else "")


def code_lines(path: Path) -> list[str]:
    """Lines of a file without indentation; imports, docstrings, comments, empty ones left out."""
    tree = parsed(path)
    left: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left.append(node)
        elif isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            left.append(node.body[0])
    gone = {n for node in left for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(path.read_text("utf-8").splitlines(), start=1)
    stripped = (line.strip() for n, line in lines if n not in gone)
    return [line for line in stripped if line and not line.startswith("#")]


def repeated(one: list[str], other: list[str], run: int = RUN) -> int:
    """Lines of one file that stand in runs of at least `run` lines in the other as well."""
    there = {tuple(other[i : i + run]) for i in range(len(other) - run + 1)}
    starts = [i for i in range(len(one) - run + 1) if tuple(one[i : i + run]) in there]
    return len({line for i in starts for line in range(i, i + run)})


def deep_imports(path: Path, package: str, public: Iterable[str]) -> list[str]:
    """Imports of a package's modules other than its public ones."""
    found: list[str] = []
    for node in ast.walk(parsed(path)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [name for name in names if name.split(".")[0] == package and name not in public]
    return found


def private_imports(path: Path, packages: Iterable[str]) -> list[str]:
    """Imports out of packages that name something private, such as `a._b` or `a.b._c`."""
    found: list[str] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [n for n in names if n.split(".")[0] in packages and "._" in n]
    return found


def without_source(tests: Path, package: Path) -> list[str]:
    """Files of tests that should mirror one of the package, or a folder, and mirror none."""
    paths = (path.relative_to(tests) for path in sorted(tests.rglob("test_*.py")))
    mirrors = [path for path in paths if path.parts[0] not in SUITES]
    wanted = {path: package / path.parent / path.name.removeprefix("test_") for path in mirrors}
    return [
        str(path)
        for path, file in wanted.items()
        if not (file.exists() or file.with_suffix("").is_dir())
    ]


def absent_files(page: Path, roots: Iterable[Path]) -> list[str]:
    """Paths and modules that a page names in backquotes and that are below none of the roots."""
    text = page.read_text("utf-8")
    paths = [path for path in _PATH.findall(text) if not any((r / path).exists() for r in roots)]
    return paths + [name for name in _MODULE.findall(text) if not _is_there(name, roots)]


def _is_there(name: str, roots: Iterable[Path]) -> bool:
    """Whether a dotted name is a module, or something that the module before its dot mentions."""
    *parents, last = name.split(".")
    for root in roots:
        folder = root.joinpath(*parents)
        if (folder / f"{last}.py").exists() or (folder / last).is_dir():
            return True
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if file.exists() and re.search(rf"\b{last}\b", file.read_text("utf-8")):
            return True
    return False


def misdrawn(page: Path, package: Path, files: Iterable[Path]) -> list[str]:
    """Files that the drawing of the floors lacks, and names in it that are no file.

    A line of the drawing is `folder | files without ending | what they do`; "-" stands for the
    package's own folder. An `__init__` need not be drawn.
    """
    rows = [
        line.split("|") for line in page.read_text("utf-8").splitlines() if line.count("|") == 2
    ]
    drawn = {
        Path("" if folder.strip() == "-" else folder.strip(), name).as_posix()
        for folder, names, _ in rows[2:]
        for name in names.split()
    }
    there = {path.relative_to(package).with_suffix("").as_posix() for path in files}
    there = {name for name in there if not name.endswith("__init__")}
    return [f"{n}: not drawn" for n in sorted(there - drawn)] + [
        f"{n}: drawn, but no file" for n in sorted(drawn - there)
    ]
