# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from sfa_peft.dense import (
    DepthEvalTransform,
    EvalTransform,
    ObjectResize,
    Objects,
    Preprocessing,
    kitti_benchmark_crop,
)
from sfa_peft.dense.prediction.preprocessing import as_picture
from sfa_peft.errors import SFAError

SIZES = [(40, 61), (64, 48), (33, 33), (200, 21), (64, 64)]  # height, width


def picture(height, width):
    rng = np.random.default_rng((height, width))
    return Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_to_the_bit_as_the_evaluation_of_training_prepares_them(size):
    image, (height, width) = picture(*size), size
    mask, metres = np.zeros(size, np.uint8), np.ones(size, np.float32)
    no_objects = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    pairs = [
        (Preprocessing("cover", (48, 64)), EvalTransform((48, 64))(image, mask)),
        (Preprocessing("keep"), DepthEvalTransform()(image, metres)),
        (Preprocessing("cover", (64, 64)), DepthEvalTransform(64)(image, metres)),
        (Preprocessing("stretch", (32, 64)), ObjectResize((32, 64))(image, no_objects)),
    ]
    for preprocessing, item in pairs:
        assert torch.equal(preprocessing.prepare(image), item["pixel_values"])
        frame = preprocessing.frame(size)
        assert frame.box == (0, 0, width, height)
        assert frame.size == frame.padded == tuple(item["pixel_values"].shape[1:])


def test_kittis_crop_is_taken_first():
    image = picture(376, 1241)
    found = Preprocessing("keep", crop="kitti")
    item = DepthEvalTransform(crop=kitti_benchmark_crop)(image, np.ones((376, 1241), np.float32))
    assert torch.equal(found.prepare(image), item["pixel_values"])
    with pytest.raises(SFAError, match="1216x352, the image only 100x100"):
        found.frame((100, 100))


def test_the_input_is_padded_with_zeros_right_and_below():
    image = picture(40, 61)
    plain, padded = (Preprocessing("keep", size_divisor=d).prepare(image) for d in (1, 32))
    assert padded.shape == (3, 64, 64)
    assert torch.equal(padded[:, :40, :61], plain)
    assert padded.sum() == pytest.approx(plain.sum().item(), rel=1e-4)


def test_mean_and_deviation_are_those_that_are_given():
    image = Image.new("RGB", (2, 2), (255, 0, 51))
    halves = Preprocessing("keep", mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5)).prepare(image)
    assert halves[:, 0, 0].tolist() == pytest.approx([1, -2, -0.6])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": "fit", "size": (4, 4)}, "expected resize one of cover"),
        ({"resize": "keep", "crop": "nyu"}, "expected resize one of cover"),
        ({"resize": "cover"}, "with size=None"),
        ({"resize": "keep", "size": (4, 4)}, "with size="),
        ({"resize": "cover", "size": (0, 4)}, "sizes of 1 or more"),
        ({"resize": "keep", "std": (1, 0, 1)}, "deviations"),
        ({"resize": "keep", "mean": (1, 0)}, "three means"),
    ],
)
def test_what_cannot_be_done_is_refused(fields, message):
    with pytest.raises(SFAError, match=message):
        Preprocessing(**fields)


def test_a_picture_is_a_file_an_image_or_an_array_and_stands_upright(tmp_path):
    image = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    for one in (str(tmp_path / "turned.png"), tmp_path / "turned.png"):
        assert np.array_equal(np.asarray(as_picture(one)), np.asarray(turned))
    with Image.open(tmp_path / "turned.png") as opened:
        assert as_picture(opened).size == (20, 30)
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(np.asarray(as_picture(grey)), np.stack([grey] * 3, -1))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SFAError, match=r"text\.png`: cannot read"):
        as_picture(tmp_path / "text.png")
