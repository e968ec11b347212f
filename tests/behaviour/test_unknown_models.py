# SPDX-License-Identifier: Apache-2.0
"""Models without a known config: what is found by names, and what the error for the others says."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sfa_peft import (
    FrozenHeadWarning,
    SFAConfig,
    SFAError,
    TargetError,
    budget_report,
    head_modules,
    parameter_groups,
)
from sfa_peft.tasks import TaskBank
from sfa_peft.tuner import SFALayer
from tests.model_zoo import pixels
from tests.timm_like import Block, SwinTransformer, VisionTransformer
from tests.whole_life import adapters, assert_same_bits, evaluate, fresh, live_through, train

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
def test_a_timm_model_lives_without_being_told_its_layers(name, tmp_path):
    live_through(MODELS[name][0], {"pixel_values": pixels(name)}, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_each_block_of_a_timm_model_has_its_adapters_and_nothing_else_is_adapted(name):
    build, blocks = MODELS[name]
    model = get_peft_model(fresh(build), SFAConfig(budget=0.3, modules_to_save="auto")).eval()
    assert model.peft_config["default"].modules_to_save == ["head"]
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
    stages = [layer.stage for layer in layers]
    assert sorted(set(stages)) == ([0] if name == "vit" else [0, 1])
    assert [layer.block for layer in adapters(model)] == [b for b in range(blocks) for _ in "ab"]


class Segmenter(nn.Module):
    """An encoder with its classifier, which is not used, below a decoder with blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = VisionTransformer(), nn.Sequential(Block(3), Block(3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(pixel_values)[:, None])


def test_the_budget_of_an_encoder_leaves_out_its_decoder_and_the_classifier_that_came_with_it():
    encoder = dict(VisionTransformer().named_parameters())
    expected = sum(p.numel() for n, p in encoder.items() if not n.startswith("head"))
    with pytest.warns(FrozenHeadWarning, match=r"\(in decoder\)"):
        model = get_peft_model(Segmenter(), SFAConfig(budget=0.3))
    assert budget_report(model).backbone == expected
    assert all(layer.name.startswith("encoder.blocks.") for layer in adapters(model))
    assert head_modules(Segmenter()) == ["decoder"]


def test_a_forgotten_classifier_is_warned_of():
    with pytest.warns(FrozenHeadWarning, match=r"2 tensors .* \(in head\)"):
        get_peft_model(VisionTransformer(), SFAConfig(budget=0.3))


def test_the_classifier_of_a_timm_model_has_the_rate_of_a_head():
    model = VisionTransformer()
    named = dict(model.named_parameters())
    groups = parameter_groups(model, 1.0, layer_decay=0.5, head_lr=3.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(named["head.weight"])] == 3.0
    assert rates[id(named["norm.weight"])] == 1.0
    assert rates[id(named["blocks.1.mlp.fc2.weight"])] == 0.5
    assert rates[id(named["blocks.0.attn.qkv.weight"])] == 0.25
    assert rates[id(named["patch_embed.proj.weight"])] == 0.125


def test_tasks_share_a_timm_model_but_for_its_classifier(tmp_path):
    batch = {"pixel_values": pixels("vit")}
    expected = {}
    for seed, name in enumerate(("first", "second")):
        model = get_peft_model(fresh(VisionTransformer), SFAConfig(modules_to_save="auto"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for copied, parameter in model.named_parameters():
                if "modules_to_save" in copied:
                    parameter.normal_()
        train(model, batch)
        expected[name] = evaluate(model, batch)
        model.save_pretrained(tmp_path / name)
    bank = TaskBank(fresh(VisionTransformer))
    for name in expected:
        bank.add(name, tmp_path / name, fresh(VisionTransformer))
    for name in ("first", "second", "first"):
        assert_same_bits(evaluate(bank[name].model, batch), expected[name])
    models = [bank[name].model.get_base_model() for name in expected]
    assert all(model.blocks is bank.backbone.blocks for model in models)
    moved = fresh(VisionTransformer)
    moved.register_parameter("pos_embed", nn.Parameter(torch.zeros(1)))
    with pytest.raises(SFAError, match=r"`pos_embed`: the bank's has not"):
        bank.add("third", tmp_path / "first", moved)


def doubled() -> nn.Module:
    return nn.ModuleDict({"left": VisionTransformer(), "right": SwinTransformer()})


def test_the_error_for_two_encoders_gives_an_expression_for_each_that_works():
    message = refusal(doubled())
    assert "which of them read the image is not clear" in message
    suggested = re.findall(r'target_modules=r"(.*?)"', message)
    taken = []
    for pattern in suggested:
        model = get_peft_model(doubled(), SFAConfig(budget=0.3, target_modules=pattern))
        taken.append([layer.name.partition(".")[0] for layer in adapters(model)])
    assert taken == [["left"] * 4, ["right"] * 6]


def test_the_error_says_which_layers_of_a_block_are_known():
    model = VisionTransformer()
    model.blocks[1].mlp = nn.Identity()
    message = refusal(model)
    assert "some of `blocks.#` lack a linear layer of a known name" in message
    assert "(found: attn.proj, attn.qkv, mlp.fc1, mlp.fc2)" in message


def test_the_error_for_blocks_that_read_no_image_says_so():
    message = refusal(nn.Sequential(nn.Embedding(4, 8), Block(8)))
    assert "no convolution of an image comes before them" in message
    assert r'`#` (1): target_modules=r"\d+\.(attn\.proj|' in message


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
