# SPDX-License-Identifier: Apache-2.0
"""Read pytest's JUnit reports and print them side by side."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("passed", "failed", "skipped", "xfailed")


@dataclass
class Outcomes:
    """What one method did in one suite: counts, failures, and the reasons of what did not run."""

    counts: Counter = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)
    """(kind, reason) -> number of cases; kind is "skipped" or "xfailed"."""

    @property
    def good(self) -> bool:
        """Something ran and nothing failed."""
        return self.counts["passed"] > 0 and not self.failures

    def add(self, case: ElementTree.Element) -> None:
        """Count one `<testcase>`."""
        name = case.get("name", "?")
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        left = case.find("skipped")
        if bad is not None:
            self.counts["failed"] += 1
            self.failures.append((name, first_line(bad.get("message"))))
        elif left is not None:
            kind = "xfailed" if left.get("type") == "pytest.xfail" else "skipped"
            self.counts[kind] += 1
            self.reasons[kind, first_line(left.get("message"))] += 1
        else:
            self.counts["passed"] += 1


def first_line(message: str | None) -> str:
    """The first line, without the folder of the local models: it differs from run to run."""
    lines = (message or "").strip().splitlines() or ["no message"]
    return re.sub(r"/\S*/conformance-models-[^/\s]*/", "", lines[0])[:200]


def read_report(path: Path) -> Outcomes:
    """Outcomes in a JUnit file; a report that is missing or cut off is one failure."""
    found = Outcomes()
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        found.counts["failed"] = 1
        found.failures.append((path.name, f"pytest wrote no report that can be read: {error}"))
        return found
    for case in tree.iter("testcase"):
        found.add(case)
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table whose columns line up; the first column is left-aligned."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first, *rest])} |")
    return "\n".join(lines)


def side_by_side(suites: Mapping[str, Mapping[str, Outcomes]]) -> str:
    """Suites as rows, the four counts of each method as columns: `suites[suite][method]`."""
    methods = list(dict.fromkeys(method for row in suites.values() for method in row))
    head = ["suite", *(f"{method} {column}" for method in methods for column in COLUMNS)]
    rows = [
        [suite, *(_cell(row.get(method), column) for method in methods for column in COLUMNS)]
        for suite, row in suites.items()
    ]
    return table(head, rows)


def _cell(found: Outcomes | None, column: str) -> object:
    return "-" if found is None else found.counts[column]


def reasons(suites: Mapping[str, Mapping[str, Outcomes]], method: str) -> str:
    """Every reason for which a case of the method was skipped or failed as expected."""
    rows = [
        [suite, kind, count, reason]
        for suite, row in suites.items()
        if method in row
        for (kind, reason), count in sorted(row[method].reasons.items())
    ]
    return "\n".join(f"{suite}: {count} {kind}: {reason}" for suite, kind, count, reason in rows)
