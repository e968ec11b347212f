# SPDX-License-Identifier: Apache-2.0
"""Build and register the pretended device; without a compiler its tests are skipped, and say so."""

import pytest

from tests.pretended.device import Device, build, compiler

DEVICE = Device(build()) if compiler() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE is None:
        skip = pytest.mark.skip(reason="no C++ compiler, which builds the pretended device")
        for item in items:
            item.add_marker(skip)


@pytest.fixture
def device() -> Device:
    return DEVICE
