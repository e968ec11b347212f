# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.tasks import TaskBank
from tests.tasks.models import (
    MODELS,
    NAMES,
    PIXELS,
    SETTINGS,
    answer,
    make_bank,
    segmentation_model,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (budget, rho, heads)) in enumerate(SETTINGS.items()):
        config = SFAConfig(
            budget=budget,
            rho=rho,
            score="random",
            seed=seed,
            init_weights=False,
            modules_to_save=heads,
        )
        model = get_peft_model(MODELS[name](), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():  # as if the head had been trained
            if "modules_to_save" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.1 * noise)
        model.save_pretrained(root / name)
    return {name: root / name for name in SETTINGS}


@pytest.fixture(scope="session")
def expected(folders) -> dict[str | None, torch.Tensor]:
    """Outputs of each task loaded alone, and of the plain backbone."""
    found: dict[str | None, torch.Tensor] = {}
    with torch.no_grad():
        for name in NAMES:
            model = PeftModel.from_pretrained(MODELS[name](), folders[name]).eval()
            found[name] = answer(model(PIXELS))
        found[None] = segmentation_model().eval().backbone(PIXELS).feature_maps[-1]
    return found


@pytest.fixture
def bank(folders) -> TaskBank:
    return make_bank(folders)
