# SPDX-License-Identifier: Apache-2.0
"""Keep the cases of the method under test, and mark its expected failures."""

import fnmatch

import pytest
import torch

from tests.conformance.suites.rows import METHOD, is_case_of_method

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def base_check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFA's check of the base's values: on, but for the tests that cannot have it."""
    if request.function.__name__ in METHOD.onto_other_weights:
        monkeypatch.setenv("SFA_CHECK_BASE", "0")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not is_case_of_method(item)]
    if others:
        config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if is_case_of_method(item)]
    for expected in METHOD.expected_failures:
        hit = [item for item in items if fnmatch.fnmatchcase(item.name, expected.cases)]
        if hit and expected.is_present():
            for item in hit:
                item.add_marker(pytest.mark.xfail(reason=expected.reason, strict=True))
    for skip in METHOD.not_applicable:
        for item in items:
            if fnmatch.fnmatchcase(item.name, skip.cases):
                item.add_marker(pytest.mark.skip(reason=skip.reason))
