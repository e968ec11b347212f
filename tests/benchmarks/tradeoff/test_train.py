# SPDX-License-Identifier: Apache-2.0
"""A run as it is, on a few scenes."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_config

from benchmarks.tradeoff import probe, train
from benchmarks.tradeoff.experiments import Experiment, load_experiments
from benchmarks.tradeoff.store import Run, Store, run_of, score
from benchmarks.tradeoff.tasks import TASKS
from benchmarks.tradeoff.train import run_experiment

SMALL = {"max_steps": 6, "per_device_train_batch_size": 2, "max_eval_samples": 4}
SFA = {
    "peft_type": "SFA",
    "budget": 0.05,
    "rho": 0.25,
    "selection_steps": 1,
    "target_parameters": ["bias"],
}
#: What PEFT's scripts for `method_comparison` read.
KEYS = {
    "run_info": {"created_at", "total_time", "experiment_name", "train_config", "peft_config",
                 "error_msg"},
    "train_info": {"accelerator_memory_max", "train_time", "file_size", "num_trainable_params",
                   "num_total_params", "status", "metrics"},
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}  # fmt: skip


def small(task, **options):
    return replace(TASKS[task], options=TASKS[task].options | SMALL | options)


def run(task="segmentation", config=None, **params):
    experiment = Experiment("sfa", "5pct", config or SFA, params)
    wanted = Run(task, experiment.id, 4e-3, 6e-3, 0)
    return wanted, run_experiment(wanted, experiment, small(task))


@pytest.fixture(scope="module", autouse=True)
def _few_images_for_the_probe():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_PROBES", {})
        patch.setattr(probe, "SCENES", {3: 40, 4: 20})
        patch.delenv(probe.FOLDER, raising=False)
        yield
    probe.probe_images.cache_clear()


@pytest.fixture(scope="module")
def made():
    return run()


def test_the_result_has_the_form_of_pefts_method_comparison(made, tmp_path):
    wanted, result = made
    for part, keys in KEYS.items():
        assert keys <= set(result[part])
    assert result["train_info"]["status"] == "success"
    assert run_of(json.loads(json.dumps(result, allow_nan=False))) == wanted
    Store(tmp_path).write(wanted, result)
    assert len(Store(tmp_path).path(wanted).read_bytes()) < 4000


def test_validation_is_on_the_way_and_the_test_data_at_the_end(made):
    metrics = made[1]["train_info"]["metrics"]
    assert [m["step"] for m in metrics] == [3, 4, 6, 6]
    assert [("valid mean_iou" in m, "test mean_iou" in m) for m in metrics] == [
        *[(True, False)] * 3,
        (False, True),
    ]
    assert score(made[1], "valid", "mean_iou") == metrics[2]["valid mean_iou"]
    assert {"forgetting", "probe accuracy"} <= set(metrics[-1])


def test_the_selection_is_made_by_update_and_allocate_alone(made):
    info = made[1]["train_info"]
    assert any(share > 0 for share in info["selected"].values())
    assert 0.049 < info["trained_share"] <= 0.05


def test_the_same_run_gives_the_same_scores_again(made):
    assert run()[1]["train_info"]["metrics"] == made[1]["train_info"]["metrics"]


@pytest.mark.parametrize("method", ["frozen", "full", "lora"])
def test_methods_of_the_scripts_run_as_they_are(method):
    config = {"method": method} | ({} if method in ("frozen", "full") else {"budget": 0.05})
    _, result = run(config=config)
    info = result["train_info"]
    assert info["status"] == "success"
    assert info["trained_share"] == {"frozen": 0, "full": 1}.get(
        method, pytest.approx(0.05, abs=5e-3)
    )
    assert method != "frozen" or info["metrics"][-1]["forgetting"] == 0


@pytest.mark.parametrize("task", ["depth", "detection", "instances"])
def test_other_tasks_run_with_their_own_metric(task):
    _, result = run(task, config={"method": "frozen"})
    assert result["train_info"]["status"] == "success"
    assert any(f"test {TASKS[task].metric}" in m for m in result["train_info"]["metrics"])


def test_parameters_of_an_experiment_override_those_of_the_task_set():
    _, result = run(
        config={"method": "sfa", "budget": 0.05}, weight_decay=0.0, external_lr_ratio=0.5
    )
    config = result["run_info"]["train_config"]
    assert config["weight_decay"] == 0
    assert config["external_rate"] == 2e-3


@pytest.mark.parametrize("experiment", load_experiments().values(), ids=lambda e: e.id)
def test_every_experiment_is_one_that_the_scripts_and_peft_know(experiment):
    wanted = Run("segmentation", experiment.id, 4e-3, 6e-3, 0)
    script = importlib.import_module("semantic_segmentation")
    train.make_arguments(script, wanted, experiment, TASKS["segmentation"])
    if "peft_type" in experiment.config:
        get_peft_config(dict(experiment.config))


def test_a_selection_of_another_task_set_is_trained_as_it_is(monkeypatch):
    monkeypatch.setitem(TASKS, "segmentation", small("segmentation"))
    config = {"method": "sfa", "budget": 0.05, "selection_steps": 2}
    selected = [
        run(task, config=config, **params)[1]["train_info"]["selected"]
        for task, params in (
            ("segmentation", {}),
            ("depth", {}),
            ("depth", {"selection_of": "segmentation"}),
        )
    ]
    assert selected[2] == selected[0] != selected[1]


def test_a_budget_that_is_too_small_is_a_result(made):
    _, result = run(config={"method": "lora", "budget": 1e-5})
    assert result["train_info"]["status"] == "failed"
    assert "BudgetError" in result["run_info"]["error_msg"]
    assert score(result, "valid", "mean_iou") is None


def test_a_loss_that_is_not_finite_is_a_result(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda _: float("nan"))
    _, result = run(config={"method": "frozen"})
    assert "FloatingPointError" in result["run_info"]["error_msg"]
