# SPDX-License-Identifier: Apache-2.0
"""Models without a known backbone: timm's names, and what the error for the others says."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sfa_peft import SFAConfig, TargetError, budget_report
from sfa_peft.backbones import suggest_targets
from sfa_peft.tuner import SFALayer
from tests.model_zoo import pixels
from tests.timm_like import SwinTransformer, VisionTransformer
from tests.whole_life import adapters, evaluate, fresh, live_through

#: The one expression that the documentation gives for timm.
TIMM = r".*\d+\.(attn\.(qkv|q|kv|proj)|mlp\.fc[12])"
MODELS = {
    "vit": (VisionTransformer, 2),
    "swin": (SwinTransformer, 3),
    "swin features": (partial(SwinTransformer, flat=True), 3),
    "pvt_v2": (partial(SwinTransformer, split=True), 3),
}


def refusal(model: nn.Module, **options) -> str:
    with pytest.raises(TargetError) as error:
        get_peft_model(model, SFAConfig(**options))
    return str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_a_timm_model_lives_through_target_modules(name, tmp_path):
    build, _ = MODELS[name]
    live_through(build, {"pixel_values": pixels(name)}, tmp_path, target_modules=TIMM)


@pytest.mark.parametrize("name", MODELS)
def test_each_block_of_a_timm_model_has_its_adapters_and_nothing_else_is_adapted(name):
    build, blocks = MODELS[name]
    config = SFAConfig(budget=0.3, target_modules=TIMM, modules_to_save=["head"])
    model = get_peft_model(fresh(build), config).eval()
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    assert len(layers) == blocks * (5 if name == "pvt_v2" else 4)
    assert all(type(layer.get_base_layer()) is nn.Linear for layer in layers)
    calls: list[str] = []
    for layer in adapters(model):
        layer.sfa_up["default"].register_forward_hook(
            lambda *_, layer=layer: calls.append(layer.name.rpartition(".")[2])
        )
    evaluate(model, {"pixel_values": pixels(name)})
    assert calls == ["proj", "fc2"] * blocks
    head = sum(p.numel() for n, p in fresh(build).named_parameters() if n.startswith("head"))
    total = sum(p.numel() for p in fresh(build).parameters()) - head
    assert budget_report(model).backbone == total


@pytest.mark.parametrize("name", MODELS)
def test_the_error_for_a_timm_model_gives_an_expression_that_works(name):
    build, _ = MODELS[name]
    suggested = re.search(r'try target_modules=r"(.*?)"\.', refusal(build()))
    assert suggested is not None
    assert suggested[1] == suggest_targets(build())

    def targeted(pattern: str) -> list[str]:
        model = get_peft_model(build(), SFAConfig(budget=0.3, target_modules=pattern))
        return [m.name for m in model.modules() if isinstance(m, SFALayer)]

    assert targeted(suggested[1]) == targeted(TIMM)


class TorchvisionBlock(nn.Module):
    """The names of torchvision's ViT: packed attention and an MLP that is a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(8)
        self.self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(*[self.ln_1(x)] * 3, need_weights=False)[0]
        return x + self.mlp(x)


def torchvision_like() -> nn.Module:
    return nn.Sequential(TorchvisionBlock(), TorchvisionBlock())


def test_the_error_for_other_models_lists_their_linear_layers_and_both_options():
    assert suggest_targets(torchvision_like()) is None
    message = refusal(torchvision_like())
    assert "target_modules" in message
    assert "external_modules" in message
    assert "Its linear layers: 0.mlp.0, 0.mlp.3, 1.mlp.0, 1.mlp.3." in message
    message = refusal(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))))
    assert "Its linear layers: 0, 1, 2, 3, 4, 5, 6, 7, ..." in message
    assert "Its linear layers" not in refusal(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_packed_attention_is_refused_with_the_reason():
    message = refusal(torchvision_like(), target_modules=["out_proj", "mlp.0"])
    assert "`0.self_attention.out_proj` belongs to a torch.nn.MultiheadAttention" in message


def test_a_model_of_other_names_lives_with_both_options(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torchvision_like()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.blocks(tokens)

    batch = {"tokens": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    live_through(
        Net, batch, tmp_path, target_modules=["mlp.0", "mlp.3"], external_modules=["mlp.3"]
    )
