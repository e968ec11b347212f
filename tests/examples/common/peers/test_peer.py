# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from sfa_peft import BudgetError
from tests.examples.common.peers.kit import found, peer, tiny_swinv2, tiny_vit
from tests.tiny import upernet

SIZED = ("vpt", "adaptformer", "adapter_plus", "mona")


@pytest.fixture
def module() -> ModuleType:
    return importlib.import_module("common.peers.peer")


def test_blocks_are_found_with_their_channels(module: ModuleType) -> None:
    swin, vit = tiny_swinv2(), tiny_vit()
    blocks = module.find_blocks(found(swin))
    assert [b.module for b in blocks] == [b for s in swin.encoder.layers for b in s.blocks]
    assert [b.features for b in blocks] == [16, 16, 32, 64, 64, 128]
    assert [b.features for b in module.find_blocks(found(vit))] == [24] * 3
    assert [b.features for b in module.find_blocks(found(upernet()))] == [16, 32, 64, 64, 128]


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("name", SIZED)
def test_the_largest_size_within_the_budget_is_taken(
    name: str, budget: float, module: ModuleType
) -> None:
    backbone = found(upernet())
    total = sum(p.numel() for p in backbone.module.parameters())
    size = module.size_of(peer(name), backbone, budget)
    most = {"vpt": 2**16}.get(name, 128)
    counted = peer(name).parameters(backbone, size)
    too_much = peer(name).parameters(backbone, size + 1) > budget * total
    peer(name).add(backbone, size)

    trained = [p.numel() for p in backbone.module.parameters() if p.requires_grad]
    assert sum(trained) == counted <= budget * total
    assert too_much or size == most


def test_a_size_that_is_asked_for_holds_within_the_budget(module: ModuleType) -> None:
    backbone = found(upernet())
    assert module.size_of(peer("mona"), backbone, 0.2, asked=5) == 5
    with pytest.raises(BudgetError, match=r"--adapter_dim 0: --budget 0.2 allows Adapter\+ 1 to"):
        module.size_of(peer("adapter_plus"), backbone, 0.2, asked=0)
    assert module.size_of(peer("ssf"), backbone, 1e-6) == 1  # has one size


@pytest.mark.parametrize("name", SIZED)
def test_the_smallest_budget_that_an_error_names_works(name: str, module: ModuleType) -> None:
    backbone = found(upernet())
    with pytest.raises(BudgetError, match=r"smallest budget that works is [\d.e-]+") as caught:
        module.size_of(peer(name), backbone, 1e-5)
    budget = float(str(caught.value).split("that works is ")[1])
    assert module.size_of(peer(name), backbone, budget) == 1
