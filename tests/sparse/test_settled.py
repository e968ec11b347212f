# SPDX-License-Identifier: Apache-2.0
"""A forward asks nothing once it knows that weights are as they should be, and misses no write."""

import copy

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.sparse.weight import Weight
from sfa_peft.tuner.adapted_layers import find_pool
from tests.switching_kit import ACTIONS, Kit, Session, layers_of, output
from tests.tiny import MLP

OPTIONS = {"budget": 0.5, "rho": 0, "score": "random", "target_modules": ["first", "second"]}
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(monkeypatch):
    """Count the questions that take long."""
    found = []
    is_current = Weight.is_current

    def counted(self, names):
        found.append(self)
        return is_current(self, names)

    monkeypatch.setattr(Weight, "is_current", counted)
    return found


def make(**options):
    torch.manual_seed(0)
    model = get_peft_model(MLP(), SFAConfig(**(OPTIONS | options))).eval()
    pool = find_pool(model, "default")
    with torch.no_grad():
        pool.values[: pool.num_selected].normal_()
    return model


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def expected(model) -> torch.Tensor:
    """What a copy says, which knows nothing yet."""
    twin = copy.deepcopy(model)
    assert all(layer.settled.look() is None for layer in layers_of(twin))
    return answer(twin)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_from_the_third_forward_on_nothing_is_asked(with_gradient, asked):
    model = make()
    with torch.set_grad_enabled(with_gradient):
        outputs = [model(X).detach() for _ in range(2)]
        asked.clear()
        outputs.append(model(X).detach())
    assert not asked
    assert torch.equal(outputs[0], outputs[2])


def write_values(model):
    find_pool(model, "default").values.mul_(3)


def replace_values(model):
    first = find_pool(model, "default").store.layer
    first.sfa_pool["default"] = torch.nn.Parameter(first.sfa_pool["default"] * 2)


def write_past_autograd(model):
    values = find_pool(model, "default").values
    values.data = values.data * 2


def write_weight(model):
    layers_of(model)[0].weights["weight"].tensor.mul_(2)


def replace_weight(model):
    layer = layers_of(model)[1].base_layer
    layer.weight = torch.nn.Parameter(layer.weight * 2)


def replace_layer(model):
    old = layers_of(model)[1].base_layer
    layers_of(model)[1].base_layer = torch.nn.Linear(old.in_features, old.out_features)


def to_double_and_back(model):
    model.double().float()


def step(model):
    values = find_pool(model, "default").values
    values.grad = torch.ones_like(values)
    torch.optim.AdamW([values], lr=0.1, fused=True).step()


WRITES = [write_values, replace_values, write_past_autograd, write_weight, replace_weight]
WRITES += [replace_layer, to_double_and_back, step]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_forward_sees_whatever_was_written(write):
    model = make()
    before, *_ = [answer(model) for _ in range(3)]
    assert all(layer.settled.look() is not None for layer in layers_of(model))
    with torch.no_grad():
        write(model)
    known = [layer.settled.look() for layer in layers_of(model)]
    assert None in known
    found = answer(model)
    assert torch.equal(found, expected(model))
    assert torch.equal(found, before) == (write is to_double_and_back)


@pytest.mark.parametrize("action", ACTIONS)
def test_whatever_is_done_between_forwards_the_next_is_as_that_of_a_copy(action):
    session = Session(Kit("mlp", torch.float32))
    for _ in range(3):
        session.forward()
    session.do(action)
    twin, batch = copy.deepcopy(session.model), session.kit.batch(session.dtype)
    assert torch.equal(output(session.model, batch), output(twin, batch))


def test_candidates_that_train_are_in_the_next_forward():
    options = {"score": "weight_difference", "selection_steps": 2, "select_until": 1}
    model = make(**options).train()
    before, *_ = [answer(model) for _ in range(3)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    selector = SFASelector(model, total_steps=8)
    model(X).square().sum().backward()
    optimizer.step()
    selector.step(optimizer)
    assert not torch.equal(answer(model), before)


def test_disabled_layers_that_hold_nothing_are_not_written(monkeypatch):
    model = make()
    with model.disable_adapter():
        answer(model)
        monkeypatch.setattr(Weight, "withdraw", lambda _: pytest.fail("there is nothing to do"))
        answer(model)
        monkeypatch.undo()
