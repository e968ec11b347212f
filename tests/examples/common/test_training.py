# SPDX-License-Identifier: Apache-2.0
"""The optimizer of the scripts, and what transformers' courses make of its rates."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import get_scheduler


def test_a_polynomial_course_ends_at_lr_end() -> None:
    training = importlib.import_module("common.training")
    methods = importlib.import_module("common.methods")
    arguments = importlib.import_module("common.arguments")
    head, adapted = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    ready = methods.Prepared(torch.nn.Module(), torch.nn.Module(), [head], [adapted], 0.1, 1, [])
    rates = training.Rates(backbone=2e-3, head=4e-3)
    optimizer = training.make_optimizer(ready, rates, arguments.SharedArguments())
    kwargs = {"power": 1.0, "lr_end": 1e-3}

    scheduler = get_scheduler("polynomial", optimizer, 0, 10, scheduler_specific_kwargs=kwargs)
    seen = []
    for _ in range(11):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()

    assert seen[0] == pytest.approx([4e-3, 2e-3])
    assert seen[5] == pytest.approx([2.5e-3, 1.25e-3])
    assert seen[10] == pytest.approx([1e-3, 0.5e-3])
