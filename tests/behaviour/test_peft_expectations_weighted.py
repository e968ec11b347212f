# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter`: the weighted sum of sparse changes as a new adapter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from sfa_peft import SFAConfig, SFAError
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

LAYERS = ("first", "second")
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def config(**options) -> SFAConfig:
    defaults = {"budget": 0.4, "rho": 0, "score": "random", "target_modules": list(LAYERS)}
    return SFAConfig(**{**defaults, "init_weights": False, **options})


def two(heads=((), ())) -> PeftModel:
    torch.manual_seed(3)
    saved = [list(h) or None for h in heads]
    model = get_peft_model(MLP(), config(modules_to_save=saved[0]), adapter_name="a")
    model.add_adapter("b", config(seed=1, budget=0.2, modules_to_save=saved[1]))
    return model.eval()


def dense_weights(model, adapter) -> dict[str, torch.Tensor]:
    """Return the layers' weights as a merged model has them."""
    model.set_adapter(adapter)
    return {n: getattr(model.base_model.model, n).base_layer.weight.clone() for n in LAYERS}


@settings(max_examples=20)
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=2))
def test_the_new_weights_are_the_pretrained_ones_and_the_weighted_changes(weights):
    model = two()
    base, a, b = MLP(), dense_weights(model, "a"), dense_weights(model, "b")
    pools = {n: find_pool(model, n).state_dict() for n in ("a", "b")}
    model.add_weighted_adapter(["a", "b"], weights, "sum", combination_type="linear")
    assert model.active_adapters == ["b"]
    found = dense_weights(model, "sum")
    for name in LAYERS:
        pretrained = base.get_parameter(f"{name}.weight")
        changes = [w[name] - pretrained for w in (a, b)]
        expected = pretrained + sum(f * c for f, c in zip(weights, changes, strict=True))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
    for name, before in pools.items():
        after = find_pool(model, name).state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
    selected = find_pool(model, "sum").slots
    union = torch.cat([p["slots"] for p in pools.values()]).unique()
    assert torch.equal(selected.sort().values.long(), union[union >= 0].long())


def test_one_adapter_with_weight_one_is_a_copy_to_the_bit_and_it_saves_and_trains(tmp_path):
    model = two()
    model.set_adapter("a")
    expected = model(X)
    model.add_weighted_adapter(["a"], [1.0], "same")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".same" in n)
    model.set_adapter("same")
    assert torch.equal(model(X), expected)
    model.save_pretrained(tmp_path, selected_adapters=["same"])
    loaded = PeftModel.from_pretrained(MLP(), tmp_path / "same").eval()
    assert torch.equal(loaded(X), expected)
    model.train()(X).sum().backward()
    assert bool(find_pool(model, "same").values.grad.any())


def test_a_head_that_one_adapter_saves_is_copied():
    model = two(heads=((), ("head",)))
    model.set_adapter("b")
    head = model.base_model.model.head
    with torch.no_grad():
        head.modules_to_save["b"].weight.add_(1)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    copied, owned = head.modules_to_save["sum"], head.modules_to_save["b"]
    assert torch.equal(copied.weight, owned.weight)
    assert copied.weight is not owned.weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [1.0, 1.0], "s", "svd"), "made for low-rank matrices"),
        ((["a", "b"], [1.0, 1.0], "s", "cat"), "made for low-rank matrices"),
        ((["a", "b"], [1.0], "s"), "one weight for each"),
        ((["a", "a"], [1.0, 1.0], "s"), "expected different adapters"),
        ((["a", "c"], [1.0, 1.0], "s"), r"the model has \['a', 'b'\]"),
        ((["a"], [1.0], "items"), "'items' cannot name a task or an adapter"),
        (([], [], "s"), "Name adapters"),
        (("a", [1.0], "s"), "Name adapters that it has, in a list"),
        ((["a", 1], [1.0, 1.0], "s"), "Name adapters"),
        ((["a"], 1.0, "s"), "one weight for each, a finite number"),
        ((["a"], [float("nan")], "s"), r"a finite number, got \['a'\] and weights=\[nan\]"),
        ((["a"], ["x"], "s"), "a finite number"),
        ((["a", "b"], [1, "2"], "s"), "a finite number"),
        ((["a", "b"], [1.0, 1.0], "b"), "adapter_name='b' is no name, or the model has"),
        ((["a"], [1.0], None), "adapter_name=None is no name"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    model = two()
    with pytest.raises(SFAError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "svd", "svd_rank": 4}, "combination_type='svd' is made for low-rank"),
        ({"combination_type": "ties"}, "combination_type='ties' is made for low-rank"),
        ({"density": 0.5}, "density=0.5 is made for low-rank"),
    ],
)
def test_options_that_peft_has_for_lora_are_refused(options, message):
    with pytest.raises(SFAError, match=f"{message}.*sfa_peft.tasks.combine"):
        two().add_weighted_adapter(["a", "b"], [1.0, 1.0], "s", **options)


def test_weights_of_numpy_are_numbers():
    found = []
    for weights in ([0.5, 0.25], np.array([0.5, 0.25]), [np.float32(0.5), np.float64(0.25)]):
        model = two()
        model.add_weighted_adapter(["a", "b"], weights, "s")
        found.append(find_pool(model, "s").values.detach())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_external_adapters_and_two_heads_are_refused():
    model = two(heads=(("head",), ("head",)))
    with pytest.raises(SFAError, match=r"`a`, `b` each save `head` whole.*combine"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    options = {"rho": 0.5, "budget": 0.9, "external_modules": ["second"]}
    model = get_peft_model(MLP(), config(**options), adapter_name="a")
    with pytest.raises(SFAError, match="has external adapters, which are not linear"):
        model.add_weighted_adapter(["a"], [1.0], "sum")


def test_peft_refuses_two_heads_too():
    """Why the rule above is PEFT's."""
    lora = LoraConfig(target_modules=list(LAYERS), modules_to_save=["head"])
    model = get_peft_model(MLP(), lora, adapter_name="a")
    model.add_adapter("b", lora)
    with pytest.raises(ValueError, match="target the same module with modules_to_save"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="linear")
