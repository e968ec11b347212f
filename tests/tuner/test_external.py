# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sfa_peft import MergeWarning, SFAConfig, SFASelector, TargetError, budget_report
from sfa_peft.budget import External
from sfa_peft.tuner.external import apply_bottleneck, make_projections
from sfa_peft.tuner.feature_map import FeatureMap, Place
from tests.slow_mona import branch
from tests.tiny import images, upernet
from tests.whole_life import adapters

CONFIG = {"budget": 0.3, "external_type": "mona", "modules_to_save": ["decode_head"]}


def scattered(*modules: nn.Module) -> None:
    """Give all parameters random values, so that none of them goes unnoticed."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))


def by_name(down: Any, up: Any) -> Any:
    """Return an adapter's parts by the names of the reference; biases it lacks are zero."""

    def pair(module: Any, name: str = "") -> Any:
        weight, bias = (getattr(module, f"{name}{kind}") for kind in ("weight", "bias"))
        return SimpleNamespace(
            weight=weight, bias=weight.new_zeros(len(weight)) if bias is None else bias
        )

    def linear(module: Any) -> Any:
        part = pair(module)
        return lambda x: x @ part.weight.flatten(1).T + part.bias

    return SimpleNamespace(
        norm=pair(down, "norm_"),
        norm_scale=down.norm_scale,
        input_scale=down.input_scale,
        depthwise=[pair(down, f"depthwise_{k}_") for k in (3, 5, 7)],
        mix=pair(down, "mix_"),
        down=linear(down),
        up=linear(up),
    )


def heard(height: int, width: int, leading: int = 0) -> FeatureMap:
    """Return a feature map that was told a size."""
    found = FeatureMap(Place(None, leading=leading))
    found.names, found.sizes = [], {leading + height * width: (height, width)}
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [0, 2])
def test_an_adapter_with_convolutions_equals_the_slow_one(bias: bool, leading: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 10)
    down, up = make_projections(
        layer, 4, bias=bias, neutral=False, kind="mona", feature_map=heard(5, 9, leading)
    )
    scattered(down, up)
    x = torch.randn(2, leading + 45, 10)

    torch.testing.assert_close(
        apply_bottleneck(x, down, up),
        x + branch(by_name(down, up), x, (5, 9), leading),
        atol=1e-4,
        rtol=1e-4,
    )


def test_what_puts_out_maps_needs_no_size() -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(3, 10), nn.Conv2d(3, 10, 1)):
        down, up = make_projections(layer, 4, bias=True, neutral=False, kind="mona")
        scattered(down, up)
        x = torch.randn(2, 5, 9, 10)
        wanted = (x.flatten(1, 2) + branch(by_name(down, up), x.flatten(1, 2), (5, 9))).view_as(x)
        if isinstance(layer, nn.Conv2d):
            out = apply_bottleneck(x.permute(0, 3, 1, 2), down, up).permute(0, 2, 3, 1)
        else:
            out = apply_bottleneck(x, down, up)

        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bottleneck", "mona"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_budget_counts_what_an_adapter_has(kind: str, bias: bool) -> None:
    for layer in (nn.Linear(3, 10), nn.Conv2d(3, 10, 1)):
        for width in (1, 4, 10):
            parts = make_projections(layer, width, bias=bias, neutral=True, kind=kind)
            found = sum(p.numel() for part in parts for p in part.parameters())
            assert External({"layer": 10}, bias, kind).parameters(width) == found


def trained(size: int = 32) -> tuple[Any, Tensor]:
    """Return a model whose adapters have been trained for some steps, and images."""
    model = get_peft_model(upernet(), SFAConfig(**CONFIG, selection_steps=1))
    selector = SFASelector(model, total_steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        model(**images(size=size, seed=step)).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return model.eval(), images(size=size)["pixel_values"]


def test_a_trained_adapter_with_convolutions_comes_back_to_the_bit(tmp_path) -> None:
    bare, pixels = upernet().eval(), images()["pixel_values"]
    fresh = get_peft_model(upernet(), SFAConfig(**CONFIG)).eval()
    with torch.no_grad():
        assert torch.equal(fresh(pixels).logits, bare(pixels).logits)

    model, pixels = trained()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(upernet(), tmp_path, adapter_name="other").eval()

    assert budget_report(model).external > 0
    assert all(any(p.any() for p in layer.sfa_up.parameters()) for layer in adapters(model))
    with torch.no_grad():
        wanted = model(pixels).logits
        assert not torch.allclose(wanted, bare(pixels).logits, atol=1e-3)
        twin = copy.deepcopy(model)
        with pytest.warns(MergeWarning):
            merged = model.merge_and_unload()
        for other in (loaded, twin, merged):
            assert torch.equal(other(pixels).logits, wanted)


def test_checkpointed_blocks_compute_again_with_the_maps_of_their_own_images() -> None:
    model, gradients = trained()[0].train(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.model.backbone.gradient_checkpointing_enable()
        model.zero_grad()
        losses = [model(**images(size=size)).loss for size in (64, 32)]
        sum(losses).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["bottleneck", "mona"])
def test_an_adapter_behind_the_norm_that_ends_a_sub_layer_sees_the_whole_map(
    kind, tmp_path
) -> None:
    torch.manual_seed(0)
    norms = ["layernorm_before", "layernorm_after"]
    options = {**CONFIG, "rho": 1.0, "external_modules": norms, "external_type": kind}
    model = get_peft_model(upernet(window_size=2), SFAConfig(**options)).eval()
    assert {m.name.rpartition(".")[2] for m in adapters(model)} == set(norms)
    scattered(*(part for m in adapters(model) for part in (m.sfa_down, m.sfa_up)))
    seen: list[Any] = []
    for layer in adapters(model):
        layer.base_layer.register_forward_hook(lambda _m, _a, out, at=layer: seen.append((at, out)))
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
    pixels = torch.randn(1, 3, 32, 64)

    with torch.no_grad():
        logits = model(pixels).logits
        for (layer, plain), out in zip(seen[::2], seen[1::2], strict=True):
            down, up = layer.sfa_down["default"], layer.sfa_up["default"]
            if kind == "mona":
                stage = int(layer.name.split(".layers.")[1][0])
                added = branch(by_name(down, up), plain, (8 >> stage, 16 >> stage))
            else:
                added = up(torch.relu(down(plain)))
            torch.testing.assert_close(out, plain + added, atol=1e-3, rtol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(upernet(window_size=2), tmp_path).eval()
        assert torch.equal(loaded(pixels).logits, logits)


def test_a_norm_is_no_place_to_select_whole_layers_from() -> None:
    with pytest.raises(TargetError, match="is a LayerNorm; only"):
        get_peft_model(upernet(), SFAConfig(**CONFIG, target_modules=["layernorm_after"]))
