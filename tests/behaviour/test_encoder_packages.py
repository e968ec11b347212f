# SPDX-License-Identifier: Apache-2.0
"""Encoders of timm and segmentation_models_pytorch, as the packages make them.

`make test-torchvision` has them installed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, TargetError, budget_report
from sfa_peft.tuner import SFALayer
from tests.encoder_zoo import lines, models
from tests.whole_life import adapters, live_through

timm = pytest.importorskip("timm")
smp = pytest.importorskip("segmentation_models_pytorch")
transformers = pytest.importorskip("transformers")

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
SIZE = 64
VIT = {"img_size": SIZE, "embed_dim": 32, "num_heads": 2}
SWIN = {"img_size": SIZE, "window_size": 2, "embed_dim": 16, "num_heads": (1, 1, 2, 2)}
SWIN["depths"] = (1, 1, 2, 1)
PVT = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 16, 32, 32)}
SEGMENTS = {"encoder_weights": None, "classes": 3}


def wrapper():
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=3, model_args={**VIT, "depth": 2}
    )
    return transformers.TimmWrapperForImageClassification(config)


def dpt():
    sizes = {"decoder_intermediate_channels": (8, 8, 8, 8), "decoder_fusion_channels": 8}
    return smp.DPT("tu-vit_tiny_patch16_224", **sizes, **SEGMENTS, **VIT)


def unet(encoder):
    sizes = {"decoder_channels": (16, 16, 16, 16, 16)}
    return smp.Unet(encoder, **sizes, **SEGMENTS, **SWIN)


def swinv2(**options):
    """Return one whose blocks act: timm starts the norm behind each sub-layer at 0."""
    model = timm.create_model("swinv2_tiny_window8_256", **options, **SWIN)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    return model


TINY = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, **VIT),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **SWIN),
    "swinv2": lambda: swinv2(num_classes=3),
    "swinv2, features": lambda: swinv2(features_only=True),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=3, **CONVNEXT),
    "wrapper": wrapper,
    "unet swin": lambda: unet("tu-swin_tiny_patch4_window7_224"),
    "dpt vit": dpt,
    "segformer pvt": lambda: smp.Segformer(
        "tu-pvt_v2_b0", decoder_segmentation_channels=16, **SEGMENTS, **PVT
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_a_model_of_another_package_lives_without_being_told_its_layers(name, tmp_path):
    build = TINY[name]
    key = "pixel_values" if name == "wrapper" else "x"
    generator = torch.Generator().manual_seed(0)
    live_through(build, {key: torch.randn(2, 3, SIZE, SIZE, generator=generator)}, tmp_path)


def test_the_budget_is_of_the_encoder_without_decoder_and_classifier():
    for name, encoder in (("unet swin", "encoder."), ("dpt vit", "encoder."), ("vit", "")):
        model = TINY[name]()
        counted = [
            p.numel()
            for n, p in model.named_parameters()
            if n.startswith(encoder) and not n.removeprefix("encoder.model.").startswith("head")
        ]
        tuned = get_peft_model(model, SFAConfig(budget=0.3, modules_to_save="auto"))
        assert budget_report(tuned).backbone == sum(counted)


def cait():
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("cait_xxs24_224", **sizes)


def test_an_expression_of_the_error_for_cait_works_and_that_of_the_page():
    model = cait()
    with pytest.raises(TargetError, match="which of them read the image is not clear") as error:
        get_peft_model(model, SFAConfig())
    pattern = str(error.value).partition('`blocks.#` (2): target_modules=r"')[2].partition('"')[0]
    tuned = get_peft_model(model, SFAConfig(budget=0.3, target_modules=pattern))
    assert len(adapters(tuned)) == 4
    pattern = re.search(r'target_modules=r"(blocks\(.*)",', DOCS.read_text("utf-8"))[1]
    tuned = get_peft_model(cait(), SFAConfig(budget=0.3, target_modules=pattern))
    assert len(adapters(tuned)) == 8
    assert len([m for m in tuned.modules() if isinstance(m, SFALayer)]) == 20


def test_the_page_shows_what_is_found_here():
    text = DOCS.read_text("utf-8")
    versions, _, tables = lines().partition("\n")
    if versions not in text:
        pytest.skip("the page was written with other versions")
    assert tables.strip() in text
    assert len(models()) > 50
