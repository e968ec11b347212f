# SPDX-License-Identifier: Apache-2.0
"""The depth head of MIM-Depth: its layers, any size, saving, other backbones, and Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForDepthEstimation,
    BeitConfig,
    ConvNextConfig,
    Dinov2Config,
    PretrainedConfig,
    ResNetConfig,
    SwinConfig,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2ForImageClassification,
    Trainer,
    TrainingArguments,
)

import sfa_peft
from sfa_peft.dense.heads.deconv_depth import DeconvDepthConfig, DeconvForDepthEstimation
from sfa_peft.dense.losses import silog_loss
from sfa_peft.errors import SFAError
from tests.tiny import swinv2_config

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES: list[PretrainedConfig] = [
    SwinConfig(image_size=32, embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, window_size=4),
    ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 16, 32, 64]),
    ResNetConfig(embedding_size=8, depths=[1] * 4, hidden_sizes=[8, 16, 32, 64]),
    Dinov2Config(image_size=28, patch_size=14, **VIT),
    BeitConfig(image_size=32, patch_size=16, intermediate_size=32, out_features=["stage2"], **VIT),
]


def model(seed: int = 0, **options: Any) -> DeconvForDepthEstimation:
    torch.manual_seed(seed)
    options = {"backbone_config": swinv2_config(), "initializer_range": 0.1} | options
    return DeconvForDepthEstimation(DeconvDepthConfig(**options))


def reference(net: DeconvForDepthEstimation, pixel_values: torch.Tensor) -> torch.Tensor:
    """The head in training mode, layer after layer as the paper's code has it."""
    weights = {n.removeprefix("head."): p for n, p in net.named_parameters()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = centred / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    x = net.backbone(pixel_values).feature_maps[-1]
    for i in (0, 3, 6):
        # Kernel and stride 2: every pixel becomes a block of 2 x 2, blocks do not overlap.
        blocks = torch.einsum("bihw,iopq->bohpwq", x, weights[f"deconv_layers.{i}.weight"])
        batch, channels, height, _, width, _ = blocks.shape
        x = blocks.reshape(batch, channels, 2 * height, 2 * width)
        x = norm(x, f"deconv_layers.{i + 1}").relu()
    x = norm(conv(x, "conv_layers.0"), "conv_layers.1").relu()
    for _ in range(2):
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    x = conv(conv(x, "last_layer_depth.0").relu(), "last_layer_depth.2")
    return net.config.max_depth * x[:, 0].sigmoid()


def test_the_head_is_that_of_the_paper() -> None:
    net = model(max_depth=7.0).double()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    predicted = net(pixels).predicted_depth

    torch.testing.assert_close(predicted, reference(net, pixels))
    assert predicted.std() > 1e-3
    shapes = {n: tuple(p.shape) for n, p in net.head.named_parameters() if n.endswith("weight")}
    assert shapes["deconv_layers.0.weight"] == (128, 32, 2, 2)
    assert shapes["deconv_layers.6.weight"] == (32, 32, 2, 2)
    assert shapes["conv_layers.0.weight"] == (16, 32, 3, 3)  # 16: embed_dim


@pytest.mark.parametrize("size", [(32, 32), (72, 88), (33, 17), (96, 64)])
def test_any_size_gives_a_map_of_that_size(size: tuple[int, int]) -> None:
    net = model().eval()
    pixels = torch.randn(2, 3, *size)

    predicted = net(pixels).predicted_depth

    assert predicted.shape == (2, *size)
    assert (predicted > 0).all()
    assert (predicted < net.config.max_depth).all()
    # Swin pads at the bottom and right, so that the map's upper left is the image's.
    whole = net.head(net.backbone(pixels).feature_maps[-1])
    assert torch.equal(predicted, whole[:, : size[0], : size[1]])


@pytest.mark.parametrize("config", BACKBONES, ids=lambda c: c.model_type)
def test_other_backbones_drive_it(config: PretrainedConfig) -> None:
    net = model(backbone_config=config)

    for size in ((32, 32), (70, 90)):
        outputs = net(torch.randn(2, 3, *size), labels=torch.rand(2, *size))
        assert outputs.predicted_depth.shape == (2, *size)
        outputs.loss.backward()
    grads = [p.grad for p in net.head.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)


def test_feature_maps_that_are_no_maps_are_named() -> None:
    config = Dinov2Config(image_size=28, patch_size=14, reshape_hidden_states=False, **VIT)

    with pytest.raises(SFAError, match="reshape_hidden_states=True"):
        model(backbone_config=config)(torch.randn(1, 3, 28, 28))


def test_a_saved_model_loads_exactly_through_the_auto_classes(tmp_path: Path) -> None:
    net = model(max_depth=80.0, num_filters=(8, 8), hidden_size=12, silog_lambda=0.85)
    pixels = torch.randn(3, 3, 40, 40)
    net(pixels)  # running statistics other than those of the start
    net.eval().save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)
    loaded = AutoModelForDepthEstimation.from_pretrained(tmp_path).eval()

    assert type(loaded) is DeconvForDepthEstimation
    assert type(config) is DeconvDepthConfig
    assert type(config.backbone_config) is Swinv2Config
    assert (config.max_depth, config.hidden_size, config.silog_lambda) == (80, 12, 0.85)
    assert list(config.num_filters) == [8, 8]
    assert net.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, loaded.state_dict()[n]) for n, a in net.state_dict().items())
    assert torch.equal(net(pixels).predicted_depth, loaded(pixels).predicted_depth)


def test_features_are_normalised_where_wanted_and_the_norm_loads_exactly(tmp_path: Path) -> None:
    plain, net = model().eval(), model(norm_features=True).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 64, 64)
    torch.nn.init.normal_(net.head.norm.weight)
    torch.nn.init.normal_(net.head.norm.bias)

    features = net.backbone(pixels).feature_maps[-1].permute(0, 2, 3, 1)
    weights = (net.head.norm.weight, net.head.norm.bias)
    normed = functional.layer_norm(features, (128,), *weights).permute(0, 3, 1, 2)
    predicted = net(pixels).predicted_depth
    assert torch.equal(predicted, plain.head(normed))
    assert not torch.equal(predicted, plain(pixels).predicted_depth)

    net.save_pretrained(tmp_path)
    loaded = AutoModelForDepthEstimation.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).predicted_depth, predicted)


def test_a_pretrained_backbone_takes_its_place(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = Swinv2ForImageClassification(swinv2_config())
    classifier.save_pretrained(tmp_path)
    backbone = Swinv2Backbone.from_pretrained(tmp_path, out_features=["stage4"])
    net = model(backbone_config=backbone.config)
    net.backbone = backbone
    net.save_pretrained(tmp_path / "task")
    loaded = DeconvForDepthEstimation.from_pretrained(tmp_path / "task").backbone

    weights = classifier.swinv2.encoder.state_dict()
    assert all(torch.equal(p, weights[n]) for n, p in loaded.encoder.state_dict().items())


def test_weights_start_as_in_the_paper() -> None:
    net = model(backbone_config=swinv2_config(embed_dim=32), initializer_range=0.001)

    for part in (net.head.deconv_layers[0], net.head.conv_layers[0], net.head.last_layer_depth[0]):
        assert part.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert all((m.bias == 0).all() for m in (net.head.conv_layers[0], net.head.last_layer_depth[2]))
    # So that training starts in the middle of the range, and the backbone as it is.
    predicted = net(torch.randn(2, 3, 32, 32)).predicted_depth
    torch.testing.assert_close(predicted, torch.full_like(predicted, 5.0), atol=0.01, rtol=0)
    dense = net.backbone.encoder.layers[0].blocks[0].output.dense
    assert dense.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_labels_give_the_loss_at_their_own_size() -> None:
    net = model().eval()
    pixels, labels = torch.randn(2, 3, 32, 32), torch.rand(2, 64, 64)

    outputs = net(pixels, labels=labels)

    depth = functional.interpolate(outputs.predicted_depth[:, None], (64, 64), mode="bilinear")
    torch.testing.assert_close(outputs.loss, silog_loss(depth[:, 0], labels, lambd=0.5))
    as_tuple = net(pixels, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss)
    assert torch.equal(as_tuple[1], outputs.predicted_depth)
    empty = net(pixels, labels=torch.zeros_like(labels)).loss
    assert empty.item() == 0
    empty.backward()


def test_the_backbones_inner_states_are_passed_on() -> None:
    outputs = model()(torch.randn(2, 3, 32, 32), output_hidden_states=True, output_attentions=True)

    assert len(outputs.hidden_states) == 5
    assert len(outputs.attentions) == 4


def logged(net: torch.nn.Module, folder: Path, batch: int, micro_batches: int) -> list[float]:
    """Return loss and gradient norm of an update step over four equal images."""
    generator = torch.Generator().manual_seed(0)
    image, depth = torch.randn(3, 32, 32, generator=generator), torch.rand(32, 32) + 0.5
    args = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=batch, learning_rate=0.0,
        gradient_accumulation_steps=micro_batches, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    items = [{"pixel_values": image, "labels": depth}] * 4
    trainer = Trainer(model=net, args=args, train_dataset=items)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    return [entry["loss"], entry["grad_norm"]]


def test_micro_batches_in_trainer_give_the_loss_of_the_batch(tmp_path: Path) -> None:
    whole, halves = (logged(model(), tmp_path, 4 // n, n) for n in (1, 2))

    assert whole == pytest.approx(halves, rel=1e-3)
    assert min(whole) > 0


def test_an_sfa_adapter_trains_on_it_and_loads_exactly(tmp_path: Path) -> None:
    config = sfa_peft.SFAConfig(budget=0.2, modules_to_save=["head"])
    net = get_peft_model(model(), config)
    selector = sfa_peft.SFASelector(net, total_steps=6)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 3e-3)
    pixels, labels = torch.randn(4, 3, 32, 32), torch.rand(4, 32, 32) * 3 + 1
    losses = []
    for _ in range(6):
        loss = net(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    net.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path).eval()

    assert losses[-1] < losses[0]
    assert torch.equal(net(pixels).predicted_depth, loaded(pixels).predicted_depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_filters": []}, "num_filters"),
        ({"num_filters": [32, 0]}, "num_filters"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"max_depth": 0}, "max_depth"),
        ({"silog_lambda": 2}, "silog_lambda"),
        ({"backbone_config": {"embed_dim": 8}}, "no `model_type`"),
        ({"backbone_config": "swinv2"}, "expected a config of transformers"),
    ],
)
def test_a_config_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SFAError, match=message):
        DeconvDepthConfig(**options)
