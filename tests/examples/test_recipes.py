# SPDX-License-Identifier: Apache-2.0
"""Every recipe is one that its script takes, and means what its comments say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Swinv2Backbone,
    Swinv2ForImageClassification,
    get_scheduler,
)

from sfa_peft import find_backbone, role_modules
from sfa_peft.budget import External, solve_budget
from tests.examples.common.peers.kit import paper_config
from tests.tiny import swinv2_config, upernet

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
VARIANTS = EXAMPLES / "recipes" / "variants"
BACKBONE = "microsoft/swinv2-{}-patch4-window12-192-22k"


def read(path: Path, *more: str) -> tuple[Any, Any]:
    """Return the script that a recipe names, and its arguments."""
    found = re.search(
        r"python examples/(\w+)\.py --recipe examples/recipes/(\S+)", path.read_text()
    )
    assert found is not None
    assert found[2] == path.name
    script = importlib.import_module(found[1])
    arguments = importlib.import_module("common.arguments")
    argv = ["--recipe", str(path), *more, "--dataset_name", "data"]
    return script, arguments.parse(script.Arguments, argv, "test")


def recipe(name: str) -> Any:
    return read(EXAMPLES / "recipes" / f"{name}.yaml")[1]


def rates(args: Any) -> Any:
    """Return the head's rate as a function of the update step, as Trainer makes it."""
    training = importlib.import_module("common.training")
    methods = importlib.import_module("common.methods")
    model = upernet()
    model.backbone.requires_grad_(False)
    ready = methods.Prepared(model, model, [*model.decode_head.parameters()], [], 0.0, 1, [])
    given = training.pick_rates(args, adapters=0.0, full=0.0, head=0.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        training.make_optimizer(ready, given, args),
        num_warmup_steps=args.warmup_steps,
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=args.schedule_options(),
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: given.head * factor(step)


def test_there_is_one_for_each_experiment() -> None:
    names = ["ade20k_mask2former", "cityscapes_from_ade20k", "coco_detection", "coco_instances"]
    names += ["coco_mask_rcnn", "kitti_depth", "nyuv2_depth"]
    assert [path.stem for path in RECIPES] == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_setting_has_a_source(path: Path) -> None:
    text = path.read_text()
    sources = set(re.findall(r"^# (\[\w+\]) ", text, re.MULTILINE))
    named_nowhere = {"dataset_format", "protocol", "method", "output_dir", "selection_from"}
    explained_above = {"gradient_accumulation_steps", "lr_scheduler_kwargs"}
    block = ""  # comment above an option
    for line in text.splitlines():
        if line.startswith(("#", " ")):
            block += line
            continue
        name, _, rest = line.partition(":")
        comment = rest.partition("#")[2] or block
        block = ""
        if name not in named_nowhere | explained_above:
            named = set(re.findall(r"\[[a-z]\w*\]", comment))
            assert named or re.search(r"\bours\b|\bof the data\b", comment), line
            assert named <= sources, line


def check_mask_rcnn(model: Any) -> None:
    """The widths and anchors of its source."""
    assert (model.config.hidden_size, model.config.num_samples) == (256, 512)
    assert (model.config.neck, model.config.cascade, model.config.masks) == ("fpn", False, True)
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.roi_heads.box_head.fc7.out_features == 1024


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_its_head_built(path: Path, tmp_path: Path) -> None:
    script, args = read(path)
    if "mask_rcnn" in path.stem:
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    tiny = swinv2_config(image_size=192, window_size=12)
    Swinv2ForImageClassification(tiny).save_pretrained(tmp_path)
    assert args.backbone == BACKBONE.format("base")
    assert (args.method, args.budget, args.drop_path_rate) == ("sfa", 0.195, 0.3)
    args.backbone = str(tmp_path)
    data = importlib.import_module("common.data").Data([], [], ["a", "b"])

    model = script.make_model(args, data)

    backbone = getattr(model, "backbone", None)
    if "coco_detection" in path.stem:
        assert model.config.feat_strides == [8, 16, 32]
        assert (model.config.num_queries, model.config.decoder_layers) == (300, 6)
        assert (model.config.d_model, model.config.num_denoising) == (256, 100)
        backbone = model.model.backbone.model
    elif "mask_rcnn" in path.stem:
        check_mask_rcnn(model)
    elif "depth" not in path.stem:
        assert (model.config.encoder_layers, model.config.decoder_layers) == (6, 10)
        assert model.config.train_num_points == 12544
        assert (model.config.feature_size, model.config.num_queries) == (256, 100)
        assert (model.config.hidden_dim, model.config.mask_feature_size) == (256, 256)
        backbone = model.model.pixel_level_module.encoder
    else:
        assert model.config.num_filters == [32, 32, 32]
        assert model.config.max_depth == {"nyuv2_depth": 10, "kitti_depth": 80}[path.stem]
    layers = backbone.encoder.layers
    windows = [layer.blocks[0].attention.self.window_size[0] for layer in layers]
    wanted = {"nyuv2_depth": [30, 30, 30, 15], "kitti_depth": [22, 22, 22, 11]}
    assert windows == wanted.get(path.stem, [12] * 4)
    assert list(backbone.config.pretrained_window_sizes) == [12, 12, 12, 6]
    assert backbone.config.drop_path_rate == 0.3
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert args.selection_steps == (None if args.selection_from else 2000)
    assert images == (24 if "depth" in path.stem else 16)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("variants", "size", "budget"),
    [
        (["swinv2_base_sfa_s"], BACKBONE.format("base"), 0.048),
        (["swinv2_large_sfa_b"], BACKBONE.format("large"), 0.19),
        (["swinv2_large_sfa_s"], BACKBONE.format("large"), 0.045),
        (["swinv2_base_1k"], "microsoft/swinv2-base-patch4-window16-256", 0.195),
        (
            ["swinv2_base_1k", "swinv2_base_sfa_s"],
            "microsoft/swinv2-base-patch4-window16-256",
            0.048,
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_a_variant_of_size_changes_backbone_and_budget_alone(
    path: Path, variants: list[str], size: str, budget: float
) -> None:
    plain = vars(read(path)[1])

    varied = vars(read(path, *(str(VARIANTS / f"{name}.yaml") for name in variants))[1])

    changed = {name for name in plain if plain[name] != varied[name]}
    assert changed <= {"recipe", "backbone", "budget"}
    assert (varied["backbone"], varied["budget"]) == (size, budget)


def test_every_variant_is_tried() -> None:
    names = {path.stem for path in VARIANTS.glob("*.yaml")}
    assert names == {
        *("swinv2_base_sfa_s", "swinv2_large_sfa_b", "swinv2_large_sfa_s", "swinv2_base_1k"),
        *("swinv2_base_adaptformer", "swinv2_large_adaptformer", "swinv2_large_instances"),
        *("adapter_dim_64", "adapter_dim_128"),
        *("mask_rcnn_bifpn", "mask_rcnn_bifpn_cascade"),
    }


@pytest.mark.parametrize(
    ("variants", "column"),
    [
        ([], ("fpn", False)),
        (["mask_rcnn_bifpn"], ("bifpn", False)),
        (["mask_rcnn_bifpn_cascade"], ("bifpn", True)),
    ],
    ids=lambda value: "+".join(map(str, value)),
)
@pytest.mark.parametrize("size", [[], ["swinv2_base_sfa_s"]], ids=["sfa_b", "sfa_s"])
def test_the_columns_of_table_2_differ_in_neck_and_heads_alone(
    variants: list[str], column: tuple[str, bool], size: list[str]
) -> None:
    path = EXAMPLES / "recipes" / "coco_mask_rcnn.yaml"
    more = [str(VARIANTS / f"{name}.yaml") for name in (*variants, *size)]

    plain, varied = vars(read(path)[1]), vars(read(path, *more)[1])

    assert (varied["neck"], varied["cascade"]) == column
    assert varied["budget"] == (0.048 if size else 0.195)
    changed = {name for name in plain if plain[name] != varied[name]}
    assert changed <= {"recipe", "neck", "neck_layers", "cascade", "budget"}


def swinv2_22k(size: str) -> torch.nn.Module:
    """Return the backbone of the recipes as it stands in a task model, without memory."""
    with torch.device("meta"):
        task = torch.nn.Module()
        task.backbone = Swinv2Backbone(paper_config(size))
    return task


@pytest.mark.parametrize(
    ("size", "total", "percent", "paper"),
    [("base", 86_891_768, 13.5, 88e6), ("large", 195_199_860, 9.2, 197e6)],
)
def test_adaptformer_has_the_width_of_the_papers_row(
    size: str, total: int, percent: float, paper: float
) -> None:
    methods = importlib.import_module("common.methods")
    path = VARIANTS / f"swinv2_{size}_adaptformer.yaml"
    args = read(EXAMPLES / "recipes" / "ade20k_mask2former.yaml", str(path))[1]
    task = swinv2_22k(size)
    assert sum(p.numel() for p in task.backbone.parameters()) == total
    assert args.backbone == BACKBONE.format(size)

    ready = methods.prepare_method(task, args)

    weights = sum(p.numel() for p in ready.adapted if p.ndim > 1)
    assert weights == {"base": 11_862_016, "large": 18_038_784}[size]
    assert round(100 * weights / paper, 1) == percent
    assert ready.share <= args.budget < ready.share + 1e-3


@pytest.mark.parametrize(("width", "budget", "rho"), [(64, 0.048, 0.745), (128, 0.195, 0.365)])
def test_the_widths_of_the_paper_leave_their_share_to_selected_weights(
    width: int, budget: float, rho: float
) -> None:
    variants = ["swinv2_base_sfa_s"] if budget == 0.048 else []
    variants = [str(VARIANTS / f"{name}.yaml") for name in (*variants, f"adapter_dim_{width}")]
    args = read(EXAMPLES / "recipes" / "ade20k_mask2former.yaml", *variants)[1]
    assert (args.adapter_dim, args.budget, args.rho) == (width, budget, None)
    roles = [m for m in role_modules(find_backbone(swinv2_22k("base"))) if "_out" in m.role]
    layers = dict(swinv2_22k("base").named_modules())
    outputs = {m.name: layers[m.name].out_features for m in roles}

    plan = solve_budget(
        budget=budget,
        rho=None,
        adapter_dim=width,
        total=86_891_768,
        external=External(outputs),
        eligible=83_755_008,
    )

    assert plan.external / plan.allowed == pytest.approx(rho, abs=5e-4)
    assert plan.external + plan.internal == plan.allowed


def test_large_instances_take_twice_the_steps_and_queries() -> None:
    names = ("swinv2_large_sfa_s", "swinv2_large_instances")
    variants = [str(VARIANTS / f"{name}.yaml") for name in names]
    args = read(EXAMPLES / "recipes" / "coco_instances.yaml", *variants)[1]
    rate = rates(args)

    assert (args.max_steps, args.num_queries) == (737_500, 200)
    assert args.backbone == BACKBONE.format("large")
    assert [rate(655_555), rate(737_500)] == pytest.approx([1e-4, 1e-6])
    assert 1e-6 < rate(710_184) < rate(655_700) < 1e-4


@pytest.mark.filterwarnings("ignore:.*num_stable_steps will be used")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nothing_is_selected_when_less_than_a_quarter_of_the_rates_is_left(path: Path) -> None:
    args = read(path)[1]
    if args.selection_from is not None:
        assert args.select_until is None
        return
    rate = rates(args)
    seen = np.array([rate(step) for step in range(0, args.max_steps, 50)])

    left = 1 - seen.cumsum() / seen.sum()

    assert left[int(args.select_until * len(seen))] == pytest.approx(0.25, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("ade20k_mask2former", 0.1),
        ("cityscapes_from_ade20k", 0.1),
        ("coco_instances", 0.1),
        ("coco_detection", 0.1),
        ("coco_mask_rcnn", 1.0),
        ("nyuv2_depth", 1.0),
        ("kitti_depth", 1.0),
    ],
)
def test_pretrained_weights_get_the_sources_rate_and_new_layers_the_heads(
    name: str, ratio: float
) -> None:
    args = recipe(name)
    training = importlib.import_module("common.training")

    for args.method in ("sfa", "full", "lora"):
        found = training.pick_rates(args, adapters=0.0, full=0.0, head=0.0)
        assert found.added == found.head
        assert found.backbone == pytest.approx(ratio * found.head)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_rates_fall_from_layer_to_layer_where_they_do_in_the_source(path: Path) -> None:
    assert read(path)[1].layer_decay == (0.9 if path.stem.endswith("_depth") else None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_norms_and_weight_decay_are_those_of_the_source(path: Path) -> None:
    args = read(path)[1]
    wanted = {
        "coco_detection": (False, ["norms", "biases"]),
        "nyuv2_depth": (True, ["norms", "biases"]),
        "kitti_depth": (True, ["norms", "biases"]),
    }
    found = (args.norm_outputs, args.no_decay)
    assert found == wanted.get(path.stem, (True, ["norms", "embeddings"]))


@pytest.mark.parametrize(
    ("name", "images", "batch", "epochs"),
    [("nyuv2_depth", 24231, 24, 25), ("kitti_depth", 23158, 24, 25)],
)
def test_depth_rises_for_twelve_epochs_and_falls_for_twelve(
    name: str, images: int, batch: int, epochs: int
) -> None:
    args, steps = recipe(name), images // batch
    high, low, half = 5e-4, 3e-5, epochs // 2

    def source(step: int, power: float) -> float:
        """Return the rate of MIM-Depth's train.py at a step, counted from 0."""
        if step < steps * half:
            return (high - low) * (step / steps / half) ** power + low
        return max(low, (low - high) * (step / steps / half - 1) ** power + high)

    with pytest.warns(UserWarning, match="num_stable_steps will be used"):
        rate = rates(args)

    assert args.max_steps == epochs * steps
    for step in range(0, args.max_steps, 97):
        assert rate(step) == pytest.approx(source(step, 1.0), rel=1e-6)
        assert abs(rate(step) - source(step, 0.9)) < 0.04 * high


@pytest.mark.parametrize("name", ["ade20k_mask2former", "cityscapes_from_ade20k"])
def test_mask2former_falls_with_power_nine_tenths(name: str) -> None:
    args = recipe(name)
    rate = rates(args)

    for step in range(0, args.max_steps, 997):
        assert rate(step) == pytest.approx(1e-4 * (1 - step / args.max_steps) ** 0.9)


def test_instances_fall_where_mask2former_has_its_steps() -> None:
    rate = rates(recipe("coco_instances"))

    assert [rate(step) for step in (10, 200_000, 327_777)] == pytest.approx([1e-4] * 3)
    assert 1e-6 < rate(355_092) < rate(327_900) < 1e-4
    assert rate(368_750) == pytest.approx(1e-6)


def test_mask_rcnn_falls_in_its_last_nine_of_36_epochs() -> None:
    rate, epoch = rates(recipe("coco_mask_rcnn")), -(-118287 // 16)

    assert recipe("coco_mask_rcnn").max_steps == 36 * epoch
    assert [rate(step) for step in (1000, 27 * epoch)] == pytest.approx([1e-4] * 2)
    assert rate(500) == pytest.approx(5e-5, rel=0.02)
    assert 1e-6 < rate(33 * epoch) < 5e-5
    assert rate(36 * epoch) == pytest.approx(1e-6)


def test_detection_has_72_epochs() -> None:
    per_gpu = -(-118287 // 4) // 4  # batches of 4 on 4 devices, as RT-DETR divides them
    assert recipe("coco_detection").max_steps == 72 * per_gpu


@pytest.mark.parametrize(
    ("name", "image", "shorter", "tested"),
    [
        ("ade20k_mask2former", (512, 683), (320, 1280), (640, 854)),
        ("cityscapes_from_ade20k", (1024, 2048), (512, 2048), (1024, 2048)),
    ],
)
def test_the_scale_is_that_of_mask2formers_shorter_side(
    name: str,
    image: tuple[int, int],
    shorter: tuple[int, int],
    tested: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script, args = read(EXAMPLES / "recipes" / f"{name}.yaml")
    data = importlib.import_module("common.data")
    pixels = np.zeros((*image, 3), np.uint8)
    pair = (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]))
    monkeypatch.setattr(script, "load_pairs", lambda *_: data.Pairs([pair], [pair], ["a"]))
    seen: list[int] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        seen.append(min(size))
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", spy)
    loaded = script.load_data(args)
    for epoch in range(40):
        loaded.train.set_epoch(epoch)
        assert loaded.train[0]["labels"].shape == tuple(args.image_size)

    low, high = shorter
    assert low <= min(seen) < low + 0.2 * (high - low)
    assert high >= max(seen) > high - 0.2 * (high - low)
    item = loaded.evaluation[0]
    assert (item["pixel_values"].shape, item["labels"].shape) == ((3, *tested), image)
    assert args.facts() == {"scored_at": "the data's own size"}


@pytest.mark.parametrize(
    ("name", "image"), [("nyuv2_depth", (480, 640)), ("kitti_depth", (375, 1242))]
)
def test_crops_of_depth_are_filled_by_the_image(
    name: str, image: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, args = read(EXAMPLES / "recipes" / f"{name}.yaml")
    data = importlib.import_module("common.data")
    pair = (Image.fromarray(np.zeros((*image, 3), np.uint8)), np.ones(image, np.float32))
    monkeypatch.setattr(script, "load_pairs", lambda *_, **__: data.Pairs([pair], [pair], []))

    loaded = script.load_data(args)

    assert loaded.train[0]["labels"].shape == tuple(args.image_size)
    assert (loaded.train[0]["labels"] == 1).all()
    item = loaded.evaluation[0]
    assert item["labels"].shape == item["pixel_values"].shape[1:] == tuple(args.eval_size)
