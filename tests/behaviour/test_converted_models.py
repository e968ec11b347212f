# SPDX-License-Identifier: Apache-2.0
"""`model.to(...)` after the adapter is there: other types, other layouts, and back."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapt(base: nn.Module, **options):
    settings = {"budget": 0.5, "rho": 0, "target_modules": ["first", "second"]}
    settings["selection_steps"] = 2
    torch.manual_seed(1)
    return get_peft_model(base, SFAConfig(**(settings | {"modules_to_save": ["head"]} | options)))


def train(model, x: torch.Tensor, steps: int = 8):
    selector = SFASelector(model.train(), total_steps=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return find_pool(model, "default")


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_channels_last_after_wrapping_trains_saves_and_merges_as_without(tmp_path):
    plain, model = adapt(Convolutions()), adapt(Convolutions())
    model = model.to(memory_format=torch.channels_last)
    x = pictures().to(memory_format=torch.channels_last)
    one, two = train(plain, pictures()), train(model, x)
    assert torch.equal(one.slots, two.slots)
    torch.testing.assert_close(one.values, two.values, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert model.eval()(x).is_contiguous(memory_format=torch.channels_last)
        before = model(x)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Convolutions(), tmp_path).eval()
        again = again.to(memory_format=torch.channels_last)
        torch.testing.assert_close(again(x), before, rtol=0, atol=1e-6)
        again.merge_adapter()
        torch.testing.assert_close(again(x), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_keep_float32_when_the_model_is_made_16_bit(dtype):
    model = adapt(MLP())
    pool = train(model, torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    values, parameter = pool.values.detach().clone(), pool.values
    model.to(dtype)
    assert pool.values is parameter
    assert {p.dtype for n, p in model.named_parameters() if "sfa_" not in n} == {dtype}
    assert torch.equal(pool.values, values)  # and so the type is float32, too
    # The weights hold exactly what an adapter that is loaded on the 16-bit base writes.
    base = MLP().to(dtype)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 12, dtype=dtype))
        for ordinal, name in enumerate(pool.names):
            expected = base.get_parameter(name).flatten().clone()
            at = pool.indices(ordinal)
            own = torch.cat([values[a:b] for a, b in pool.layout()[ordinal]])
            expected[at] = (expected[at].float() + own).to(dtype)
            found = model.get_base_model().get_submodule(name.rpartition(".")[0])
            assert torch.equal(found.base_layer.weight.flatten(), expected)


def test_values_that_were_16_bit_or_are_made_wider_are_left_to_the_user():
    model = get_peft_model(
        MLP().bfloat16(),
        SFAConfig(budget=0.3, rho=0, target_modules=["first"], score="random"),
        autocast_adapter_dtype=False,
    )
    pool = find_pool(model, "default")
    assert pool.values.dtype == torch.bfloat16
    model.half()
    assert pool.values.dtype == torch.float16
    model.double()
    assert pool.values.dtype == torch.float64
    model.half()
    assert pool.values.dtype == torch.float32
