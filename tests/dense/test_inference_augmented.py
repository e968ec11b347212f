# SPDX-License-Identifier: Apache-2.0
"""Multi-scale, flip and shifted-window averages, against each written out one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from sfa_peft.dense.inference import sliding_window_maps
from sfa_peft.dense.inference_augmented import SCALES, multi_scale_probabilities, predict_depth
from sfa_peft.errors import SFAError


def images(height: int, width: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(batch, 3, height, width, generator=generator)


class Lopsided(torch.nn.Module):
    """Three classes at half the size; a kernel that knows left from right."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, 3, 3, generator=generator))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(logits=functional.conv2d(pixel_values, self.weight, None, 2, 1))


class Queries(Lopsided):
    """The same, as two mask queries over two classes and "no object"."""

    def forward(self, pixel_values: torch.Tensor) -> Any:
        logits = super().forward(pixel_values).logits
        classes = logits.mean((2, 3))[:, None].expand(-1, 2, -1)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=logits[:, :2])


class Depth(Lopsided):
    """The same, as depth."""

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(predicted_depth=super().forward(pixel_values).logits[:, 0].exp())


def bilinear(maps: torch.Tensor, size: Any) -> torch.Tensor:
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def naive_multi_scale(
    model: Lopsided, pixels: torch.Tensor, size: tuple[int, int], flip: bool
) -> torch.Tensor:
    """One image, one scale, one side at a time, without any helper of the package."""
    height, width = pixels.shape[-2:]
    answers = []
    for scale in SCALES:
        scaled = (int(height * scale + 0.5), int(width * scale + 0.5))
        for mirrored in (False, True)[: 1 + flip]:
            image = bilinear(pixels, scaled)
            image = torch.flip(image, [3]) if mirrored else image
            right, below = -scaled[1] % 4, -scaled[0] % 4
            outputs = model(functional.pad(image, (0, right, 0, below)))
            padded = (scaled[0] + below, scaled[1] + right)
            if hasattr(outputs, "logits"):
                maps = bilinear(outputs.logits, padded)
            else:
                shares = outputs.class_queries_logits.softmax(-1)[:, :, :2]
                inside = bilinear(outputs.masks_queries_logits, padded).sigmoid()
                maps = (shares[..., None, None] * inside[:, :, None]).sum(1)
            maps = maps[:, :, : scaled[0], : scaled[1]]
            maps = bilinear(torch.flip(maps, [3]) if mirrored else maps, size)
            answers.append(maps.softmax(1) if hasattr(outputs, "logits") else maps)
    return sum(answers[1:], answers[0]) / len(answers)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", [Lopsided, Queries])
def test_probabilities_are_the_mean_over_scales_and_sides(kind: Any, flip: bool) -> None:
    model, pixels = kind().eval(), images(10, 13, batch=2)
    with torch.no_grad():
        expected = naive_multi_scale(model, pixels, (21, 25), flip)

    actual = multi_scale_probabilities(model, pixels, size=(21, 25), flip=flip, size_divisor=4)

    torch.testing.assert_close(actual, expected)


@given(st.integers(4, 12), st.integers(4, 12))
def test_probabilities_sum_to_one_and_a_mirrored_image_gives_the_mirrored_answer(
    height: int, width: int
) -> None:
    model, pixels = Lopsided().eval(), images(height, width)

    there = multi_scale_probabilities(model, pixels)
    back = multi_scale_probabilities(model, pixels.flip(-1)).flip(-1)

    torch.testing.assert_close(there.sum(1), torch.ones(1, height, width))
    torch.testing.assert_close(there, back)


def test_one_scale_without_flip_is_the_plain_prediction() -> None:
    model, pixels = Lopsided().eval(), images(8, 8)

    plain = bilinear(model(pixels).logits, (8, 8)).softmax(1).detach()

    torch.testing.assert_close(
        multi_scale_probabilities(model, pixels, scales=(1.0,), flip=False), plain
    )


def test_windows_slide_at_each_scale() -> None:
    model, pixels = Lopsided().eval(), images(8, 10)
    windows = {"crop_size": 6, "stride": 4}
    expected = torch.zeros(1, 3, 8, 10)
    for size in ((8, 10), (12, 15)):
        for mirrored in (False, True):
            image = bilinear(pixels, size)
            image = image.flip(-1) if mirrored else image
            logits = sliding_window_maps(model, image, **windows).values
            logits = logits.flip(-1) if mirrored else logits
            expected += bilinear(logits, (8, 10)).softmax(1) / 4

    actual = multi_scale_probabilities(model, pixels, scales=(1.0, 1.5), **windows)

    torch.testing.assert_close(actual, expected)


def test_images_of_a_batch_do_not_mix_and_half_precision_stays_with_the_model() -> None:
    model, pixels = Lopsided().eval().to(torch.bfloat16), images(8, 8, batch=3).bfloat16()

    together = multi_scale_probabilities(model, pixels)

    assert together.dtype == torch.float32
    alone = torch.cat([multi_scale_probabilities(model, image[None]) for image in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-2)


def naive_shifts(model: Depth, pixels: torch.Tensor, num_shifts: int, flip: bool) -> torch.Tensor:
    """MIM-Depth's test, window by window; nan where it covers nothing."""
    height, width = pixels.shape[-2:]
    interval = (width - height) // (num_shifts - 1)
    total, count = torch.zeros(1, height, width), torch.zeros(1, height, width)
    for i in range(num_shifts):
        window = pixels[..., i * interval : i * interval + height]
        depth = bilinear(model(window).predicted_depth[None], (height, height))[0]
        if flip:
            mirrored = model(window.flip(3)).predicted_depth[None]
            depth = (depth + bilinear(mirrored, (height, height))[0].flip(2)) / 2
        total[..., i * interval : i * interval + height] += depth
        count[..., i * interval : i * interval + height] += 1
    return (total / count).detach()


@given(st.integers(4, 8), st.integers(1, 20), st.integers(2, 6), st.booleans())
def test_depth_equals_the_shifted_windows_of_mim_depth(
    height: int, wider: int, num_shifts: int, flip: bool
) -> None:
    num_shifts = min(num_shifts, wider + 1)
    interval, rest = divmod(wider, num_shifts - 1)
    assume(max(interval, rest) <= height)  # else there are gaps, refused below
    model, pixels = Depth().eval(), images(height, height + wider)

    depth = predict_depth(model, pixels, num_shifts=num_shifts, flip=flip)

    expected = naive_shifts(model, pixels, num_shifts, flip)
    covered = ~expected.isnan()
    torch.testing.assert_close(depth[covered], expected[covered])
    last = predict_depth(model, pixels[..., -height:], flip=flip)
    filled = torch.zeros(1, height, height + wider)
    filled[..., -height:] = last
    torch.testing.assert_close(depth[~covered], filled[~covered])


def test_the_windows_of_kitti_leave_nine_columns_that_are_filled() -> None:
    depth = predict_depth(
        lambda pixel_values: {"predicted_depth": pixel_values[:, 0]},
        images(352, 1216),
        num_shifts=16,
    )

    torch.testing.assert_close(depth, images(352, 1216)[:, 0])


def test_depth_is_averaged_with_its_mirror_image_at_the_size_of_the_image() -> None:
    model, pixels = Depth().eval(), images(6, 8, batch=2)
    plain = bilinear(model(pixels).predicted_depth[:, None], (6, 8))[:, 0].detach()
    mirror = bilinear(model(pixels.flip(3)).predicted_depth[:, None], (6, 8))[:, 0].detach()

    torch.testing.assert_close(predict_depth(model, pixels, flip=False), plain)
    torch.testing.assert_close(predict_depth(model, pixels), (plain + mirror.flip(2)) / 2)


def test_bad_settings_are_refused() -> None:
    pixels = images(8, 8)
    with pytest.raises(SFAError, match="scales is empty"):
        multi_scale_probabilities(Lopsided().eval(), pixels, scales=())
    with pytest.raises(SFAError, match=r"scale 0\.01 makes 8x8 images 0x0"):
        multi_scale_probabilities(Lopsided().eval(), pixels, scales=(0.01,))
    with pytest.raises(SFAError, match="use predict_depth"):
        multi_scale_probabilities(Depth().eval(), pixels)
    with pytest.raises(SFAError, match="the model predicts logits"):
        predict_depth(Lopsided().eval(), pixels)
    with pytest.raises(SFAError, match="wider than high"):
        predict_depth(Depth().eval(), pixels, num_shifts=2)
    with pytest.raises(SFAError, match="leave gaps"):
        predict_depth(Depth().eval(), images(4, 16), num_shifts=3)
    assert predict_depth(Depth().eval(), images(4, 16), num_shifts=4).isfinite().all()
    with pytest.raises(SFAError, match="leave gaps"):
        predict_depth(Depth().eval(), images(2, 23), num_shifts=12)  # ten columns at the end
    with pytest.raises(SFAError, match="2 or more"):
        predict_depth(Depth().eval(), images(4, 8), num_shifts=1)
    with pytest.raises(SFAError, match=r"expected images"):
        multi_scale_probabilities(Lopsided().eval(), pixels[0])
    with pytest.raises(SFAError, match=r"model\.eval\(\)"):
        multi_scale_probabilities(Lopsided(), pixels)
