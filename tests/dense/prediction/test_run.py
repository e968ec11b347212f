# SPDX-License-Identifier: Apache-2.0
"""Batches and order, on a stand-in whose class map is its first channel's sign."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfa_peft.dense import Preprocessing, TaskSpec, predict
from sfa_peft.dense.prediction.spec import Pretrained, attach_spec
from sfa_peft.errors import SFAError

SIZES = [(8, 8), (8, 12), (8, 8), (12, 8), (8, 8), (8, 12), (8, 8)]


class SignOfRed(nn.Module):
    def __init__(self, preprocessing, task="semantic_segmentation"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes = []
        pretrained = Pretrained("nowhere", "Swinv2Backbone", "backbone")
        names = ("dark", "bright")
        attach_spec(self, TaskSpec(task, "none", {}, pretrained, preprocessing, names))

    def forward(self, pixel_values):
        self.shapes.append(tuple(pixel_values.shape))
        red = self.weight * pixel_values[:, 0]
        if self.task_spec.task == "depth_estimation":
            return {"predicted_depth": red.abs() + 1}
        return {"logits": torch.stack([-red, red], 1)}


def pictures():
    rng = np.random.default_rng(0)
    return [
        np.where(rng.random((*s, 1)) < 0.5, 0, 255).repeat(3, -1).astype(np.uint8) for s in SIZES
    ]


def truth(image):
    return (image[..., 0] > 0).astype(int)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_results_come_in_the_order_of_the_pictures_at_their_sizes(batch_size):
    model = SignOfRed(Preprocessing("keep")).eval()
    found = predict(model, pictures(), batch_size=batch_size)
    for ids, image in zip(found, pictures(), strict=True):
        assert np.array_equal(ids, truth(image))
    assert max(shape[0] for shape in model.shapes) == min(batch_size, 4)
    assert sum(shape[0] for shape in model.shapes) == len(SIZES)


def test_padding_is_cut_off_again():
    model = SignOfRed(Preprocessing("keep", size_divisor=32)).eval()
    for ids, image in zip(predict(model, pictures()), pictures(), strict=True):
        assert np.array_equal(ids, truth(image))
    assert {shape[2:] for shape in model.shapes} == {(32, 32)}


def test_what_is_outside_of_a_crop_has_no_depth():
    model = SignOfRed(Preprocessing("keep", crop="kitti"), "depth_estimation").eval()
    (metres,) = predict(model, np.zeros((360, 1220, 3), np.uint8))
    assert metres.shape == (360, 1220)
    assert (metres[8:, 2:1218] > 1).all()
    assert (metres > 0).sum() == 352 * 1216


def test_one_picture_is_one_result_and_none_are_none():
    model = SignOfRed(Preprocessing("keep")).eval()
    assert [ids.shape for ids in predict(model, Image.new("RGB", (5, 4)))] == [(4, 5)]
    assert predict(model, []) == []


def test_pictures_are_decoded_when_they_are_come_to():
    model = SignOfRed(Preprocessing("keep")).eval()
    seen = []

    def source():
        for image in [pictures()[0]] * 4:
            seen.append(len(model.shapes))
            yield image

    predict(model, source(), batch_size=2)
    assert seen == [0, 0, 1, 1]


def test_what_cannot_work_is_said():
    model = SignOfRed(Preprocessing("keep"))
    with pytest.raises(SFAError, match=r"model\.eval\(\)"):
        predict(model, pictures())
    with pytest.raises(SFAError, match="batch_size: expected 1 or more"):
        predict(model.eval(), pictures(), batch_size=0)
    with pytest.raises(SFAError, match="does not say what its task is"):
        predict(nn.Linear(1, 1).eval(), pictures())
