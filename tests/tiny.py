# SPDX-License-Identifier: Apache-2.0
"""Small models that many tests share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Swinv2Config, UperNetConfig, UperNetForSemanticSegmentation

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def swinv2_config(**changes) -> Swinv2Config:
    options = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "out_features": STAGES,
        "drop_path_rate": 0.0,
    }
    return Swinv2Config(**(options | changes))


def upernet(seed: int = 0, num_labels: int = 3, **changes) -> UperNetForSemanticSegmentation:
    torch.manual_seed(seed)
    config = UperNetConfig(
        backbone_config=swinv2_config(**changes),
        hidden_size=16,
        num_labels=num_labels,
        use_auxiliary_head=False,
    )
    return UperNetForSemanticSegmentation(config)


def images(count: int = 2, size: int = 32, seed: int = 1, num_labels: int = 3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 3, size, size, generator=generator),
        "labels": torch.randint(0, num_labels, (count, size, size), generator=generator),
    }


class MLP(nn.Module):
    """Two hidden layers: small enough to check every weight at every step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
