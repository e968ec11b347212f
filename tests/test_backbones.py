# SPDX-License-Identifier: Apache-2.0
"""Backbones and role linears are found in every supported family, whatever surrounds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from sfa_peft.backbones import (
    SUPPORTED_MODEL_TYPES,
    Backbone,
    RoleModule,
    describe_model,
    find_backbone,
    role_modules,
)
from sfa_peft.blocks import role_of
from tests.head_zoo import HEADS
from tests.model_zoo import (
    CONVNEXT,
    FAMILIES,
    PLAIN,
    STAGE_DEPTHS,
    SWIN,
    TEXT,
    depths,
    pixels,
    tiny,
)


def roles_of(model: nn.Module) -> tuple[Backbone, list[RoleModule]]:
    backbone = find_backbone(model)
    assert backbone is not None
    return backbone, role_modules(backbone)


def facts(modules: list[RoleModule]) -> list[tuple[str, int, int]]:
    return [(m.role, m.block, m.stage) for m in modules]


class Wrapped(nn.Module):
    """A tuner layer reduced to what matters here: a base layer beside linears of its own."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mlp = nn.ModuleDict({"fc2": nn.Linear(2, 2)})


def wrap(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Wrapped(model.get_submodule(name)))


# --- every family ---------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_zoo_covers_every_supported_model_type() -> None:
    assert {name.split()[0] for name in FAMILIES} == SUPPORTED_MODEL_TYPES


def test_each_block_has_one_output_linear_per_sub_layer(family: str) -> None:
    backbone, modules = roles_of(FAMILIES[family]())
    assert backbone.model_type == family.split()[0]
    stages = [stage for stage, depth in enumerate(depths(family)) for _ in range(depth)]
    blocks = list(enumerate(stages))
    assert [(m.block, m.stage) for m in modules if m.role == "mlp_out"] == blocks
    attention = [] if "convnext" in family else blocks
    assert [(m.block, m.stage) for m in modules if m.role == "attn_out"] == attention
    for role, expected in (("mlp_in", blocks), ("attn_in", attention)):
        assert {(m.block, m.stage) for m in modules if m.role == role} == set(expected)


def test_role_names_are_linears_inside_the_backbone_in_module_order(family: str) -> None:
    model = FAMILIES[family]()
    backbone, modules = roles_of(model)
    assert model.get_submodule(backbone.name) is backbone.module
    names = [m.name for m in modules]
    assert names == [name for name, _ in model.named_modules() if name in set(names)]
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    prefix = f"{backbone.name}." if backbone.name else ""
    assert all(name.startswith(prefix) for name in names)


def test_role_of_a_full_path_agrees_with_the_search(family: str) -> None:
    model = FAMILIES[family]()
    _, modules = roles_of(model)
    assert all(role_of(m.name) == m.role for m in modules)


def test_output_linears_run_in_the_order_of_their_ordinals(family: str) -> None:
    model = FAMILIES[family]().eval()
    backbone, modules = roles_of(model)
    calls: list[tuple[int, str] | str] = []
    backbone.module.register_forward_pre_hook(lambda *_: calls.append("backbone"))
    for m in modules:
        if m.role.endswith("_out"):

            def note(_: nn.Module, __: object, output: object, m: RoleModule = m) -> None:
                assert isinstance(output, torch.Tensor)
                calls.append((m.block, m.role))

            model.get_submodule(m.name).register_forward_hook(note)
    with torch.no_grad():
        model(pixels(family))
    kinds = ["mlp_out"] if "convnext" in family else ["attn_out", "mlp_out"]
    blocks = range(sum(depths(family)))
    assert calls == ["backbone", *((block, kind) for block in blocks for kind in kinds)]


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_the_backbone_of_a_task_model_is_found_and_its_head_left_alone(head: str) -> None:
    path, build = HEADS[head]
    backbone, modules = roles_of(build())
    assert backbone.name.replace("conv_encoder.", "") == path
    assert all(m.name.startswith(f"{backbone.name}.") for m in modules)
    counts = Counter(m.role for m in modules)
    assert (
        counts["attn_out"] == counts["mlp_out"] in (sum(STAGE_DEPTHS), PLAIN["num_hidden_layers"])
    )


@pytest.mark.parametrize("head", ["mask2former", "sam", "vit_mae"])
def test_a_decoder_that_looks_like_a_backbone_is_left_alone(head: str) -> None:
    # The table would match there, so only the scope keeps it out.
    path, build = HEADS[head]
    outside = [name for name, _ in build().named_modules() if not name.startswith(f"{path}.")]
    assert any(role_of(name) for name in outside)


@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        ("Swinv2Model", "Swinv2Config", SWIN),
        ("Swinv2Backbone", "Swinv2Config", SWIN),
        ("ViTModel", "ViTConfig", PLAIN),
        ("Dinov2Backbone", "Dinov2Config", PLAIN),
        ("PvtModel", "PvtConfig", {"hidden_sizes": [16, 16, 40, 64]}),
        ("ConvNextBackbone", "ConvNextConfig", CONVNEXT),
        ("CLIPVisionModel", "CLIPVisionConfig", PLAIN),
    ],
)
def test_a_bare_backbone_is_its_own_backbone(model: str, config: str, options: dict) -> None:
    # Its encoder and its embeddings share its config, in some releases even its base class.
    bare = tiny(model, config, **options)()
    backbone, _ = roles_of(bare)
    assert (backbone.name, backbone.module) == ("", bare)


def test_swinv2_blocks_count_through_its_stages() -> None:
    _, modules = roles_of(FAMILIES["swinv2"]())
    per_block = ["attn_in"] * 3 + ["attn_out", "mlp_in", "mlp_out"]
    ordinals = [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3)]
    assert facts(modules) == [(role, *ordinal) for ordinal in ordinals for role in per_block]
    assert modules[23].name == "swinv2.encoder.layers.2.blocks.1.output.dense"


def test_the_pooling_head_of_siglip_has_no_roles() -> None:
    model = FAMILIES["siglip_vision_model"]()
    _, modules = roles_of(model)
    assert any(name.endswith("head.mlp.fc1") for name, _ in model.named_modules())
    assert not any("head." in m.name for m in modules)


def test_a_backbone_in_a_plain_container_is_found_behind_another_model() -> None:
    text = tiny("BertModel", "BertConfig", vocab_size=8, **TEXT)
    model = nn.ModuleDict({"text": text(), "image": FAMILIES["vit"]()})
    assert roles_of(model)[0].name == "image.vit"


def test_the_first_of_two_backbones_is_taken() -> None:
    bare = [tiny("ViTModel", "ViTConfig", **PLAIN)(), FAMILIES["swinv2"]()]
    assert roles_of(nn.ModuleList(bare))[0].name == "0"
    assert roles_of(nn.ModuleList(reversed(bare)))[0].name == "0.swinv2"


@pytest.mark.parametrize("head", ["maskformer swin", "upernet swin"])
def test_a_backbone_that_holds_a_model_of_its_own_type_is_taken_whole(head: str) -> None:
    path, build = HEADS[head]
    for model, prefix in ((build(), ""), (nn.ModuleDict({"net": build()}), "net.")):
        assert roles_of(model)[0].name == prefix + path


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2),
        tiny("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4),
    ],
)
def test_a_model_without_a_supported_backbone_has_none(build) -> None:
    assert find_backbone(build()) is None


# --- tuners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["swinv2", "convnext", "yolos"])
def test_wrapping_every_role_linear_changes_nothing(name: str, times: int) -> None:
    model = FAMILIES[name]()
    _, before = roles_of(model)
    for _ in range(times):
        for m in before:
            wrap(model, m.name)
    assert roles_of(model)[1] == before


def test_a_wrapper_around_something_else_than_a_linear_has_no_role() -> None:
    model = FAMILIES["vit"]()
    _, before = roles_of(model)
    parent, _, child = before[-1].name.rpartition(".")
    setattr(model.get_submodule(parent), child, Wrapped(nn.Conv2d(1, 1, 3)))
    assert roles_of(model)[1] == before[:-1]


@pytest.mark.parametrize("name", ["swinv2", "vit", "maskformer-swin", "clip_vision_model"])
def test_a_peft_model_is_looked_through(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES[name]()
    backbone, before = roles_of(model)
    linears = [m.name for m in before]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=linears))
    for outer, prefix in ((wrapped, "base_model.model"), (wrapped.base_model, "model")):
        inner, after = roles_of(outer)
        assert inner.module is backbone.module
        assert [m.name for m in after] == [f"{prefix}.{linear}" for linear in linears]
        assert facts(after) == facts(before)


def test_a_block_that_peft_trains_as_a_copy_has_no_roles_but_keeps_its_ordinal() -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES["swinv2"]()
    _, before = roles_of(model)
    block = "swinv2.encoder.layers.1.blocks.0"
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["layers.1.blocks.0"])
    _, after = roles_of(peft.get_peft_model(model, config))
    kept = [m for m in before if not m.name.startswith(f"{block}.")]
    assert [m.name for m in after] == [f"base_model.model.{m.name}" for m in kept]
    assert facts(after) == facts(kept)


def test_a_backbone_that_peft_trains_as_a_copy_is_not_a_backbone() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["classifier"], modules_to_save=["swinv2"])
    assert find_backbone(peft.get_peft_model(FAMILIES["swinv2"](), config)) is None


def test_a_head_that_peft_trains_as_a_copy_is_left_alone() -> None:
    peft = pytest.importorskip("peft")
    path, build = HEADS["upernet"]
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["decode_head"])
    backbone, modules = roles_of(peft.get_peft_model(build(), config))
    assert backbone.name == f"base_model.model.{path}"
    assert len(modules) == 6 * sum(STAGE_DEPTHS)


# --- descriptions, types --------------------------------------------------------------------------


def test_a_description_names_each_part_with_its_type_and_layers() -> None:
    build = tiny(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=8,
        hidden_sizes=[8] * 4,
        depths=[1] * 4,
        layer_type="basic",
    )
    lines = describe_model(build()).split("; ")
    assert lines[0].startswith("the model: ResNetForImageClassification (model_type 'resnet'), ")
    assert lines[0].endswith(" Conv2d, 1 Linear")
    assert lines[1].startswith("resnet: ResNetModel (model_type 'resnet'), ")


def test_a_description_counts_a_wrapped_linear_once() -> None:
    model = nn.Sequential(Wrapped(nn.Linear(2, 2)), nn.ReLU())
    assert describe_model(model) == "the model: Sequential (no Transformers model), 1 Linear"
    assert describe_model(nn.Sequential(model, nn.Sequential(model))).endswith(" 1 Linear")
    assert describe_model(nn.ReLU()).endswith("no Linear or Conv2d")


def test_records_cannot_be_changed() -> None:
    backbone, modules = roles_of(FAMILIES["vit"]())
    for record in (backbone, modules[0]):
        with pytest.raises(FrozenInstanceError):
            record.name = "other"  # type: ignore[misc]


def test_stages_come_from_the_backbone_alone() -> None:
    # A number in the path to the backbone, here that of a list of models, is not a stage.
    backbone, modules = roles_of(nn.ModuleList([FAMILIES["dinov2 swiglu"]()]))
    assert backbone.name == "0"
    assert {m.stage for m in modules} == {0}
