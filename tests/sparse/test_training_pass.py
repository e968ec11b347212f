# SPDX-License-Identifier: Apache-2.0
"""All weights of a pool at once in a training step are what each of them is by itself."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.sparse import training_pass
from sfa_peft.sparse.gradient import Observer
from sfa_peft.sparse.training_pass import TrainingPass
from sfa_peft.sparse.weight import Weight
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

STEPS = 14


class Mixed(nn.Module):
    """A convolution, layers without bias, and one that is called twice."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.twice = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 5)
        self.head = nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).mean((-1, -2))
        for _ in range(2):
            x = torch.tanh(self.twice(x))
        return self.head(torch.tanh(self.last(x)))


def adapted(base=None, **options):
    config = {"budget": 0.3, "rho": 0.0, "selection_steps": 3, "select_until": 1}
    config |= {"target_modules": ["conv", "twice", "last"], "modules_to_save": ["head"]}
    torch.manual_seed(1)
    return get_peft_model(Mixed() if base is None else base, SFAConfig(**(config | options)))


def batch(step=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator).to(dtype)


def train(model, steps=STEPS, *, fused=False, micro=1, looks=False):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=fused)
    selector = SFASelector(model.train(), total_steps=STEPS)
    dtype, losses = next(model.parameters()).dtype, []
    for step in range(steps):
        for part in range(micro):
            loss = (model(batch(micro * step + part, dtype)).float() - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
        if looks:
            with torch.no_grad():
                losses.append(model.eval()(batch(dtype=dtype)).sum().item())
            model.train()
    pool = find_pool(model, "default")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return losses, pool.values.detach().clone(), pool.slots.clone(), state


CASES = [
    {},
    {"base": torch.bfloat16},
    {"granularity": "row"},
    {"score": "absolute_gradient", "score_every": 2},
    {"score": "weight_difference"},
    {"internal_lr_ratio": 0.5, "weight_decay_on": "weight"},
    {"rho": 0.5, "budget": 0.6, "external_modules": ["last"]},
    {"target_parameters": ["last.bias", "conv.weight"], "target_modules": []},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"fused": True}, {"micro": 2}, {"looks": True}], ids=lambda how: str(*how or ["-"])
)
def test_a_run_is_to_the_bit_what_it_is_weight_by_weight(options, how, monkeypatch):
    options = dict(options)
    dtype = options.pop("base", torch.float32)
    together = train(adapted(Mixed(dtype), **options), **how)
    monkeypatch.setattr(TrainingPass, "begin", lambda self: False)
    monkeypatch.setattr(TrainingPass, "_find", lambda self: None)
    alone = train(adapted(Mixed(dtype), **options), **how)

    assert together[0] == alone[0]
    for one, two in zip(together[1:3], alone[1:3], strict=True):
        assert torch.equal(one, two)
    for name, tensor in together[3].items():
        assert torch.equal(tensor, alone[3][name]), name


def test_a_step_between_picks_writes_each_weight_twice_and_looks_at_none_alone(monkeypatch):
    model = adapted(score="random", selection_steps=None, select_until=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()

    def step():
        model(batch()).square().mean().backward()
        optimizer.step()

    step()
    step()
    writes, alone = [], []
    put = training_pass.put
    monkeypatch.setattr(training_pass, "put", lambda *args: (writes.append(args), put(*args)))
    for name in ("refresh", "withdraw", "is_current", "taps"):
        monkeypatch.setattr(Weight, name, lambda self, *args, name=name: alone.append(name))
    step()

    assert len(writes) == 2 * 3  # once changed, once as they were
    assert not alone


@pytest.fixture
def mlp():
    config = {"budget": 0.3, "rho": 0.0, "score": "random", "modules_to_save": ["head"]}
    model = get_peft_model(MLP(), SFAConfig(target_modules=["first", "second"], **config)).train()
    with torch.no_grad():
        find_pool(model, "default").values.fill_(0.5)
    return model


def test_after_a_forward_that_failed_no_layer_trusts_what_it_prepared(mlp):
    x, layer = torch.randn(2, 12), mlp.get_submodule("base_model.model.first")
    before = layer(x)
    with pytest.raises(RuntimeError, match="shape"):
        mlp(torch.randn(2, 5))
    with torch.no_grad():
        find_pool(mlp, "default").values.fill_(2.0)

    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), layer.eval()(x))


def test_a_weight_that_is_exchanged_between_forwards_is_wired_anew(mlp):
    x, layer = torch.randn(2, 12), mlp.get_submodule("base_model.model.first")
    mlp(x).sum().backward()
    values = find_pool(mlp, "default").values
    first, values.grad = values.grad.clone(), None
    find_pool(mlp, "default").withdraw()
    layer.base_layer.weight.data = torch.ones_like(layer.base_layer.weight)

    out = mlp(x)
    out.sum().backward()

    with torch.no_grad():
        assert torch.equal(out, mlp.eval()(x))
    assert not torch.equal(values.grad, first)


def test_an_adapter_that_is_switched_off_inside_a_forward_has_no_part_in_the_rest(mlp):
    x, base = torch.randn(2, 12), MLP()
    layer = mlp.get_submodule("base_model.model.second")
    first = mlp.get_submodule("base_model.model.first")
    first.register_forward_hook(lambda *_: layer.enable_adapters(False))
    with torch.no_grad():
        hidden = torch.tanh(first(x))
    expected = base.head(torch.tanh(base.second(hidden)))

    head = mlp.get_submodule("base_model.model.head")
    with torch.no_grad():
        head.modules_to_save["default"].load_state_dict(base.head.state_dict())
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=0)


def test_forwards_of_a_frozen_graph_and_a_later_one_have_their_own_gradients(mlp):
    x = torch.randn(2, 12)
    one, two = mlp(x), mlp(2 * x)
    values = find_pool(mlp, "default").values
    (together,) = torch.autograd.grad((one.sum() + two.sum()), values, retain_graph=True)
    parts = [torch.autograd.grad(out.sum(), values, retain_graph=True)[0] for out in (one, two)]

    torch.testing.assert_close(together, parts[0] + parts[1])
    again = torch.autograd.grad(one.sum(), values)[0]
    assert torch.equal(again, parts[0])


def test_the_gradient_of_a_weight_is_taken_as_soon_as_it_is_there(monkeypatch):
    """Not at the end of the backward, where those of all weights would be in memory together."""
    model, order = adapted(), []
    selector = SFASelector(model.train(), total_steps=STEPS)
    assert selector.schedule is not None
    call = Observer.__call__
    monkeypatch.setattr(
        Observer, "__call__", lambda self, grad: (order.append("weight"), call(self, grad))
    )

    def watch(_module, _args, out):
        out.register_hook(lambda _: order.append("first layer"))

    model.get_submodule("base_model.model.conv").register_forward_hook(watch)
    for _ in range(2):
        order.clear()
        model(batch()).square().mean().backward()
        # Those of the last layer, and of the one that is called twice, come before the first's.
        assert order == ["weight", "weight", "first layer", "weight"]


def test_weights_written_in_several_groups_are_as_in_one(monkeypatch):
    one = train(adapted())
    monkeypatch.setattr(training_pass, "_TOGETHER", 20)
    several = train(adapted())

    assert one[0] == several[0]
    assert torch.equal(one[1], several[1])
