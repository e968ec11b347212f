# SPDX-License-Identifier: Apache-2.0
"""Faster and Mask R-CNN on a backbone of transformers: torchvision's results, saving, adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    ConvNextConfig,
    PretrainedConfig,
    ResNetConfig,
    SwinConfig,
)

import sfa_peft
from sfa_peft.dense import RCNNConfig, RCNNForObjectDetection, collate_detection
from sfa_peft.errors import SFAError
from tests.tiny import swinv2_config

needs_torchvision = pytest.mark.usefixtures("torchvision")
KINDS = [
    {},
    {"neck": "bifpn", "neck_layers": 1},
    {"neck": "bifpn", "cascade": True, "norm_features": True},
    {"masks": False, "cascade": True},
]


@pytest.fixture
def torchvision() -> None:
    pytest.importorskip("torchvision")


def model(seed: int = 0, **options: Any) -> RCNNForObjectDetection:
    torch.manual_seed(seed)
    plain = {"backbone_config": swinv2_config(), "hidden_size": 16, "num_labels": 3}
    plain |= {"anchor_scale": 3.0, "num_samples": 32}
    return RCNNForObjectDetection(RCNNConfig(**plain | options))


def eager(net: RCNNForObjectDetection) -> RCNNForObjectDetection:
    """Let an untrained model find something: scores that differ."""
    torch.manual_seed(4)
    for name, parameter in net.named_parameters():
        if "cls_score.weight" in name or "bbox_pred.weight" in name:
            nn.init.normal_(parameter, std=0.3)
    return net.eval()


def labels(size: int = 64) -> list[dict[str, Tensor]]:
    """Two objects in the first image, none in the second."""
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    masks[0, 8:40, 8:24] = True
    masks[1, 20:60, 28:60] = True
    boxes = torch.tensor([[16.0, 24, 16, 32], [44, 40, 32, 40]]) / size
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return [
        {"class_labels": torch.tensor([0, 2]), "boxes": boxes, "masks": masks},
        nothing | {"masks": torch.zeros(0, size, size, dtype=torch.bool)},
    ]


def pixels(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def tensors(outputs: Any) -> list[Tensor]:
    parts = (outputs.boxes, outputs.scores, outputs.classes, outputs.masks or [])
    return [tensor for part in parts for tensor in part]


@needs_torchvision
def test_mask_rcnn_finds_what_torchvisions_own_finds() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    net = eager(model())

    class Features(nn.Module):
        out_channels = 16

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return net.neck(net.backbone(images).feature_maps)

    sizes = tuple((3.0 * stride,) for stride in (4, 8, 16, 32, 64))
    other = detection.MaskRCNN(
        Features(),
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1, 2),) * 5),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 49, 64),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(64, 4),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(16, (16,) * 4, 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(16, 16, 4),
        box_batch_size_per_image=32,
        min_size=64,
        max_size=64,
        _skip_resize=True,  # in training mode, where it draws a size
    ).eval()
    for name in ("rpn", "roi_heads"):
        getattr(other, name).load_state_dict(getattr(net, name).state_dict())
    with torch.no_grad():
        found, wanted = net(pixels()), other(list(pixels()))
    objects = sfa_peft.dense.instances_from_boxes(found, [(64, 64)] * 2)

    assert min(len(one["scores"]) for one in wanted) > 3
    for mine, theirs in zip(objects, wanted, strict=True):
        assert torch.equal(torch.from_numpy(mine["boxes"]), theirs["boxes"])
        assert torch.equal(torch.from_numpy(mine["labels"]), theirs["labels"] - 1)
        assert torch.equal(torch.from_numpy(mine["scores"]).float(), theirs["scores"])
        assert torch.equal(torch.from_numpy(mine["masks"]), theirs["masks"][:, 0] > 0.5)

    torch.manual_seed(5)
    losses = net.train()(pixels(), labels=labels()).losses
    truth = [
        {
            "boxes": torch.tensor([[8.0, 8, 24, 40], [28, 20, 60, 60]])[: len(one["boxes"])],
            "labels": one["class_labels"] + 1,
            "masks": one["masks"],
        }
        for one in labels()
    ]
    torch.manual_seed(5)
    wanted = other.train()(list(pixels()), truth)
    assert losses.keys() == wanted.keys()
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss)


@needs_torchvision
@pytest.mark.parametrize("options", KINDS)
def test_every_part_is_trained(options: dict[str, Any]) -> None:
    net = model(**options).train()

    outputs = net(pixels(), labels=labels())
    outputs.loss.backward()

    assert outputs.loss.isfinite()
    torch.testing.assert_close(outputs.loss, sum(outputs.losses.values()))
    without = [
        n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert without == []
    assert net.config.masks == ("loss_mask" in outputs.losses)


@needs_torchvision
@pytest.mark.parametrize("options", KINDS)
def test_a_saved_model_loads_exactly_through_the_auto_classes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    net = eager(model(**options))
    net.save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()

    assert type(config) is RCNNConfig
    assert type(loaded) is RCNNForObjectDetection
    assert {name: getattr(config, name) for name in options} == options
    assert net.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, loaded.state_dict()[n]) for n, a in net.state_dict().items())
    # Copied: tensors mapped from a file lie otherwise in memory and round otherwise.
    copied = model(seed=1, **options).eval()
    copied.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        pairs = zip(tensors(net(pixels())), tensors(copied(pixels())), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_torchvision
def test_layers_that_a_checkpoint_lacks_get_a_start(tmp_path: Path) -> None:
    model(masks=False).save_pretrained(tmp_path)

    loaded = RCNNForObjectDetection.from_pretrained(tmp_path, masks=True)

    head = [p for n, p in loaded.named_parameters() if "mask" in n]
    assert head
    assert all(p.isfinite().all() and p.abs().max() < 1 for p in head)


@needs_torchvision
def test_a_new_head_keeps_the_start_of_torchvision() -> None:
    net = model()

    start = net.rpn.head.cls_logits

    assert start.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not start.bias.any()


@needs_torchvision
@pytest.mark.parametrize("options", KINDS[::2])
def test_an_adapter_and_its_head_load_exactly_onto_a_new_model(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = eager(model(**options))
    head = sfa_peft.head_modules(base)
    assert head == ["neck", "rpn", "roi_heads"]
    net = get_peft_model(base, sfa_peft.SFAConfig(budget=0.2, modules_to_save=head))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    selector = sfa_peft.SFASelector(net, total_steps=3)
    net.train()
    for _ in range(3):
        net(pixel_values=pixels(), labels=labels()).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    net.eval().save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(model(seed=0, **options), tmp_path).eval()

    with torch.no_grad():
        mine, theirs = (tensors(m(pixel_values=pixels())) for m in (net, loaded))
        plain = tensors(eager(model(**options))(pixels()))
    assert len(mine[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(mine[0], plain[0])


@needs_torchvision
def test_boxes_stay_exact_under_autocast() -> None:
    net = eager(model(neck="bifpn", cascade=True))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(pixels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net.train()(pixels(), labels=labels()).loss
    loss.backward()

    assert {t.dtype for t in (*found.boxes, *found.scores, *found.masks, loss)} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@needs_torchvision
def test_objects_lie_within_their_image_whatever_its_padding() -> None:
    net = eager(model())
    mask = torch.zeros(2, 90, 70, dtype=torch.int64)
    mask[0, :90, :50] = 1
    mask[1, :40, :70] = 1
    images = torch.randn(2, 3, 90, 70) * mask[:, None]

    with torch.no_grad():
        found = net(images, pixel_mask=mask)
    objects = sfa_peft.dense.instances_from_boxes(found, [(180, 100), (20, 35)])

    assert found.sizes == [(90, 50), (40, 70)]
    for one, boxes, (height, width), factor in zip(
        objects, found.boxes, ((180, 100), (20, 35)), (2, 0.5), strict=True
    ):
        assert len(boxes)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"][:, 2] <= width).all()
        assert (one["boxes"][:, 3] <= height).all()
        assert torch.equal(torch.from_numpy(one["boxes"]), boxes * factor)
        assert one["masks"].shape == (len(boxes), height, width)


@needs_torchvision
@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(image_size=32, embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, window_size=4),
        ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 16, 32, 64]),
        ResNetConfig(embedding_size=8, depths=[1] * 4, hidden_sizes=[8, 16, 32, 64]),
    ],
    ids=lambda config: config.model_type,
)
def test_other_pyramids_drive_it(config: PretrainedConfig) -> None:
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]

    net = model(backbone_config=config).train()

    assert net(pixels(), labels=labels()).loss.isfinite()
    assert tensors(net.eval()(pixels()))


@needs_torchvision
def test_what_it_cannot_use_is_named() -> None:
    with pytest.raises(SFAError, match="four stages, with strides of 4 to 32, got"):
        model(backbone_config=swinv2_config(out_features=["stage2", "stage4"]))
    with pytest.raises(SFAError, match="training needs labels of 2 images, got none"):
        model().train()(pixels())
    without = [{k: v for k, v in one.items() if k != "masks"} for one in labels()]
    with pytest.raises(SFAError, match="collate_detection"):
        model().train()(pixels(), labels=without)
    outputs = model().train()(pixels(), labels=labels())
    with pytest.raises(SFAError, match=r"call model.eval\(\) first"):
        sfa_peft.dense.instances_from_boxes(outputs, [(64, 64)] * 2)
    with pytest.raises(SFAError, match="expected height and width of 2 images"):
        sfa_peft.dense.instances_from_boxes(model().eval()(pixels()), [(64, 64)])


@needs_torchvision
def test_collated_labels_keep_their_masks_where_they_are_asked_for() -> None:
    items = [
        {"pixel_values": image, "labels": one | {"orig_masks": one["masks"]}}
        for image, one in zip(pixels(), labels(), strict=True)
    ]

    batch = collate_detection(items, masks=True)

    assert [sorted(one) for one in batch["labels"]] == [["boxes", "class_labels", "masks"]] * 2
    assert model().train()(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": "pan"}, r"neck: expected one of \['fpn', 'bifpn'\], got 'pan'"),
        ({"hidden_size": 0}, "num_samples of 1 or more"),
        ({"anchor_scale": 0}, "anchor_scale above 0"),
        ({"backbone_config": 3}, "RCNNConfig.backbone_config: expected a config"),
        ({"backbone_config": {"depths": [1]}}, "RCNNConfig.backbone_config: the dict has no"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SFAError, match=message):
        RCNNConfig(**options)


def test_without_torchvision_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)

    with pytest.raises(SFAError, match=r"pip install 'sfa-peft\[torchvision\]'"):
        model()
