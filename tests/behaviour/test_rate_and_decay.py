# SPDX-License-Identifier: Apache-2.0
"""`internal_lr_ratio` and `weight_decay_on` against plain training that does the same."""

import pytest
import torch
from peft import get_peft_model

from sfa_peft import ConfigError, SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import masks_of, step_where
from tests.tiny import MLP

NAMES = ["first", "second"]
STEPS = 12


def build(**options):
    settings = {"budget": 0.4, "rho": 0, "target_modules": NAMES, "selection_steps": 3} | options
    settings.setdefault("select_until", 1)
    model = get_peft_model(MLP(), SFAConfig(**settings))
    return model, find_pool(model, "default")


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 12, generator=generator)
    y = torch.randint(0, 4, (8,), generator=generator)
    return torch.nn.functional.cross_entropy(model(x), y)


def trained(make, ratio, separate):
    model, pool = build(
        rho=0.5,
        external_modules=["second"],
        modules_to_save=["head"],
        internal_lr_ratio=1.0 if separate else ratio,
    )
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if ".sfa_down" in name:
            torch.nn.init.normal_(p)
    others = [p for p in model.parameters() if p.requires_grad and p is not pool.values]
    groups = [{"params": others}, {"params": [pool.values]}]
    optimizer = make(groups if separate else [{"params": [*others, pool.values]}])
    if separate:
        optimizer.param_groups[1]["lr"] *= ratio
    selector = SFASelector(model, total_steps=STEPS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.3, 1.0, STEPS)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        selector.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
    assert pool.num_assigned == pool.values.numel() > 0
    return [pool.slots, pool.values.detach(), *(p.detach() for p in others)]


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "SGD-fused": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("ratio", [0.25, 4.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_internal_lr_ratio_equals_a_group_of_that_learning_rate(name, ratio):
    make = OPTIMIZERS[name]
    expected, got = trained(make, ratio, True), trained(make, ratio, False)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not torch.allclose(got[1], trained(make, 1.0, False)[1], atol=1e-4)


def train_dense(make, masks_by_step):
    """Train the weights themselves; entries outside the mask are put back after every step."""
    dense = MLP().requires_grad_(False)
    weights = {f"{n}.weight": getattr(dense, n).weight.requires_grad_() for n in NAMES}
    pretrained = {n: w.detach().clone() for n, w in weights.items()}
    optimizer = make(list(weights.values()))
    for step, masks in enumerate(masks_by_step):
        loss_of(dense, step).backward()
        step_where(optimizer, weights, masks, pretrained)
    return weights, pretrained


DECAYS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, eps=1e-4),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, eps=1e-4, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.5, eps=1e-4),
    "Adam-decoupled": lambda p: torch.optim.Adam(
        p, lr=1e-2, weight_decay=0.5, eps=1e-4, decoupled_weight_decay=True
    ),
    "Adam-maximize": lambda p: torch.optim.Adam(
        p, lr=1e-2, weight_decay=0.5, eps=1e-4, maximize=True
    ),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.5, eps=1e-4),
    "SGD": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9, weight_decay=0.5),
    "SGD-maximize": lambda p: torch.optim.SGD(p, lr=5e-2, weight_decay=0.5, maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, weight_decay=0.5, eps=1e-3),
}


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("name", DECAYS)
def test_decay_on_the_weight_equals_dense_training_of_the_selected_entries(name, ratio):
    model, pool = build(score="random", weight_decay_on="weight", internal_lr_ratio=ratio)
    masks = masks_of(pool)
    optimizer = DECAYS[name]([pool.values])
    selector = SFASelector(model)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()

    def make(weights):
        own = DECAYS[name](weights)
        own.param_groups[0]["lr"] *= ratio
        return own

    weights, pretrained = train_dense(make, [masks] * STEPS)
    model(torch.randn(2, 12))
    for layer in NAMES:
        live = getattr(model.base_model.model, layer).base_layer.weight
        expected = weights[f"{layer}.weight"].detach()
        torch.testing.assert_close(live.detach(), expected, rtol=0, atol=1e-6)
        assert not torch.allclose(expected, pretrained[f"{layer}.weight"], atol=1e-2)


def test_decay_on_the_weight_reaches_entries_from_when_they_are_selected():
    model, pool = build(weight_decay_on="weight")
    optimizer = torch.optim.SGD([pool.values], lr=5e-2, momentum=0.9, weight_decay=0.5)
    selector = SFASelector(model, total_steps=STEPS)
    masks = []
    for step in range(STEPS):
        masks.append(masks_of(pool))
        loss_of(model, step).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    weights, _ = train_dense(
        lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9, weight_decay=0.5), masks
    )
    model(torch.randn(2, 12))
    for layer in NAMES:
        live = getattr(model.base_model.model, layer).base_layer.weight.detach()
        torch.testing.assert_close(live, weights[f"{layer}.weight"].detach(), rtol=0, atol=1e-6)


def test_decay_on_the_change_pulls_back_to_the_pretrained_value():
    sizes = {}
    for decay_on in ("change", "weight"):
        _model, pool = build(score="random", weight_decay_on=decay_on)
        with torch.no_grad():
            pool.values.fill_(0.1)
        optimizer = torch.optim.SGD([pool.values], lr=0.1, weight_decay=0.5)
        pool.values.grad = torch.zeros_like(pool.values)
        optimizer.step()
        sizes[decay_on] = pool.values.detach().clone()
    assert torch.allclose(sizes["change"], torch.full_like(sizes["change"], 0.095))
    expected = 0.1 - 0.05 * (0.1 + pool.originals())
    torch.testing.assert_close(sizes["weight"], expected)


def test_decay_on_the_weight_is_right_where_a_fused_optimizer_unscales():
    results = []
    for scale in (1.0, 1024.0):
        model, pool = build(score="random", weight_decay_on="weight")
        optimizer = torch.optim.Adam([pool.values], lr=1e-2, weight_decay=0.5, fused=True, eps=1e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(pool.values.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_how_an_unknown_optimizer_decays_is_not_guessed():
    class Unknown(torch.optim.SGD):
        pass

    model, pool = build(score="random", weight_decay_on="weight")
    loss_of(model, 0).backward()
    with pytest.raises(ConfigError, match=r"weight_decay_on='weight': how Unknown decays"):
        Unknown([pool.values], lr=0.1, weight_decay=0.1).step()
    Unknown([pool.values], lr=0.1).step()  # without decay there is nothing to know
