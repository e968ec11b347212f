# SPDX-License-Identifier: Apache-2.0
"""EoMT: a ViT whose head stands beside its blocks, for DINOv2 and, where there is one, DINOv3."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig, SFASelector, budget_report, find_backbone, head_modules
from sfa_peft.dense import ClassMaps, EomtForSemanticSegmentation
from sfa_peft.tasks import TaskBank
from tests.whole_life import adapters, assert_same_bits, evaluate

SIZE, CLASSES, STEPS = 32, 3, 3
SIZES = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_blocks": 1,
    "num_upscale_blocks": 1,
    "num_queries": 4,
    "num_labels": CLASSES,
}
HEAD = ["query", "upscale_block", "mask_head", "class_predictor"]


def on_dinov2():
    return EomtForSemanticSegmentation(transformers.EomtConfig(mlp_ratio=2, **SIZES))


def on_dinov3():
    if not hasattr(transformers, "EomtDinov3Config"):
        pytest.skip("transformers 4 has no EoMT on DINOv3")

    class Eomt(ClassMaps, transformers.EomtDinov3ForUniversalSegmentation):
        pass

    return Eomt(transformers.EomtDinov3Config(intermediate_size=32, **SIZES))


@pytest.fixture(params=[on_dinov2, on_dinov3])
def build(request):
    def fresh():
        torch.manual_seed(0)
        return request.param()

    return fresh


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(CLASSES, (2, SIZE, SIZE), generator=generator),
    }


def trained(build, batch, seed=0):
    """Return an EoMT whose adapter and head have been trained for a few steps with picks."""
    config = SFAConfig(budget=0.2, selection_steps=1, modules_to_save="auto")
    model = get_peft_model(build(), config).train()
    selector = SFASelector(model, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(seed)  # of points that the loss is computed at
    losses = []
    for _ in range(STEPS):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    assert all(loss.isfinite() for loss in losses)
    assert selector.selected == budget_report(model).internal > 0
    return model.requires_grad_(False)  # with gradients torch multiplies in another order


def test_the_budget_is_of_the_vit_and_auto_trains_the_head(build):
    model = build()
    backbone = find_backbone(model)
    assert (backbone.name, list(backbone.heads)) == ("", HEAD)
    assert head_modules(model) == HEAD
    vit = sum(p.numel() for n, p in model.named_parameters() if n.partition(".")[0] not in HEAD)
    tuned = get_peft_model(model, SFAConfig(budget=0.2, modules_to_save="auto"))
    assert budget_report(tuned).backbone == vit
    assert len(adapters(tuned)) == 2 * SIZES["num_hidden_layers"]
    whole = {n for n, p in tuned.named_parameters() if p.requires_grad and ".sfa_" not in n}
    assert {name.split(".")[2] for name in whole} == set(HEAD)


def test_an_eomt_trains_on_class_maps_and_loads_with_the_same_bits(build, batch, tmp_path):
    model = trained(build, batch)
    images = {"pixel_values": batch["pixel_values"]}
    expected = evaluate(model, images)
    maps = model(**images).logits
    assert maps.shape == (2, CLASSES, SIZE, SIZE)
    model.save_pretrained(tmp_path)
    assert_same_bits(evaluate(PeftModel.from_pretrained(build(), tmp_path), images), expected)


def test_two_eomts_share_one_vit_and_keep_their_queries(build, batch, tmp_path):
    images, expected = {"pixel_values": batch["pixel_values"]}, {}
    for seed, name in enumerate(("first", "second")):
        model = trained(build, batch, seed)
        expected[name] = evaluate(model, images)
        model.save_pretrained(tmp_path / name)
    bank = TaskBank(build())
    for name in expected:
        bank.add(name, tmp_path / name, build())
    for name in ("first", "second", "first"):
        assert_same_bits(evaluate(bank[name].model, images), expected[name])
    first, second = (bank[name].model.get_base_model() for name in expected)
    assert first.layers is second.layers is bank.backbone.layers
    assert first.query is not second.query
