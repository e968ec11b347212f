# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import adapter_layers, find_pool
from tests.reference import DenseReference, assert_same
from tests.tiny import MLP, images, upernet

BETAS, EPS = (0.9, 0.999), 1e-8


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_step_of_an_mlp_equals_the_dense_reference(accumulation, decay):
    base = MLP()
    dense = copy.deepcopy(base).requires_grad_(False)
    config = SFAConfig(
        budget=0.4, rho=0, target_modules=["first", "second"], selection_steps=4, select_until=1
    )
    model = get_peft_model(base, config)
    pool = find_pool(model, "default")
    weights = {"first.weight": dense.first.weight, "second.weight": dense.second.weight}
    reference = DenseReference(weights, pool.values.numel(), total=30, rounds_of=4)
    selector = SFASelector(model, total_steps=30)
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        rate = optimizer.param_groups[0]["lr"]
        for _ in range(accumulation):
            x = torch.randn(8, 12, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            for net in (model, dense):
                (torch.nn.functional.cross_entropy(net(x), y) / accumulation).backward()
        optimizer.step()
        selector.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
        reference.step(rate, decay, BETAS, EPS)
        assert_same(pool, reference)
    assert pool.num_assigned == pool.values.numel()


def test_every_step_of_swinv2_with_external_adapters_equals_the_dense_reference():
    base = upernet()
    dense = copy.deepcopy(base).requires_grad_(False).eval()
    config = SFAConfig(
        budget=0.2, selection_steps=2, select_until=1, modules_to_save=["decode_head"]
    )
    model = get_peft_model(base, config).eval()
    pool = find_pool(model, "default")
    modules, parameters = dict(dense.named_modules()), dict(dense.named_parameters())
    weights = {name: parameters[name] for name in pool.names}
    reference = DenseReference(weights, pool.values.numel(), total=9, rounds_of=2)
    # The reference's external adapters are plain hooks that read the same projections.
    for layer in adapter_layers(model, "default"):
        name = layer.name
        if "default" in layer.sfa_down:
            down, up = layer.sfa_down["default"], layer.sfa_up["default"]
            modules[name].register_forward_hook(
                lambda _m, _i, out, down=down, up=up: (
                    out
                    + torch.nn.functional.linear(
                        torch.relu(
                            torch.nn.functional.linear(
                                out, down.weight.detach(), down.bias.detach()
                            )
                        ),
                        up.weight.detach(),
                        up.bias.detach(),
                    )
                )
            )
    selector = SFASelector(model, total_steps=9)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "decode_head" not in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=BETAS, eps=1e-6, weight_decay=0.01)
    for step in range(9):
        batch = images(seed=step)
        model(**batch).loss.backward()
        dense(**batch).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
        reference.step(1e-3, 0.01, BETAS, 1e-6)
        assert_same(pool, reference)
    assert pool.num_assigned == pool.values.numel()


def test_without_the_correction_late_entries_differ_from_the_reference():
    # The meta-test: the comparison above notices when the correction of late entries is left out.
    base = MLP()
    dense = copy.deepcopy(base).requires_grad_(False)
    model = get_peft_model(
        base,
        SFAConfig(budget=0.3, rho=0, target_modules=["first"], selection_steps=4, select_until=1),
    )
    pool = find_pool(model, "default")
    reference = DenseReference({"first.weight": dense.first.weight}, pool.values.numel(), 8, 4)
    selector = SFASelector(model, total_steps=8)
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2, weight_decay=0.0)
    for step in range(5):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        for net in (model, dense):
            net(x).square().mean().backward()
        optimizer.step()
        selector.step(None)
        optimizer.zero_grad()
        reference.step(1e-2, 0.0, BETAS, EPS)
    with pytest.raises(AssertionError):
        assert_same(pool, reference)
