# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Swinv2Config

from sfa_peft.dense import IGNORE_INDEX, Mask2FormerForSemanticSegmentation

CLASSES = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = Swinv2Config(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=CLASSES,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        num_queries=5,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        dropout=0.0,
    )
    return Mask2FormerForSemanticSegmentation(config)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (2, 32, 32), generator=generator)
    labels[0, :4], labels[1][labels[1] == 2] = IGNORE_INDEX, 1
    return torch.randn(2, 3, 32, 32, generator=generator), labels


def test_class_maps_score_by_the_queries_that_cover_a_pixel(model, batch):
    pixels, _ = batch
    with torch.no_grad():
        outputs = model.eval()(pixels)
    masks = nn.functional.interpolate(
        outputs.masks_queries_logits, size=(32, 32), mode="bilinear", align_corners=False
    ).sigmoid()
    classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
    expected = torch.zeros(2, CLASSES, 32, 32)
    for query in range(masks.shape[1]):
        expected += classes[:, query, :, None, None] * masks[:, query, None]
    assert outputs.loss is None
    torch.testing.assert_close(outputs.logits.exp(), expected, rtol=1e-4, atol=1e-5)


def test_each_class_of_a_map_is_one_mask_and_what_is_ignored_is_none(model, batch, monkeypatch):
    pixels, labels = batch
    seen = {}

    def record(self, pixel_values, mask_labels=None, class_labels=None):
        seen.update(masks=mask_labels, classes=class_labels)
        return original(self, pixel_values, mask_labels=mask_labels, class_labels=class_labels)

    original = Mask2FormerForUniversalSegmentation.forward
    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "forward", record)
    outputs = model.train()(pixels, labels)
    assert torch.isfinite(outputs.loss)
    assert outputs.logits is None  # nobody looks at them while training
    assert [ids.tolist() for ids in seen["classes"]] == [[0, 1, 2], [0, 1]]
    for ids, masks, map_ in zip(seen["classes"], seen["masks"], labels, strict=True):
        for number, mask in zip(ids.tolist(), masks, strict=True):
            assert torch.equal(mask, (map_ == number).float())
