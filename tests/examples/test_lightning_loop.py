# SPDX-License-Identifier: Apache-2.0
"""The example with Lightning: trained, stopped after an epoch and taken up again."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's, of torch
    pytest.mark.filterwarnings("default::UserWarning:lightning"),
]


def test_a_run_leaves_an_adapter_and_goes_on_from_its_checkpoint(
    backbone: Path, tmp_path: Path
) -> None:
    script = importlib.import_module("lightning_loop")
    options = {"backbone": backbone, "train_images": 8, "batch_size": 2, "eval_images": 2}
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]

    scores = script.main([*argv, "--max_epochs", "2", "--output_dir", str(tmp_path / "a")])

    assert 0 <= scores["mean_iou"] <= 1
    assert scores["sfa_selected"] == 1
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")
    again = ["--ckpt_path", str(tmp_path / "a" / "last.ckpt"), "--max_epochs", "2"]
    script.main([*argv, *again, "--output_dir", str(tmp_path / "b")])  # nothing is left to do
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
