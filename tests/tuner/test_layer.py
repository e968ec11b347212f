# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfa_peft import SFAConfig, SFALayer
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of, masks_of
from tests.tiny import MLP, images, upernet

INTERNAL = {"budget": 0.5, "rho": 0, "score": "random", "target_modules": ["first", "second"]}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {
        m.name: m.get_base_layer().weight.detach().clone()
        for m in model.modules()
        if isinstance(m, SFALayer)
    }


def assert_same_weights(model, originals) -> None:
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, originals[name]), name


def with_random_values(model, seed: int = 0, name: str = "default"):
    pool = find_pool(model, name)
    with torch.no_grad():
        pool.values.copy_(
            torch.randn(pool.values.shape, generator=torch.Generator().manual_seed(seed))
        )
    return pool


@pytest.mark.parametrize("rho", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_the_output_equals_the_bare_models_to_the_bit(rho, dtype):
    bare = upernet().eval().to(dtype)
    batch = images()["pixel_values"].to(dtype)
    expected = bare(batch).logits
    model = get_peft_model(bare, SFAConfig(budget=0.2, rho=rho, modules_to_save=["decode_head"]))
    assert torch.equal(model.eval()(batch).logits, expected)


def test_the_gradient_of_the_values_is_the_gathered_dense_gradient_to_the_bit():
    dense = MLP()
    model = get_peft_model(copy.deepcopy(dense), SFAConfig(**INTERNAL))
    pool = with_random_values(model)
    with torch.no_grad():
        for name, delta in deltas_of(pool).items():
            dense.get_parameter(name).add_(delta)
    x = torch.randn(5, 12)
    for net in (model, dense):
        net(x).square().sum().backward()
    gathered = torch.zeros_like(pool.values)
    for ordinal, name in enumerate(pool.names):
        grad = dense.get_parameter(name).grad.flatten()
        for a, b in pool.layout()[ordinal]:
            gathered[a:b] = grad[pool.slots[a:b] - pool.starts[ordinal]]
    assert torch.equal(pool.values.grad, gathered)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit_of_the_gradient(reentrant):
    model = get_peft_model(MLP(), SFAConfig(**INTERNAL))
    pool = with_random_values(model)
    x = torch.randn(5, 12, requires_grad=True)
    model(x).square().sum().backward()
    plain, pool.values.grad = pool.values.grad, None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(pool.values.grad, plain)


def test_several_forwards_before_one_backward_and_forwards_without_gradient_between():
    model = get_peft_model(MLP(), SFAConfig(**INTERNAL))
    pool = with_random_values(model)
    xs = torch.randn(3, 5, 12)
    grads = []
    for x in xs:
        model(x).square().sum().backward()
        grads.append(pool.values.grad)
        pool.values.grad = None
    losses = []
    for x in xs:
        losses.append(model(x).square().sum())
        with torch.no_grad():
            model.eval()(x)
        with torch.inference_mode():
            model(x)
        model.train()
    for loss in losses[:2]:
        loss.backward()  # one by one through one cut
    losses[2].backward()
    torch.testing.assert_close(pool.values.grad, sum(grads))


def test_training_changes_selected_entries_only_and_leaves_the_backbone_pretrained():
    model = get_peft_model(MLP(), SFAConfig(**INTERNAL))
    originals = weights_of(model)
    pool = find_pool(model, "default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(model, originals)  # between steps nothing is left in the weights
    model(torch.randn(4, 12))
    for name, weight in weights_of(model).items():
        mask, delta = masks_of(pool)[f"{name}.weight"], deltas_of(pool)[f"{name}.weight"]
        assert torch.equal(weight[~mask], originals[name][~mask])
        torch.testing.assert_close(weight, originals[name] + delta)
    for name, tensor in model.state_dict().items():  # a state dict always has the pretrained bits
        if name.endswith("base_layer.weight"):
            key = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
            assert torch.equal(tensor, originals[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_merges_and_unmerges_restore_every_bit(dtype):
    model = get_peft_model(MLP().to(dtype), SFAConfig(**INTERNAL))
    originals = weights_of(model)
    with_random_values(model)
    adapted = None
    for _ in range(1000):
        model.merge_adapter()
        merged = weights_of(model)
        if adapted is None:
            adapted = merged
        assert all(torch.equal(merged[n], adapted[n]) for n in merged)
        model.unmerge_adapter()
        assert_same_weights(model, originals)


ACTIONS = [
    "one",
    "two",
    "both",
    "forward",
    "train",
    "merge",
    "unmerge",
    "disable",
    "enable",
    "cast",
    "copy",
]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(ACTIONS), max_size=12))
def test_after_any_sequence_of_switches_the_weights_are_as_after_a_fresh_one(actions):
    base = MLP()
    model = get_peft_model(base, SFAConfig(**INTERNAL), adapter_name="one")
    model.add_adapter("two", SFAConfig(**INTERNAL, seed=1))
    originals = weights_of(model)
    for seed, name in enumerate(["one", "two"]):
        with_random_values(model, seed, name)
    for action in actions:
        model = _act(model, action)
    model.base_model.enable_adapter_layers()
    if any(m.merged for m in model.modules() if isinstance(m, SFALayer)):
        model.unmerge_adapter()
    model.set_adapter("one")
    fresh = get_peft_model(MLP(), SFAConfig(**INTERNAL), adapter_name="one")
    with torch.no_grad():
        find_pool(fresh, "one").values.copy_(find_pool(model, "one").values)
    x = torch.randn(2, 12)
    assert torch.equal(model.float()(x), fresh(x))
    with model.disable_adapter():
        assert torch.equal(model(x), MLP()(x))
    model.set_adapter("two")  # switching puts the first one's originals back
    assert_same_weights(model, originals)


def _train(model) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 12)).sum().backward()
    optimizer.step()


def _act(model, action):
    """Do one thing to a model if its state allows it; return the model to go on with."""
    layer = next(m for m in model.modules() if isinstance(m, SFALayer))
    if action == "copy":
        return copy.deepcopy(model)
    if action == "unmerge" and not layer.merged:
        return model
    if action in ("one", "two", "both", "train", "merge") and layer.merged:
        return model
    if action == "train" and layer.disable_adapters:
        return model
    {
        "one": lambda: model.set_adapter("one"),
        "two": lambda: model.set_adapter("two"),
        "both": lambda: model.base_model.set_adapter(["one", "two"]),
        "forward": lambda: model(torch.randn(2, 12)),
        "train": lambda: _train(model),
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "disable": model.base_model.disable_adapter_layers,
        "enable": model.base_model.enable_adapter_layers,
        "cast": lambda: model.to(torch.float64).to(torch.float32),  # there and back: lossless
    }[action]()
    return model


def test_a_convolution_is_adapted_like_a_linear_layer():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, stride=2, bias=False), nn.ReLU())
    dense = copy.deepcopy(base)
    config = SFAConfig(
        budget=1.0, adapter_dim=2, score="magnitude", target_modules=["0"], external_modules=["0"]
    )
    model = get_peft_model(base, config)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(model(x), dense(x))
    pool = find_pool(model, "default")
    chosen = masks_of(pool)["0.weight"]
    smallest = dense[0].weight[chosen].abs().min()
    assert (dense[0].weight[~chosen].abs() <= smallest).all()
    model(x).sum().backward()
    dense(x).sum().backward()
    assert torch.equal(pool.values.grad, dense[0].weight.grad.flatten()[pool.slots])


def test_merging_keeps_external_adapters_as_plain_modules_and_says_so():
    bare = upernet().eval()
    config = SFAConfig(
        budget=0.2, score="random", init_weights=False, modules_to_save=["decode_head"]
    )
    model = get_peft_model(bare, config).eval()
    batch = images()["pixel_values"]
    expected = model(batch).logits
    with pytest.warns(UserWarning, match="stay in the merged model as plain modules"):
        merged = model.merge_and_unload()
    assert not any(isinstance(m, SFALayer) for m in merged.modules())
    assert torch.equal(merged(batch).logits, expected)


def test_unloading_gives_the_bare_model_back_to_the_bit():
    config = SFAConfig(
        budget=0.2, score="random", init_weights=False, modules_to_save=["decode_head"]
    )
    model = get_peft_model(upernet().eval(), config).eval()
    batch = images()["pixel_values"]
    model(batch)
    bare = model.unload()
    assert torch.equal(bare(batch).logits, upernet().eval()(batch).logits)
    assert set(bare.state_dict()) == set(upernet().state_dict())
