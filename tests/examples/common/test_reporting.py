# SPDX-License-Identifier: Apache-2.0
"""What goes to the Hub, and tables as people read them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from sfa_peft.errors import SFAError

SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--max_eval_samples", "4"]


@pytest.fixture
def reporting() -> ModuleType:
    return importlib.import_module("common.reporting")


def test_a_run_is_uploaded_without_its_checkpoints(
    reporting: ModuleType, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **options: Any) -> None:
            uploaded.update(options)

    monkeypatch.setattr(reporting, "HfApi", Api)
    out = tmp_path / "roads"
    options = ["--backbone", str(backbone), "--budget", "0.2", "--output_dir", str(out)]
    example = importlib.import_module("semantic_segmentation")

    example.main([*options, *SHORT, "--save_steps", "2", "--push_to_hub"])

    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/roads", out)
    there = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert any(name.startswith("checkpoint-4") for name in there)
    sent = list(filter_repo_objects(there, ignore_patterns=uploaded["ignore_patterns"]))
    assert sent == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "predictions.png",
        "results.json",
        "selection.png",
        "task.json",
        "training.png",
    ]


def test_a_folder_with_another_run_is_refused_or_cleared_of_it(
    reporting: ModuleType, tmp_path: Path
) -> None:
    shared = importlib.import_module("common.arguments").SharedArguments
    out = tmp_path / "out"
    reporting.open_output(shared(output_dir=str(out)))  # there is none yet
    (out / "checkpoint-4").mkdir(parents=True)
    for name in ("task.json", "scores.png", "trained.safetensors", "notes.txt"):
        (out / name).touch()

    with pytest.raises(SFAError, match=r"holds another run \(checkpoint-4, scores.png, task.json"):
        reporting.open_output(shared(output_dir=str(out)))
    reporting.open_output(shared(output_dir=str(out), resume_from_checkpoint="last"))
    assert len(list(out.iterdir())) == 5
    again = {"output_dir": str(out), "overwrite_output_dir": True}
    with pytest.raises(SFAError, match="would remove --selection_from"):
        reporting.open_output(shared(selection_from=str(out), **again))
    reporting.open_output(shared(**again))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]  # what no run has written
    reporting.open_output(shared(output_dir=str(out)))


def test_tables_are_aligned_and_markdown_where_asked_for(reporting: ModuleType) -> None:
    def result(name: str, share: float, score: float | None, size: int) -> Any:
        row = {"method": name, "trainable_share": share, "scores": {"a": score}, "bytes": size}
        return reporting.Result(name, row, {"A": "a"}, ([], []), {}, {}, print)

    results = [result("SFA 5%", 0.0496, 0.5, 12345), result("full", 1.0, None, 1)]
    assert reporting.table(results).splitlines() == [
        "method  trainable      A  bytes per task",
        "SFA 5%       5.0%  0.500          12,345",
        "full       100.0%      -               1",
    ]
    assert reporting.table(results, " | ").splitlines()[1:3] == [
        "| ------ | --------- | ----- | -------------- |",
        "| SFA 5% |      5.0% | 0.500 |         12,345 |",
    ]


def test_an_interrupted_write_leaves_the_old_file(
    reporting: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    reporting.write_text(path, "old")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reporting.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        reporting.write_text(path, "new")
    assert path.read_text() == "old"


def test_scores_while_training_are_kept_and_drawn(backbone: Path, tmp_path: Path) -> None:
    example = importlib.import_module("semantic_segmentation")
    options = ["--backbone", str(backbone), "--budget", "0.2", "--output_dir", str(tmp_path)]

    result = example.main([*options, *SHORT, "--eval_steps", "2"])

    steps, scores = result.row["progress"]["mIoU"]
    assert steps == [2, 4]
    assert scores[-1] == result.row["scores"]["mean_iou"]
    assert (tmp_path / "scores.png").is_file()


def test_scores_while_training_are_refused_where_a_task_has_none(
    backbone: Path, tmp_path: Path
) -> None:
    example = importlib.import_module("object_detection")
    options = ["--backbone", str(backbone), "--budget", "0.2", "--output_dir", str(tmp_path)]
    with pytest.raises(SFAError, match="--eval_steps"):
        example.main([*options, *SHORT, "--eval_steps", "2"])
