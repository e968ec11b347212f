# SPDX-License-Identifier: Apache-2.0
"""Blocks by the names in them: roles, stages, and which of a model's blocks read the image."""

from __future__ import annotations

import re

import pytest
from torch import nn

from sfa_peft.blocks import ROLES, find_rows, image_encoder, is_linear, role_of, stage_of
from tests.timm_like import Block, SwinTransformer, VisionTransformer


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("blocks.3.attn.qkv", "attn_in"),
        ("blocks.3.attn.proj", "attn_out"),
        ("blocks.3.mlp.fc1", "mlp_in"),
        ("blocks.3.mlp.fc2", "mlp_out"),
        ("layers.2.blocks.17.attn.proj", "attn_out"),
        ("vit.encoder.layer.0.attention.attention.query", "attn_in"),
        ("vit.encoder.layer.0.attention.output.dense", "attn_out"),
        ("vit.encoder.layer.0.output.dense", "mlp_out"),
        ("encoder.layer.1.mlp.weights_in", "mlp_in"),
        ("encoder.layer.1.mlp.weights_out", "mlp_out"),
        ("blocks.3.attn.qkv.base_layer", None),
        ("blocks.3.attn", None),
        ("block2.0.attn.kv", "attn_in"),
        ("blocks.3.attn.q_norm", None),
        ("blocks.3.attn.rel_pos.mlp.fc1", None),
        ("layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0", None),
        ("layers.0.downsample.reduction", None),
        ("vision_model.head.mlp.fc1", None),
        ("attention.output.dense", None),
        ("pooler.dense", None),
        ("", None),
    ],
)
def test_a_path_has_the_role_its_last_parts_spell(path: str, role: str | None) -> None:
    assert role_of(path) == role
    assert role is None or role in ROLES


@pytest.mark.parametrize(
    ("block", "stage"),
    [
        ("blocks.3", 0),
        ("layers.2.blocks.17", 2),
        ("layers_2.blocks.17", 2),
        ("encoder.model.stages_3.blocks.0", 3),
        ("stages.3.blocks.2.1", 3),
        ("blocks.3.2", 3),
        ("encoder.block1.0", 0),
        ("encoder.block4.2", 3),
        ("7.swinv2.encoder.layers.2.blocks.1", 2),
    ],
)
def test_a_stage_is_counted_from_0_whatever_the_package_calls_it(block, stage):
    assert stage_of(f"{block}.attn.proj") == stage
    assert stage_of(block) is None


def test_a_convolution_of_size_1_is_a_linear_layer_of_pixels():
    assert is_linear(nn.Conv2d(4, 4, 1))
    assert not any(map(is_linear, (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.ReLU())))


def net(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


def blocks(count: int = 2) -> nn.Module:
    return nn.Sequential(*(Block(8) for _ in range(count)))


def decoder(channels: int = 16) -> nn.Module:
    return net(neck=nn.Conv2d(channels, 8, 1), layers=blocks())


def without(model: nn.Module, *paths: str) -> nn.Module:
    for path in paths:
        model.set_submodule(path, nn.Identity())
    return model


SEEN = {
    "the model": (VisionTransformer(), ("blocks.#", "")),
    "stages": (SwinTransformer(), ("layers.#.blocks.#", "")),
    "flat stages": (SwinTransformer(flat=True), ("layers_#.blocks.#", "")),
    "below a decoder": (
        net(encoder=net(model=SwinTransformer(flat=True)), decoder=blocks()),
        ("encoder.model.layers_#.blocks.#", "encoder.model"),
    ),
    "beside text": (
        net(text=net(words=nn.Embedding(4, 8), layers=blocks()), image=VisionTransformer()),
        ("image.blocks.#", "image"),
    ),
    "below a decoder with convolutions": (
        net(encoder=VisionTransformer(), decoder=decoder()),
        ("encoder.blocks.#", "encoder"),
    ),
    "of twelve channels": (
        net(embed=nn.Conv2d(12, 8, 4), stages=nn.ModuleList([blocks(), blocks()])),
        ("stages.#.#", ""),
    ),
    "without attention": (
        without(VisionTransformer(), "blocks.0.attn", "blocks.1.attn"),
        ("blocks.#", ""),
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_the_blocks_behind_the_image_are_found(name):
    model, expected = SEEN[name]
    row = image_encoder(model)
    assert row is not None
    assert (row.name, row.root) == expected
    assert all(model.get_submodule(block) for block in row.blocks)


UNCLEAR = {
    "two encoders": net(left=VisionTransformer(), right=VisionTransformer()),
    "encoder and decoder under one roof": net(
        patch_embed=nn.Conv2d(3, 8, 4), blocks=blocks(), decoder_blocks=blocks()
    ),
    "no image": net(words=nn.Embedding(4, 8), layers=blocks()),
    "a missing layer": without(VisionTransformer(), "blocks.1.mlp.fc2"),
    "attention of another name": without(
        nn.Sequential(nn.Conv2d(3, 8, 4), *blocks()), "1.attn.proj", "1.attn.qkv"
    ),
    "no blocks": nn.Conv2d(3, 8, 4),
}
UNCLEAR["attention of another name"].get_submodule("1.attn").mixes = nn.Linear(8, 8)


@pytest.mark.parametrize("name", UNCLEAR)
def test_where_it_is_not_clear_which_blocks_read_the_image_none_is_chosen(name):
    assert image_encoder(UNCLEAR[name]) is None


@pytest.mark.parametrize("model", [SwinTransformer(flat=True), UNCLEAR["two encoders"]])
def test_the_expression_of_a_row_takes_its_role_linears_and_nothing_else(model):
    for row in find_rows(model):
        taken = [n for n, _ in model.named_modules() if re.fullmatch(row.expression, n)]
        wanted = [n for n, _ in model.named_modules() if role_of(n)]
        assert taken == [n for n in wanted if n.startswith(row.name.partition("#")[0])]
