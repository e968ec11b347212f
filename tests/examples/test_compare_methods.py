# SPDX-License-Identifier: Apache-2.0
"""Methods side by side: one table, one sheet, and a mistake is said before the first run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--max_eval_samples", "4"]


@pytest.fixture
def example() -> ModuleType:
    return importlib.import_module("compare_methods")


def test_every_run_gets_a_row_a_curve_and_a_column(
    example: ModuleType, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["frozen", "sfa@0.2", "lora@0.2", "full"]
    options = ["--runs", *runs, "--backbone", str(backbone), *SHORT, "--output_dir", str(tmp_path)]

    results = example.main(options)

    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"] == [result.row for result in results]
    assert [row["method"] for row in content["rows"]] == ["frozen", "SFA 20%", "LoRA 20%", "full"]
    shares = [row["trainable_share"] for row in content["rows"]]
    assert (shares[0], shares[-1]) == (0, 1)
    assert all(0.1 < share <= 0.2 for share in shares[1:-1])
    files = ["frozen/trained", "sfa_20/adapter_model", "lora_20/adapter_model", "full/model"]
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in files]
    assert [row["bytes"] for row in content["rows"]] == sizes
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert len(lines) == 6
    assert all(f"{size:,}" in line for size, line in zip(sizes, lines[2:], strict=True))
    assert all(f"{size:,}" in printed for size in sizes)
    assert [list(result.columns) for result in results] == [
        ["input", "truth", row["method"]] for row in content["rows"]
    ]
    widths = []
    for folder in (tmp_path / "frozen", tmp_path):
        with Image.open(folder / "predictions.png") as image:
            widths.append(image.width)
        assert (folder / "training.png").is_file()
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.05)  # 6 columns and 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "linear"], "--runs linear: expected one of frozen, sfa"),
        (["--runs", "full@0.2"], "--runs full@0.2: full has no budget"),
        (["--runs", "ssf@0.2"], "--runs ssf@0.2: ssf has no budget"),
        (["--budget", "0.2"], "--budget: say it in --runs"),
        (["--method=sfa"], "--method: say it in --runs"),
        (["--runs", "frozen", "sfa@lots"], "--budget: invalid float value: 'lots'"),
        (["--runs", "frozen", "lora@0.001"], "LoRA of rank 1 already has"),
        (["--steps", "3"], "unknown options: --steps 3"),
        (["--learning_rat=3"], "unknown options: --learning_rat=3; did you mean --learning_rate?"),
        (["--task", "sorting"], "invalid choice: 'sorting'"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_run(
    options: list[Any],
    message: str,
    example: ModuleType,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    training = importlib.import_module("common.training")
    options = [*options, "--backbone", str(backbone), *SHORT, "--output_dir", "out"]

    with pytest.raises(SystemExit) as stopped:
        training.run_script(lambda: example.main(options))

    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not Path("out").exists()
