# SPDX-License-Identifier: Apache-2.0
"""Make every test process small, offline and repeatable, before transformers is imported."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the Hub fails at once, here as in CI
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

HERE = Path(__file__).resolve().parent
# Several workers share few cores; threads that wait by spinning make a step many times slower.
torch.set_num_threads(1)

# No deadline: on a shared machine the time of one example says nothing about the code.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=300, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


UNCOUNTED = ("benchmarks", "docs", "examples")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # these train whole models: they may not count, nor be slowed, as coverage
        if any(item.path.is_relative_to(HERE / name) for name in UNCOUNTED):
            item.add_marker(pytest.mark.no_cover)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
