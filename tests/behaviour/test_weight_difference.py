# SPDX-License-Identifier: Apache-2.0
"""Eq. 4: dense training inside a round, pretrained bits after it."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import ConfigError, SelectionError, SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import masks_of
from tests.tiny import MLP

NAMES = ["first", "second"]
OPTIMIZERS = {
    "sgd": lambda p, wd: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=wd),
    "adam": lambda p, wd: torch.optim.Adam(p, lr=1e-2, eps=1e-5, weight_decay=wd),
    "adamw": lambda p, wd: torch.optim.AdamW(p, lr=1e-2, eps=1e-5, weight_decay=wd),
    "fused": lambda p, wd: torch.optim.AdamW(p, lr=1e-2, eps=1e-5, weight_decay=wd, fused=True),
    "amsgrad": lambda p, wd: torch.optim.AdamW(p, lr=1e-2, eps=1e-5, weight_decay=wd, amsgrad=True),
}


def build(**options):
    config = SFAConfig(
        budget=0.3,
        rho=0,
        target_modules=NAMES,
        selection_steps=3,
        select_until=1,
        score="weight_difference",
        **options,
    )
    model = get_peft_model(MLP(), config)
    return model, find_pool(model, "default")


def batch(step):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step))


def advance(model, selector, optimizer, step):
    model(batch(step)).square().mean().backward()
    optimizer.step()
    picked = selector.step(optimizer)
    optimizer.zero_grad()
    return picked


def live_weights(model):
    model(batch(0))  # a forward writes what is live
    return [getattr(model.base_model.model, n).base_layer.weight.detach().clone() for n in NAMES]


@pytest.mark.parametrize("ratio", [1.0, 2.5])
@pytest.mark.parametrize(("decay_on", "decay"), [("change", 0.0), ("weight", 0.1)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_inside_a_round_equal_dense_training_and_return_to_their_bits(
    kind, decay_on, decay, ratio
):
    model, pool = build(weight_decay_on=decay_on, internal_lr_ratio=ratio)
    dense = MLP().requires_grad_(False)
    weights = [getattr(dense, n).weight.requires_grad_() for n in NAMES]
    pretrained = [w.detach().clone() for w in weights]
    own = OPTIMIZERS[kind](weights, decay)
    own.param_groups[0]["lr"] *= ratio
    selector = SFASelector(model, total_steps=9)
    optimizer = OPTIMIZERS[kind]([pool.values], decay)
    for step in range(2):
        advance(model, selector, optimizer, step)
        dense(batch(step)).square().mean().backward()
        own.step()
        own.zero_grad()
        for live, weight in zip(live_weights(model), weights, strict=True):
            torch.testing.assert_close(live, weight.detach(), rtol=0, atol=1e-6)
    assert not torch.equal(live_weights(model)[0], pretrained[0])
    assert advance(model, selector, optimizer, 2)  # a pick
    for live, weight in zip(live_weights(model), pretrained, strict=True):
        assert torch.equal(live, weight)


@pytest.mark.filterwarnings("ignore::sfa_peft.UnfinishedSelectionWarning")
def test_what_is_selected_in_one_round_trains_on_in_the_next_and_is_not_moved_twice():
    model, pool = build()
    selector = SFASelector(model, total_steps=9)
    optimizer = torch.optim.SGD([pool.values], lr=0.05)
    for step in range(3):
        advance(model, selector, optimizer, step)
    masks = [m.clone() for m in masks_of(pool).values()]
    pretrained = [getattr(MLP(), n).weight.detach() for n in NAMES]
    # The same two steps of dense SGD from the pretrained weights: selected entries move alike.
    dense = MLP().requires_grad_(False)
    weights = [getattr(dense, n).weight.requires_grad_() for n in NAMES]
    own = torch.optim.SGD(weights, lr=0.05)
    for step in range(3, 5):
        advance(model, selector, optimizer, step)
        dense(batch(step)).square().mean().backward()
        own.step()
        own.zero_grad()
    for live, weight, mask in zip(live_weights(model), weights, masks, strict=True):
        assert mask.any()
        torch.testing.assert_close(live, weight.detach(), rtol=0, atol=1e-6)
    selector.close()  # ends the dense training; selected entries keep their change
    for live, weight, before, mask in zip(
        live_weights(model), weights, pretrained, masks, strict=True
    ):
        assert torch.equal(live[~mask], before[~mask])
        torch.testing.assert_close(live[mask], weight.detach()[mask], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::sfa_peft.UnfinishedSelectionWarning")
def test_an_adapter_saved_inside_a_round_holds_selected_changes_only(tmp_path):
    model, pool = build()
    selector = SFASelector(model, total_steps=9)
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
    for step in range(5):
        advance(model, selector, optimizer, step)
    inside = live_weights(model)
    model.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("base_layer.weight")}
    for live, name in zip(live_weights(model), NAMES, strict=True):
        pretrained = getattr(MLP(), name).weight.detach()
        assert torch.equal(state[f"base_model.model.{name}.base_layer.weight"], pretrained)
        assert not torch.equal(live, pretrained)
    assert all(map(torch.equal, live_weights(model), inside))  # and saving changes nothing
    loaded = PeftModel.from_pretrained(MLP(), tmp_path)
    selector.close()
    assert torch.equal(loaded(batch(9)), model(batch(9)))
    for live, name, mask in zip(live_weights(loaded), NAMES, masks_of(pool).values(), strict=True):
        assert not (live != getattr(MLP(), name).weight)[~mask].any()


def test_switching_off_inside_a_round_computes_with_pretrained_weights():
    model, pool = build()
    selector = SFASelector(model, total_steps=9)
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
    advance(model, selector, optimizer, 0)
    inside = model(batch(5))
    with model.disable_adapter():
        assert torch.equal(model(batch(5)), MLP()(batch(5)))
    assert torch.equal(model(batch(5)), inside)
    assert not torch.equal(inside, MLP()(batch(5)))


def test_a_run_resumed_inside_a_round_goes_on_to_the_bit():
    finals = []
    for stop in (None, 5):
        model, pool = build()
        selector = SFASelector(model, total_steps=9)
        optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
        for step in range(9):
            if step == stop:
                saved = copy.deepcopy((selector.state_dict(), optimizer.state_dict()))
                adapter = (pool.values.detach().clone(), pool.slots.clone())
                model, pool = build()
                with torch.no_grad():
                    pool.values.copy_(adapter[0])
                    pool.slots.copy_(adapter[1])
                optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
                optimizer.load_state_dict(saved[1])
                selector = SFASelector(model, total_steps=9)
                selector.load_state_dict(saved[0])
            advance(model, selector, optimizer, step)
        finals.append((pool.slots.clone(), pool.values.detach().clone()))
    assert torch.equal(finals[0][0], finals[1][0])
    assert torch.equal(finals[0][1], finals[1][1])


@pytest.mark.filterwarnings("ignore::sfa_peft.UnfinishedSelectionWarning")
def test_two_adapters_that_train_candidates_together_are_both_undone():
    model, _ = build()
    model.add_adapter(
        "other",
        SFAConfig(
            budget=0.2, rho=0, target_modules=NAMES, selection_steps=3, score="weight_difference"
        ),
    )
    model.base_model.set_adapter(["default", "other"])
    pools = [find_pool(model, n) for n in ("default", "other")]
    selectors = [SFASelector(model, total_steps=9, adapter_name=n) for n in ("default", "other")]
    optimizer = torch.optim.SGD([p.values for p in pools], lr=0.05)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    for selector in selectors:
        selector.step(optimizer)
    dense = MLP()
    dense(batch(0)).square().mean().backward()
    for live, name in zip(live_weights(model), NAMES, strict=True):
        weight = getattr(dense, name).weight
        torch.testing.assert_close(live, (weight - 0.1 * weight.grad).detach(), rtol=0, atol=1e-6)
    for selector in selectors:
        selector.close()
    for live, name in zip(live_weights(model), NAMES, strict=True):
        assert torch.equal(live, getattr(MLP(), name).weight)


def test_what_cannot_train_candidates_is_refused():
    model, pool = build()
    selector = SFASelector(model, total_steps=9)
    optimizer = torch.optim.SGD([pool.values], lr=0.05)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    with pytest.raises(SelectionError, match=r"call SFASelector\.step\(optimizer\)"):
        selector.step()

    class Odd(torch.optim.SGD):
        def __init__(self, params, secret, **kwargs):
            super().__init__(params, **kwargs)

    model, pool = build()
    selector = SFASelector(model, total_steps=9)
    optimizer = Odd([pool.values], 1, lr=0.05)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    with pytest.raises(SelectionError, match="cannot make a second Odd"):
        selector.step(optimizer)
    for change in ({"score_every": 2}, {"score_dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match="trains candidates in fp32 on every step"):
            build(**change)
