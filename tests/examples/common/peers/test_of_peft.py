# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from peft import get_peft_model

from sfa_peft import BudgetError, role_modules
from tests.examples.common.peers.kit import found, swinv2
from tests.tiny import upernet


@pytest.fixture
def of_peft() -> ModuleType:
    return importlib.import_module("common.peers.of_peft")


def trained(method: str, budget: float, module: ModuleType) -> tuple[int, int]:
    """Return what a method really trains in a small backbone, and the backbone's parameters."""
    model = upernet()
    total = sum(p.numel() for p in model.backbone.parameters())
    config = module.OF_PEFT[method](found(model), budget, ["decode_head"])
    wrapped = get_peft_model(model, config)
    adapted = [p for n, p in wrapped.named_parameters() if p.requires_grad and "backbone" in n]
    return sum(p.numel() for p in adapted), total


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2, 0.5])
def test_lora_has_the_largest_rank_within_the_budget(budget: float, of_peft: ModuleType) -> None:
    backbone = found(upernet())
    size = sum(p.numel() for p in backbone.module.parameters())
    names = [entry.name.removeprefix("backbone.") for entry in role_modules(backbone)]
    per_rank = sum(sum(backbone.module.get_submodule(name).weight.shape) for name in names)
    rank = of_peft.lora(backbone, budget, ["decode_head"]).r
    assert rank * per_rank <= budget * size < (rank + 1) * per_rank


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2])
def test_shira_trains_r_rows_and_columns_of_each_layer(budget: float, of_peft: ModuleType) -> None:
    backbone = found(upernet())
    config = of_peft.shira(backbone, budget, ["decode_head"])
    count, total = trained("shira", budget, of_peft)
    shapes = {
        entry.name: backbone.module.get_submodule(entry.name.removeprefix("backbone.")).weight.shape
        for entry in role_modules(backbone)
    }
    assert count == sum(config.r * sum(shapes[name]) for name in config.target_modules)
    assert count <= budget * total
    full = [name for name, shape in shapes.items() if config.r * sum(shape) > shape.numel()]
    assert set(config.target_modules) == set(shapes) - set(full)
    assert bool(full) == (budget == 0.2)  # its first layers have fewer weights than that
    fitting = {n: s for n, s in shapes.items() if (config.r + 1) * sum(s) <= s.numel()}
    assert (config.r + 1) * sum(sum(s) for s in fitting.values()) > budget * total


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5])
def test_super_tuning_trains_the_budget_in_equal_shares(budget: float, of_peft: ModuleType) -> None:
    count, total = trained("super_tuning", budget, of_peft)
    assert budget * total - len(role_modules(found(upernet()))) <= count <= budget * total


def test_of_a_paper_size_backbone_none_trains_more_than_its_budget(of_peft: ModuleType) -> None:
    backbone = swinv2("base")
    total = sum(p.numel() for p in backbone.module.parameters())
    assert len(of_peft.shira(backbone, 0.17, []).target_modules) == 24 * 6 - 2 * 4
    for budget in (0.01, 0.05, 0.16):
        config = of_peft.shira(backbone, budget, [])
        assert len(config.target_modules) == 24 * 6
        per_rank = 18 * sum(d * n for d, n in ((128, 2), (256, 2), (512, 18), (1024, 2)))
        assert 0 <= budget * total - config.r * per_rank < per_rank
        share = 1 - of_peft.super_tuning(backbone, budget, []).sparsity
        assert share == pytest.approx(budget * total / 83_755_008, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("lora", 0.001, "LoRA of rank 1 already has"),
        ("shira", 0.001, "SHiRA with r = 1 already has"),
        ("super_tuning", 1.0, "needs at least 0.004 and at most 1 of them"),
        ("super_tuning", 0.001, "needs at least 0.004 and at most 1 of them"),
    ],
)
def test_budgets_that_cannot_be_spent_are_refused(
    method: str, budget: float, message: str, of_peft: ModuleType
) -> None:
    with pytest.raises(BudgetError, match=message):
        of_peft.OF_PEFT[method](found(upernet()), budget, [])


def test_they_start_as_the_pretrained_model(of_peft: ModuleType) -> None:
    batch = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = upernet().eval()(batch).logits
        for method in of_peft.OF_PEFT:
            model = upernet()
            config = of_peft.OF_PEFT[method](found(model), 0.1, ["decode_head"])
            assert torch.equal(get_peft_model(model, config).eval()(batch).logits, before), method
