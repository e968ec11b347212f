# SPDX-License-Identifier: Apache-2.0
"""Put the rows of the method under test where PEFT's tests have theirs.

`pytest.mark.parametrize(..., TEST_CASES)` keeps a reference to the list. Overwriting the list in
place, after PEFT's module is imported and before pytest expands the mark, swaps the rows.
"""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.conformance.spec import METHODS

METHOD = METHODS[os.environ["CONFORMANCE_METHOD"]]


def swap(rows: list, own: list) -> None:
    """Replace PEFT's rows by the method's own; None keeps PEFT's (of which ours are picked)."""
    if own is not None:
        rows[:] = own


def marks(case: type, argument: str) -> Iterator[tuple[list, int]]:
    """Every `parametrize` mark of a test class over `argument`, as (list of marks, position)."""
    for function in vars(case).values():
        found = getattr(function, "pytestmark", [])
        for position, mark in enumerate(found):
            if mark.name == "parametrize" and mark.args[0] == argument:
                yield found, position


def replace_marks(case: type, argument: str, wanted: Callable[[object], bool], rows: list) -> None:
    """Give the marks whose values are `wanted` other values; for tuples, which cannot change."""
    for found, position in marks(case, argument):
        if wanted(found[position].args[1]):
            found[position] = pytest.mark.parametrize(argument, rows).mark


def is_case_of_method(item: pytest.Item) -> bool:
    """Whether the case is one of the method's config class, or of a suite of our own."""
    own = getattr(item.module, "OWN_SUITE", False)  # type: ignore[attr-defined]
    callspec = getattr(item, "callspec", None)
    return own or (
        callspec is not None and any(v is METHOD.config for v in callspec.params.values())
    )
