# SPDX-License-Identifier: Apache-2.0
"""Scaled losses, half-precision weights and computation."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from sfa_peft import SelectionError, SFAConfig, SFALayer, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of
from tests.tiny import MLP

STEPS = 12
OPTIMIZERS = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def make(dtype=torch.float32, **options):
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "select_until": 1}
    config |= {"selection_steps": 3, "modules_to_save": ["head"]} | options
    return get_peft_model(MLP().to(dtype), SFAConfig(**config))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model, step: int) -> torch.Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


def fit(
    scaler=None,
    optimizer=None,
    kind=torch.optim.AdamW,
    spoilt=(),
    steps=range(STEPS),
    **make_options,
):
    """Train; the loss of `spoilt` steps is infinite. Return the pool, as it ends."""
    model = make(**make_options)
    optimizer = kind(trained(model), lr=1e-2, weight_decay=0.1, **(optimizer or {}))
    selector = SFASelector(model, total_steps=STEPS - len(spoilt), scaler=scaler)
    for step in steps:
        for micro in range(2):
            loss = loss_of(model, 2 * step + micro)
            loss = loss * float("inf") if step in spoilt and micro else loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        selector.step(optimizer)
        optimizer.zero_grad()
    assert selector.update_steps == STEPS - len(spoilt)
    return find_pool(model, "default")


def assert_same(one, two) -> None:
    assert torch.equal(one.slots, two.slots)
    assert torch.equal(one.values, two.values)


# --- gradient scaler ---------------------------------------------------------------------------

SCORES = [
    {},
    {"score": "absolute_gradient"},
    {"score": "weight_difference"},
    {"score_every": 2},
    {"weight_decay_on": "weight"},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", SCORES, ids=str)
def test_a_scaled_loss_changes_no_bit_also_where_the_scale_grows_inside_a_round(optimizer, options):
    # Powers of two shift exponents only, so that even bits are the same.
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=2)
    chosen = OPTIMIZERS[optimizer]
    assert_same(fit(scaler, chosen, **options), fit(None, chosen, **options))
    assert scaler.get_scale() == 64.0 * 2 ** (STEPS // 2)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("fused", [False, True])
def test_decay_of_the_weights_themselves_is_not_divided_by_the_scale(kind, fused):
    options = {"weight_decay_on": "weight", "kind": kind}
    scaler = GradScaler("cpu", init_scale=64.0)
    scaled = fit(scaler, {"fused": fused}, **options)
    plain = fit(None, {"fused": fused}, **options)
    assert_same(scaled, plain)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", SCORES, ids=str)
def test_a_step_that_overflows_is_neither_counted_nor_scored(optimizer, options):
    chosen, spoilt = OPTIMIZERS[optimizer], (0, 5, 6)
    one = fit(GradScaler("cpu", init_scale=64.0), chosen, spoilt=spoilt, **options)
    without = [s for s in range(STEPS) if s not in spoilt]
    model = fit_without(without, chosen, **options)
    assert_same(one, model)


def fit_without(steps, optimizer, **options):
    model = make(**options)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1, **optimizer)
    selector = SFASelector(model, total_steps=len(steps))
    for step in steps:
        for micro in range(2):
            loss_of(model, 2 * step + micro).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return find_pool(model, "default")


@pytest.mark.parametrize("spoilt", [(), (0, 1)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaler_that_the_selector_does_not_know_is_an_error(optimizer, spoilt):
    model = make()
    scaler = GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.AdamW(trained(model), **OPTIMIZERS[optimizer])
    selector = SFASelector(model, total_steps=STEPS)

    def step(number: int) -> None:
        loss = loss_of(model, number) * (float("inf") if number in spoilt else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        selector.step(optimizer)
        optimizer.zero_grad()

    def train() -> None:
        for number in (*spoilt, 2):  # first steps of fp16 training overflow as a rule
            step(number)

    with pytest.raises(SelectionError, match=r"SFASelector\(model, scaler=scaler\)"):
        train()
    assert selector.update_steps == 0


def test_a_scaler_that_is_switched_off_need_not_be_known():
    off = GradScaler("cpu", enabled=False)
    model = make()
    optimizer = torch.optim.AdamW(trained(model))
    selector = SFASelector(model, total_steps=STEPS)
    off.scale(loss_of(model, 0)).backward()
    off.step(optimizer)
    selector.step(optimizer)
    assert selector.update_steps == 1
    assert_same(fit(off), fit(None))


def test_accelerates_optimizer_with_a_scaler_selects_the_same():
    Accelerator(cpu=True)
    pools = []
    for scaler in (None, GradScaler("cpu", init_scale=64.0)):
        model = make()
        optimizer = AcceleratedOptimizer(torch.optim.AdamW(trained(model), lr=1e-2), scaler=scaler)
        selector = SFASelector(model, total_steps=STEPS - 1, scaler=scaler)
        for step in range(STEPS):
            if step == 4 and scaler is None:
                continue
            loss = loss_of(model, step) * (float("inf") if step == 4 else 1)
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
            selector.step(optimizer)
            optimizer.zero_grad()
        pools.append(find_pool(model, "default"))
    assert_same(*pools)
    forgetful = SFASelector(make(), total_steps=STEPS)
    with pytest.raises(SelectionError, match=r"scaler=accelerator\.scaler"):
        forgetful.step(optimizer)


# --- half precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_values_get_the_gradient_that_a_dense_weight_would(dtype):
    model = make(score="random")
    pool = find_pool(model, "default")
    dense = MLP()
    with torch.no_grad():
        pool.values.normal_(generator=torch.Generator().manual_seed(0))
        for name, delta in deltas_of(pool).items():
            dense.get_parameter(name).add_(delta)
    for net in (model, dense):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(net, 0)
        loss.backward()
    assert pool.values.grad.dtype == torch.float32
    grads = [
        dense.get_parameter(n).grad.flatten()[pool.indices(i)] for i, n in enumerate(pool.names)
    ]
    for grad, spans in zip(grads, pool.layout(), strict=True):
        assert torch.equal(torch.cat([pool.values.grad[a:b] for a, b in spans]), grad)


class Casts(TorchDispatchMode):
    """Counts casts of whole activations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_activation = args and isinstance(args[0], torch.Tensor) and args[0].shape[:1] == (8,)
        self.count += func is torch.ops.aten._to_copy.default and is_activation
        return func(*args, **(kwargs or {}))


def test_under_autocast_an_external_adapter_casts_no_activation():
    model = make(rho=1.0, external_modules=["first", "second"], init_weights=False).eval()
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with Casts() as casts:
            adapted = model(x)
        with model.disable_adapter():
            assert not torch.equal(model(x), adapted)
    assert casts.count == 0
    shape = model.to("meta")(x.to("meta").float()).shape  # where there is no autocast to ask about
    assert shape == adapted.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler_selects_and_ends_with_finite_values(dtype):
    pools = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**10, growth_interval=3)):
        model = make()
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        selector = SFASelector(model, total_steps=STEPS, scaler=scaler)
        for step in range(STEPS):
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, step)
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
            selector.step(optimizer)
            optimizer.zero_grad()
        pools.append(find_pool(model, "default"))
    if dtype == torch.bfloat16:  # float16 without a scaler loses small gradients
        assert torch.equal(pools[0].slots, pools[1].slots)
    assert all(bool(p.values.isfinite().all()) and p.num_assigned == p.slots.numel() for p in pools)


def test_in_a_bfloat16_backbone_only_selected_entries_have_float32_masters():
    model = make(torch.bfloat16, modules_to_save=None)
    pool = find_pool(model, "default")
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    selector = SFASelector(model, total_steps=6)
    originals = {
        n: w.clone() for n, w in model.named_parameters() if n.endswith("base_layer.weight")
    }
    for step in range(6):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    floats = [p for p in model.parameters() if p.dtype == torch.float32]
    assert [id(p) for p in floats] == [id(pool.values)]
    assert pool.values.numel() == int(0.3 * sum(p.numel() for p in MLP().parameters()))

    def check() -> None:
        model(torch.zeros(1, 12).bfloat16())
        for name, delta in deltas_of(pool).items():
            layer = name.removesuffix(".weight")
            original = originals[f"base_model.model.{layer}.base_layer.weight"]
            weight = model.get_base_model().get_submodule(layer).base_weight
            assert torch.equal(weight, (original.float() + delta).bfloat16())
            assert (weight != original).any()

    check()
    with torch.no_grad():  # large enough for a change that is rounded first to end elsewhere
        pool.values.normal_(generator=torch.Generator().manual_seed(0))
    check()


def test_updates_too_small_for_bfloat16_add_up():
    model = make(torch.bfloat16, score="magnitude", modules_to_save=None)
    pool = find_pool(model, "default")
    layer = next(m for m in model.modules() if isinstance(m, SFALayer))
    x = torch.zeros(1, 12).bfloat16()
    model(x)
    before = layer.base_weight.clone()
    optimizer = torch.optim.SGD([pool.values], lr=1.0)
    chosen = pool.indices(0)
    chosen = chosen[(before.flatten()[chosen].abs() - 0.1875).abs() < 0.06]
    moved = []
    for _ in range(64):  # from 0.125 to 0.25 steps of bfloat16 are 2 ** -10
        pool.values.grad = torch.full_like(pool.values, -(2.0**-15))
        optimizer.step()
        model(x)
        moved.append((layer.base_weight.float() - before.float()).flatten()[chosen])
    assert chosen.numel() > 3
    assert not torch.cat(moved[:15]).any()
    assert (moved[-1] == 2.0**-9).all()
