# SPDX-License-Identifier: Apache-2.0
"""Print every number that the house must keep, with its bar.

The exit status is 1 if one is worse than its bar, or than what was reached where the bar is not.

python -m tests.house
"""

import importlib.util
import io
import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import coverage

from tests.conformance.outcomes import table

from . import counts

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "sfa_peft"
HOUSE = ROOT / "docs" / "concepts" / "house.md"
PUBLIC = ("sfa_peft", "sfa_peft.tasks", "sfa_peft.dense", "sfa_peft.training.lightning")
#: What benchmarks have to reach that measure the insides of files and pools.
INSIDE = {
    "benchmarks/file_size.py": ("sfa_peft.files.container", "sfa_peft.files.values"),
    "benchmarks/switching_cases.py": ("sfa_peft.tuner.adapted_layers",),
    "benchmarks/trained_selections.py": ("sfa_peft.sparse.pool", "sfa_peft.tuner.adapted_layers"),
    "benchmarks/trained_size.py": (
        "sfa_peft.files.container",
        "sfa_peft.files.packing",
        "sfa_peft.sparse.pool",
        "sfa_peft.tuner.adapted_layers",
    ),
}
#: The scripts that tell one story for four tasks.
SCRIPTS = (
    "depth_estimation",
    "instance_segmentation",
    "object_detection",
    "semantic_segmentation",
)
#: What needs a package that only the environment of `make test-torchvision` has: not counted as
#: lines that tests run where it is not installed.
NEEDS = {
    "dense/heads/cascade.py": "torchvision",
    "dense/heads/rcnn.py": "torchvision",
    "dense/heads/torchvision_parts.py": "torchvision",
    "dense/inference_boxes.py": "torchvision",
    "training/lightning.py": "lightning",
}
#: Slow to import, and not ours.
NEEDED = ("torch", "numpy", "peft", "safetensors.torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Number:
    """One number of the house.

    Attributes:
        name: What is counted.
        value: The count; None if it was not measured.
        bar: What it may be at most, or must be at least.
        where: What makes it so, printed when the bar is missed.
        at_least: The bar is a floor and not a ceiling.
        reached: What was reached where the bar is not: no change may be worse.
    """

    name: str
    value: float | None
    bar: float
    where: tuple[str, ...] = ()
    at_least: bool = False
    reached: float | None = None

    @property
    def kept(self) -> bool:
        """The bar is kept."""
        return self._is_no_worse_than(self.bar)

    @property
    def allowed(self) -> bool:
        """The bar is kept, or no less is reached than before."""
        return self.kept or (self.reached is not None and self._is_no_worse_than(self.reached))

    def _is_no_worse_than(self, bar: float) -> bool:
        if self.value is None:
            return False
        return self.value >= bar if self.at_least else self.value <= bar

    def row(self) -> list[str]:
        """A row of the table."""
        value = "not measured" if self.value is None else f"{self.value:,}"
        sign = ">=" if self.at_least else "<="
        state = "" if self.kept else "missed" if self.allowed else "WORSE"
        reached = "" if self.reached is None else f"{sign} {self.reached:,}"
        return [self.name, value, f"{sign} {self.bar:,}", reached, state]


def none_of(name: str, found: list[str]) -> Number:
    """A number that must be zero."""
    return Number(name, len(found), 0, tuple(found))


def largest(name: str, lengths: list[tuple[int, str]], most: int) -> Number:
    """The largest of some lengths; those above the bar say where."""
    lengths = sorted(lengths, reverse=True)
    where = tuple(f"{length} lines: {place}" for length, place in lengths if length > most)
    return Number(name, lengths[0][0], most, where)


def sizes(everything: list[Path], core: list[Path]) -> list[Number]:
    """Files and lines."""
    tuner = [path for path in core if path.parent == PACKAGE / "tuner"]
    functions = [
        (length, f"{path.relative_to(ROOT)}, {name}")
        for path in everything
        for length, name in counts.function_lengths(path)
    ]
    files = [(counts.num_lines(path), str(path.relative_to(ROOT))) for path in everything]
    return [
        Number("core: files", len(core), 65, reached=91),
        Number("core: lines", sum(map(counts.num_lines, core)), 10_800, reached=19_350),
        Number("tuner: files beside upstream", len(tuner), 16),
        largest("longest function, lines", functions, 60),
        largest("longest file, lines", files, 450),
    ]


def imports(everything: list[Path]) -> list[Number]:
    """Who imports whom."""
    listed = HOUSE.read_text("utf-8")
    private = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in everything
        for name in counts.private_imports(path, ("peft", "transformers"))
        if name.rpartition(".")[2] not in listed
    ]
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    deep = [
        f"{name}: {module}"
        for name, path in sorted((path.relative_to(ROOT).as_posix(), path) for path in scripts)
        for module in counts.deep_imports(path, "sfa_peft", (*PUBLIC, *INSIDE.get(name, ())))
    ]
    return [
        none_of("import circles", counts.circles("sfa_peft")),
        none_of(
            "modules that cannot be imported alone", counts.not_alone(SOURCE, "sfa_peft", NEEDED)
        ),
        none_of("private names of others not listed in docs/concepts/house.md", private),
        none_of("imports of examples and benchmarks below the public names", deep),
    ]


def repetition() -> Number:
    """Lines that two of the four scripts share."""
    texts = {name: counts.code_lines(ROOT / "examples" / f"{name}.py") for name in SCRIPTS}
    pairs = [(counts.repeated(texts[a], texts[b]), f"{a}, {b}") for a, b in permutations(texts, 2)]
    return largest("lines shared by two scripts of examples", pairs, 20)


def pages(core: list[Path]) -> list[Number]:
    """What tests and pages say of the files."""
    roots = (ROOT, SOURCE, PACKAGE)
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    absent = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in written
        for name in counts.absent_files(page, roots)
    ]
    return [
        none_of("tests that mirror no file", counts.without_source(ROOT / "tests", PACKAGE)),
        none_of("files named in pages that are not there", absent),
        none_of(
            "files that differ from docs/concepts/house.md", counts.misdrawn(HOUSE, PACKAGE, core)
        ),
    ]


def covered() -> list[Number]:
    """Lines of the package that `make coverage` ran, in percent."""
    everything, dense = [f"{PACKAGE}/*"], [f"{PACKAGE}/dense/*"]
    absent = [
        f"{PACKAGE}/{name}"
        for name, package in NEEDS.items()
        if not importlib.util.find_spec(package)
    ]
    core = percent(include=everything, omit=[*dense, *absent])
    beside = percent(include=dense, omit=absent)
    return [
        Number("core: lines run by tests, %", core, 98, at_least=True, reached=97.7),
        Number("dense: lines run by tests, %", beside, 99, at_least=True, reached=98.9),
    ]


def percent(**files: list[str]) -> float | None:
    """Covered lines in percent, rounded down to a tenth; None before the first `make test`."""
    data = coverage.Coverage(
        config_file=str(ROOT / "pyproject.toml"), data_file=str(ROOT / ".coverage")
    )
    try:
        data.load()
        return int(data.report(file=io.StringIO(), **files) * 10) / 10
    except coverage.exceptions.NoDataError:
        return None


def numbers() -> list[Number]:
    """All numbers, those first that take no time."""
    everything = sorted(PACKAGE.rglob("*.py"))
    core = [path for path in everything if PACKAGE / "dense" not in path.parents]
    return [*sizes(everything, core), *imports(everything), repetition(), *pages(core), *covered()]


def main() -> int:
    """Print the table and, below it, where bars are missed."""
    found = numbers()
    print(table(["number", "value", "bar", "reached", ""], [number.row() for number in found]))
    for number in found:
        if not number.kept and number.where:
            print(f"\n{number.name}:", *number.where, sep="\n  ")
    return 0 if all(number.allowed for number in found) else 1


if __name__ == "__main__":
    sys.exit(main())
