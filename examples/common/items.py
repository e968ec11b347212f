# SPDX-License-Identifier: Apache-2.0
"""Dataset items as pictures."""

import numpy as np
from torch import Tensor

from sfa_peft.dense import IMAGENET_MEAN, IMAGENET_STD


def picture(pixel_values: Tensor) -> np.ndarray:
    """Undo the normalisation of an image.

    Args:
        pixel_values: float `(3, H, W)`, normalised by ImageNet's mean and deviation.

    Returns:
        RGB, uint8 `(H, W, 3)`.
    """
    pixels = pixel_values.permute(1, 2, 0).cpu().numpy() * IMAGENET_STD + IMAGENET_MEAN
    return (pixels.clip(0, 1) * 255).astype(np.uint8)
