# SPDX-License-Identifier: Apache-2.0
"""A float64 base: changes are added in float64, and files give every bit back."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import OtherBaseWarning, SFAConfig
from sfa_peft.sparse.delta import adapt, change_to
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of
from tests.tiny import MLP

OPTIONS = {"budget": 0.3, "rho": 0, "score": "random", "target_modules": ["first", "second"]}


def base() -> MLP:
    """A model whose weights no float32 can hold."""
    model, generator = MLP().double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-9)
    return model


def train(model) -> torch.Tensor:
    """Train three steps; return the output for some input."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return output(model)


def output(model) -> torch.Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_of_a_float64_base_keep_every_bit(autocast, tmp_path):
    options = SFAConfig(modules_to_save=["head"], **OPTIONS)
    model = get_peft_model(base(), options, autocast_adapter_dtype=autocast)
    expected = train(model)
    pretrained, changes = base(), deltas_of(find_pool(model, "default"))
    for name in ("first", "second"):
        weight = getattr(pretrained, name).weight.detach()
        wanted = weight + changes[f"{name}.weight"].double()
        found = model.get_submodule(f"base_model.model.{name}.base_layer").weight
        assert torch.equal(found, wanted)
        assert not torch.equal(wanted.float().double(), wanted)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(output(again), expected)
    with again.disable_adapter():
        layer = again.get_submodule("base_model.model.first.base_layer")
        assert torch.equal(layer.weight, base().first.weight)


def test_values_made_float64_later_lose_bits_in_a_file_and_say_so(tmp_path):
    model = get_peft_model(MLP(), SFAConfig(**OPTIONS)).double()
    expected = train(model)
    assert find_pool(model, "default").values.dtype == torch.float64
    with pytest.warns(OtherBaseWarning, match=r"`default` .* adapted weights lose their last bits"):
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MLP().double(), tmp_path)
    torch.testing.assert_close(output(again), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_bases_are_added_to_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10_000, generator=generator).to(dtype)
    change = torch.randn(10_000, generator=generator) * 1e-3
    wanted = (weight.float() + change).to(dtype)
    assert torch.equal(adapt(weight, change), wanted)
    assert torch.equal(adapt(weight, change.double()), wanted)
    assert torch.equal(adapt(weight, change_to(weight, wanted)), wanted)
