# SPDX-License-Identifier: Apache-2.0
"""Forgetting: what a linear probe of the frozen features loses when the features are adapted.

Ridge regression from pooled features to classes is fitted once, on the pretrained backbone. Its
accuracy on other images, now on adapted features, says how far these have drifted away from what
they were: the probe is not fitted again. Images are those of a folder with classes (as
`examples/pretrain_backbone.py` reads it, named by TRADEOFF_CLASSES), or rendered scenes, whose
class is that of the largest thing in them.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pretrain_images
import torch
from torch import Tensor, nn

from sfa_peft.dense import CLASS_NAMES, IMAGENET_MEAN, IMAGENET_STD, THING_NAMES, SceneSplit

FOLDER = "TRADEOFF_CLASSES"
CLASSES, FIT, HELD_OUT = 50, 40, 10  # classes, and images of each
SCENES = {3: 600, 4: 300}  # by seed: to fit on, held out; training and scores use 0 to 2
RIDGE = 10.0  # on standardised features


class Probe:
    """A probe of the features that a backbone has now, before it is adapted.

    Args:
        backbone: Returns feature maps.
        size: Height and width of the images that it is set up for.
    """

    def __init__(self, backbone: nn.Module, size: list[int]) -> None:
        self.source, fit, self.held_out = probe_images(min(size))
        features = _features(backbone, fit[0])
        self.mean, self.scale = features.mean(0), features.std(0) + 1e-6
        x, targets = self._ready(features), nn.functional.one_hot(fit[1]).double()
        self.offset = targets.mean(0)
        gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(gram, x.T @ (targets - self.offset))
        self.before = self.accuracy(backbone)

    def accuracy(self, backbone: nn.Module) -> float:
        """Return the share of held-out images whose class is found by a backbone's features."""
        images, labels = self.held_out
        scores = self._ready(_features(backbone, images)) @ self.weight + self.offset
        return (scores.argmax(1) == labels).double().mean().item()

    def compare(self, backbone: nn.Module) -> dict[str, Any]:
        """Return accuracy before and now, and forgetting: what has been lost."""
        now = self.accuracy(backbone)
        return {
            "forgetting": self.before - now,
            "probe accuracy": now,
            "probe accuracy frozen": self.before,
            "probe images": self.source,
        }

    def _ready(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature map of each image, averaged over it: float64 `(N, D)`."""
    backbone.eval()
    device = next(backbone.parameters()).device
    found = [
        backbone(batch.to(device)).feature_maps[-1].mean((2, 3)).double().cpu()
        for batch in images.split(50)
    ]
    return torch.cat(found)


@cache
def probe_images(side: int) -> tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return where images are from, those to fit on and those held out, with their classes."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        fit, held_out = (_scenes(seed, count, side) for seed, count in SCENES.items())
        return "rendered", fit, held_out
    images = pretrain_images.load_images(Path(folder))
    fit, held_out = (
        _of_classes(images[split], count, side)
        for split, count in (("train", FIT), ("val", HELD_OUT))
    )
    return "classes", fit, held_out


def _of_classes(images: pretrain_images.ImageSet, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Return the first images of the first classes."""
    chosen = np.concatenate([np.flatnonzero(images.labels == c)[:count] for c in range(CLASSES)])
    pictures = [pretrain_images.read_image(images, int(i)).resize((side, side)) for i in chosen]
    pixels = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(images.labels[chosen])
    return pretrain_images.normalise(pixels.float() / 255), labels


def _scenes(seed: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Return rendered scenes and the class of the largest thing in each."""
    split = SceneSplit(count, "segmentation", size=side, seed=seed)
    names, first = len(CLASS_NAMES), len(CLASS_NAMES) - len(THING_NAMES)
    pixels, labels = [], []
    for image, mask in (split[i] for i in range(count)):
        pixels.append((np.array(image, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD)
        sizes = np.bincount(np.array(mask).ravel(), minlength=names)[first:names]
        labels.append(int(sizes.argmax()))
    stacked = torch.from_numpy(np.stack(pixels).astype(np.float32)).permute(0, 3, 1, 2)
    return stacked, torch.tensor(labels)
