# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sfa_peft import MergeWarning, SFAConfig, SFAError, TargetError
from sfa_peft.tuner.feature_map import FeatureMap
from tests.model_zoo import FAMILIES, pixels
from tests.slow_mona import branch
from tests.tuner.test_external import by_name, scattered
from tests.whole_life import adapters, fresh

#: Of them nobody says how tokens lie in the image, or they are not all there, or not in order.
UNKNOWN = {"dpt", "eomt", "hiera", "pvt", "videomae", "vit_mae", "yolos"}


def adapted(family: str, **options: Any) -> nn.Module:
    config = SFAConfig(budget=0.9, rho=1.0, external_type="mona", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(fresh(FAMILIES[family]), config).eval()


def hooks(model: nn.Module) -> int:
    owners = [
        getattr(h, "__self__", None) for m in model.modules() for h in m._forward_pre_hooks.values()
    ]
    return sum(isinstance(owner, FeatureMap) for owner in owners)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_known_or_refused_before_anything_changes(family: str) -> None:
    if family in UNKNOWN:
        model = fresh(FAMILIES[family])
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(TargetError, match=f"tokens of {family} lie .* is not known. Use"):
            get_peft_model(model, SFAConfig(budget=0.9, rho=1.0, external_type="mona"))
        assert [name for name, _ in model.named_modules()] == names
        return
    with torch.no_grad():
        adapted(family)(pixel_values=pixels(family))


#: Height and width of the map that a layer's tokens should be, and how many tokens come before.
SHAPES = {
    "swinv2": lambda layer, tokens: (
        (math.isqrt(tokens),) * 2
        if layer.role == "attn_out"
        else (8 >> layer.stage, 16 >> layer.stage),
        0,
    ),
    "segformer": lambda layer, _: ((8 >> layer.stage, 16 >> layer.stage), 0),
    "vit": lambda *_: ((4, 8), 1),
    "deit": lambda *_: ((4, 8), 2),
    "dinov2_with_registers": lambda *_: ((4, 8), 5),
}


@pytest.mark.parametrize("family", SHAPES)
def test_adapters_see_the_map_of_images_that_are_not_square(family: str) -> None:
    torch.manual_seed(0)
    model, seen = adapted(family), []
    scattered(*(part for m in adapters(model) for part in (m.sfa_down, m.sfa_up)))
    for layer in adapters(model):
        layer.base_layer.register_forward_hook(lambda _m, _a, out, at=layer: seen.append((at, out)))
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
    options = {"interpolate_pos_encoding": True} if family in ("vit", "deit") else {}
    with torch.no_grad():
        model(pixel_values=torch.randn(1, 3, 32, 64), **options)

        for (layer, plain), out in zip(seen[::2], seen[1::2], strict=True):
            size, leading = SHAPES[family](layer, plain.shape[1])
            part = by_name(layer.sfa_down["default"], layer.sfa_up["default"])
            wanted = plain + branch(part, plain, size, leading)
            torch.testing.assert_close(out, wanted, atol=1e-3, rtol=1e-3)


def test_hooks_go_with_the_last_adapter_that_asks() -> None:
    for family, places in (("swinv2", 5), ("vit", 1)):
        model = adapted(family)
        more = SFAConfig(budget=0.9, rho=1.0, external_type="mona")
        model.add_adapter("other", more)
        assert hooks(model) == places
        model.delete_adapter("default")
        assert hooks(model) == places
        model.set_adapter("other")
        with pytest.warns(MergeWarning):
            merged = model.merge_and_unload()
        assert hooks(merged) == places
        with torch.no_grad():
            merged(pixel_values=pixels(family))

        model = adapted(family)
        assert hooks(model.unload()) == 0


def test_tokens_that_make_up_no_map_are_an_error() -> None:
    model = adapted("vit")
    layer = adapters(model)[0]
    with pytest.raises(SFAError, match=r"9 tokens, expected those of no images yet and 1 before"):
        layer(torch.randn(1, 9, layer.in_features))
    with torch.no_grad():
        model(pixel_values=pixels("vit"))
    with pytest.raises(SFAError, match=r"9 tokens, expected those of \[\(4, 4\)\] and 1 before"):
        layer(torch.randn(1, 9, layer.in_features))
    window = next(m for m in adapters(adapted("swinv2")) if m.role == "attn_out")
    with pytest.raises(SFAError, match=r"15 tokens, expected those of a square window"):
        window(torch.randn(1, 15, window.in_features))
    with pytest.raises(SFAError, match=r"nobody says"):
        FeatureMap.find(None, 9)
