# SPDX-License-Identifier: Apache-2.0
"""The example scripts as a user has them: imported from their folder, with a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Swinv2ForImageClassification

from tests.image_sizes import write_folder
from tests.tiny import swinv2_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _as_if_started_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python examples/...` does
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    Swinv2ForImageClassification(swinv2_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    swinv2_config(depths=[1, 1], num_heads=[1, 2], out_features=None).save_pretrained(
        tmp_path / "config"
    )
    return tmp_path / "config"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Own data whose images have sizes of their own."""
    return write_folder(tmp_path / "data")
