# SPDX-License-Identifier: Apache-2.0
"""Make every test process small, offline and repeatable, before transformers is imported."""

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the Hub fails at once, here as in CI
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

from tests.house import lines

lines.begin()
HERE = Path(__file__).resolve().parent
# Several workers share few cores; threads that wait by spinning make a step many times slower.
torch.set_num_threads(1)

# No deadline: on a shared machine the time of one example says nothing about the code.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    # These train whole models, in which most lines run: that does not count as a test of them.
    trains = any(
        item.path.is_relative_to(HERE / name) for name in ("benchmarks", "docs", "examples")
    )
    with lines.uncounted() if trains else nullcontext():
        return (yield)


def pytest_collection_finish() -> None:
    # A Trainer collects garbage at its end, and looks through all that torch and PEFT have made.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    lines.write()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
