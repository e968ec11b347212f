# SPDX-License-Identifier: Apache-2.0
"""One life of an adapter, for tests of many models: wrap, train with picks, save, reload."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sfa_peft import SFAConfig, SFASelector, budget_report
from sfa_peft.backbones import find_backbone
from sfa_peft.tuner import SFALayer
from sfa_peft.tuner.adapted_layers import find_pool

STEPS = 3
BUDGET = 0.25


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return all floating-point outputs; masks and noise drawn in the forward are the same."""
    torch.manual_seed(7)
    return list(_tensors(model(**batch)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


@torch.no_grad()
def evaluate(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    return [t.clone() for t in outputs(model.eval(), batch)]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():  # some parts start at zero, where no gradient would pass
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def adapters(model: nn.Module) -> list[SFALayer]:
    found = [m for m in model.modules() if isinstance(m, SFALayer)]
    return [layer for layer in found if "default" in layer.sfa_up]


def train(model: nn.Module, batch: dict[str, Tensor]) -> SFASelector:
    selector = SFASelector(model, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # a head that is not saved must not drift either
    for _ in range(STEPS):
        sum(t.nan_to_num().square().mean() for t in outputs(model, batch)).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return selector


def live_through(
    build: Callable[[], nn.Module],
    batch: dict[str, Tensor],
    folder: Any,
    **options: Any,
) -> None:
    """Wrap, train with picks, save and reload a model; what must hold is asserted on the way.

    Args:
        build: Constructor of the model.
        batch: What it is called with.
        folder: Empty folder for the adapter.
        options: Of the config, such as `target_modules` for a model without a known backbone.
    """
    base = fresh(build)
    base.requires_grad_(False)  # PyTorch multiplies in another order where a gradient is wanted
    before = evaluate(base, batch)
    frozen = {n: p.detach().clone() for n, p in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head stays frozen, which is reported
        model = get_peft_model(base, SFAConfig(budget=BUDGET, selection_steps=1, **options))
    assert_same_bits(evaluate(model, batch), before)

    report = budget_report(model)
    plain = fresh(build)
    backbone = find_backbone(plain)
    counted = [p for n, p in plain.named_parameters() if backbone is None or backbone.holds(n)]
    assert report.backbone == sum(p.numel() for p in counted)
    assert report.external + report.internal <= BUDGET * report.backbone
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == report.external + report.internal

    selector = train(model, batch)
    pool = find_pool(model, "default")
    assert selector.selected == pool.values.numel() == report.internal > 0
    expected = evaluate(model, batch)
    changed = [int((pool.weights[i].tensor != frozen[n]).sum()) for i, n in enumerate(pool.names)]
    assert 0 < sum(changed) <= report.internal
    assert any(layer.sfa_up["default"].weight.any() for layer in adapters(model))
    assert not all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    with model.disable_adapter():
        assert_same_bits(evaluate(model, batch), before)
    model.save_pretrained(folder)
    assert_same_bits(evaluate(PeftModel.from_pretrained(fresh(build), folder), batch), expected)
