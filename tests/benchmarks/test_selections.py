# SPDX-License-Identifier: Apache-2.0
"""Positions that benchmarks draw lie like those that were measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.sparse.pool import Pool
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import upernet

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("selections")


def make_pool(budget: float = 0.05, embed_dim: int = 16) -> Pool:
    config = SFAConfig(budget=budget, rho=0, modules_to_save=["decode_head"])
    return find_pool(get_peft_model(upernet(embed_dim=embed_dim), config), "default")


def test_a_spread_holds_what_each_band_of_rows_holds(selections: ModuleType) -> None:
    counts = torch.tensor([0, 3, 0, 1, 4, 0, 0, 0] * 16)  # 16 rows each with 4, 3 and 1
    used, bands = selections.spread_of(counts)

    assert used == 3 / 8
    # 48 rows hold 128 entries; an eighth of those rows is 6, the fullest hold 4.
    assert sum(bands[:4]) == pytest.approx(6 * 4 / 128)
    assert sum(bands) == pytest.approx(1)


@pytest.mark.parametrize("budget", [0.05, 0.2])
def test_drawn_positions_are_spread_as_measured_and_touch_fewer_lines_than_uniform_ones(
    selections: ModuleType, budget: float
) -> None:
    pool = make_pool(budget, embed_dim=32)
    measured = selections.load(budget, 0.0)

    positions = selections.draw(pool, pool.size, measured)

    assert len(positions.unique()) == pool.size
    assert 0 <= int(positions.min()) <= int(positions.max()) < pool.starts[-1]
    weight = pool.weights[-2].tensor
    inside = positions[(positions >= pool.starts[-3]) & (positions < pool.starts[-2])]
    rows = (inside - pool.starts[-3]) // weight.shape[1]
    like = selections._nearest(selections.places_of(pool.names)[-2], measured)
    assert len(rows.unique()) <= round(like.rows.used * weight.shape[0])
    selections.fill(pool, [0, pool.size // 2, pool.size], measured=None)
    uniform = selections.lines_touched(pool.slots.long(), pool.starts[-1])
    assert selections.lines_touched(positions, pool.starts[-1]) < uniform


def test_picks_are_sorted_within_themselves(selections: ModuleType) -> None:
    pool = make_pool()
    half = pool.size // 2

    selections.fill(pool, [0, half, pool.size], measured=selections.load(0.05, 0.0))

    for part in (pool.slots[:half], pool.slots[half:]):
        assert bool((part[1:] > part[:-1]).all())
    assert pool.num_assigned == len(pool.slots.unique()) == pool.size


def test_the_script_measures_what_it_trained(
    selections: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = importlib.import_module("trained_selections")
    output = tmp_path / "found.json"
    monkeypatch.setattr(script, "CASES", ((0.2, 0.0),))
    options = ["--steps", "12", "--batch_size", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["trained_selections.py", *options])

    script.main()

    (case,) = json.loads(output.read_text())["cases"]
    known = json.loads(selections.FILE.read_text())["cases"][0]["tensors"]
    assert [t["place"] for t in case["tensors"]] == [t["place"] for t in known]
    assert any(t["density"] for t in case["tensors"])
