# SPDX-License-Identifier: Apache-2.0
"""One run: a plain loop, validation on the way, the test data at the end.

Data, model, head, metric and methods are those of the example scripts.
"""

from __future__ import annotations

import importlib
import logging
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from statistics import fmean, median
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from common.arguments import METHODS
from common.maps import MapScoring
from common.methods import Prepared, as_prepared, prepare_method, save_method, saved_size
from common.training import make_optimizer
from cost_worker import Memory
from peft import get_peft_config, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup, set_seed
from transformers.utils.logging import disable_progress_bar

import sfa_peft

from .experiments import Experiment
from .probe import Probe
from .store import Run
from .tasks import TASKS, TaskSet

#: Shares of a run after which it is validated: where the curve gets flat.
CURVE = (0.5, 0.75, 1.0)
#: Probes by task set.
_PROBES: dict[str, Probe] = {}
#: Rendered scenes by task set, of the last two.
_SCENES: dict[Any, list[Any]] = {}
PACKAGES = ("peft", "transformers", "torch", "numpy")


def run_experiment(run: Run, experiment: Experiment, task: TaskSet | None = None) -> dict[str, Any]:
    """Train and evaluate; return the result in the form of PEFT's `method_comparison`.

    Args:
        run: What to run.
        experiment: The one that the run names.
        task: The one that the run names; None to look it up.

    Raises:
        SFAError: If the data cannot be read.
    """
    task = task or TASKS[run.task]
    began, cpu = time.perf_counter(), time.process_time()
    trial = Trial(run, experiment, task)
    error, info = "", {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            other = experiment.params.get("selection_of")
            if other is not None:
                Trial(run._replace(task=other), experiment, TASKS[other]).run(Path(folder, other))
                trial.args.selection_from = str(Path(folder, other))
            info = trial.run(Path(folder, "adapter"))
    except (sfa_peft.BudgetError, FloatingPointError) as failure:  # part of the result
        error = f"{type(failure).__name__}: {failure}"
    return {
        "run_info": {
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "total_time": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "experiment_name": run.experiment,
            "train_config": {**run._asdict(), **changed(trial.script, trial.args)},
            "peft_config": experiment.config,
            "error_msg": error,
        },
        "train_info": {"status": "failed" if error else "success", "metrics": [], **info},
        "meta_info": {
            "model_info": {"backbone": Path(trial.args.backbone).name, "head": task.script},
            "dataset_info": {"name": task.name, "is_rendered": task.folder is None},
            "package_info": {
                "sfa-peft": sfa_peft.__version__,
                **{name: version(name) for name in PACKAGES},
            },
            "system_info": {"machine": platform.machine(), "system": platform.system()},
            "pytorch_info": {"device": str(trial.device), "threads": torch.get_num_threads()},
        },
    }


def make_arguments(script: ModuleType, run: Run, experiment: Experiment, task: TaskSet) -> Any:
    """Return the checked arguments of the task's script for a run."""
    params = dict(experiment.params)
    for name in ("own_rates", "selection_of"):
        params.pop(name, None)
    ratio = params.pop("external_lr_ratio", 1.0)
    method = (
        {"method": experiment.method} if "peft_type" in experiment.config else experiment.config
    )
    args = script.Arguments(
        **task.options
        | method
        | params
        | {
            "dataset_name": task.data_folder,
            "learning_rate": run.backbone_rate,
            "external_learning_rate": run.backbone_rate * ratio,
            "head_learning_rate": run.head_rate,
            "seed": run.seed,
        }
    )
    args.check()
    if args.method not in METHODS:
        raise sfa_peft.ConfigError(f"{experiment.id}: no method of the scripts: {args.method}")
    return args


def changed(script: ModuleType, args: Any) -> dict[str, Any]:
    """Return the arguments that are not a script's own, but for paths and rates."""
    usual = vars(script.Arguments()) | {"eval_size": args.image_size}
    # Said elsewhere, or a matter of this machine.
    told = {"dataset_name", "has_size", "seed", "selection_from"}
    found = {
        name: value
        for name, value in vars(args).items()
        if value != usual[name] and name not in told and not name.endswith("learning_rate")
    }
    return found | {"max_steps": args.max_steps, "external_rate": args.external_learning_rate}


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the backbone of a task model, adapted or not."""
    found = sfa_peft.find_backbone(model)
    if found is None:
        raise sfa_peft.TargetError(f"{type(model).__name__}: no known backbone inside")
    return found.module


def prepare(base: nn.Module, args: Any, config: dict[str, Any]) -> Prepared:
    """Make a task model ready for an experiment's config."""
    if "peft_type" not in config:
        ready = prepare_method(base, args)
    else:
        size = sum(p.numel() for p in backbone_of(base).parameters())
        head = sfa_peft.head_modules(base)
        model = get_peft_model(base, get_peft_config({**config, "modules_to_save": head}))
        ready = as_prepared(model, base, size, [])
    for adapter in getattr(ready.model, "peft_config", {}).values():
        if hasattr(adapter, "total_steps"):
            adapter.total_steps = args.max_steps  # the run's length, as AdaLoRA's `total_step`
    return ready


def warm(run: Run) -> None:
    """Make what all runs of a task set have in common, before they are forked."""
    if run.task in _PROBES:
        return
    disable_progress_bar()
    logging.getLogger("sfa_peft").setLevel(logging.ERROR)  # rounds are short here, each run says
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no use for this process's threads, and may wait for them
    trial = Trial(run, Experiment("frozen", "all", {"method": "frozen"}, {}), TASKS[run.task])
    trial.probe(trial.script.make_model(trial.args, trial.data))
    torch.set_num_threads(threads)


def kept_scenes(key: Any, split: Any) -> list[Any]:
    """Return a split's scenes, which are the same for all runs, rendered once."""
    if key not in _SCENES:
        while len(_SCENES) > 1:
            _SCENES.pop(next(iter(_SCENES)))
        _SCENES[key] = [split[i] for i in range(len(split))]
    return _SCENES[key]


class Trial:
    """The course of one run.

    Args:
        run: What is run.
        experiment: The one that the run names.
        task: The task set.
    """

    def __init__(self, run: Run, experiment: Experiment, task: TaskSet) -> None:
        self.script, self.experiment = importlib.import_module(task.script), experiment
        self.args = make_arguments(self.script, run, experiment, task)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = self.script.load_data(replace(self.args, split="validation"))
        self.task, self.is_rendered = task.name, task.folder is None
        if self.is_rendered:
            self.data.train.split = kept_scenes(
                (task.name, len(self.data.train)), self.data.train.split
            )
        self.scoring = self.script.scoring(self.args, self.data)
        self.metrics: list[dict[str, Any]] = []

    def run(self, folder: Path) -> dict[str, Any]:
        """Train, evaluate and save; return `train_info`.

        Args:
            folder: Where to save.

        Raises:
            FloatingPointError: If the loss is not finite.
            BudgetError: If the budget is too small for the method.
        """
        set_seed(self.args.seed)
        base = self.script.make_model(self.args, self.data).to(self.device)
        probe = self.probe(base)
        self.ready = ready = prepare(base, self.args, self.experiment.config)
        seconds = self._train(probe)
        save_method(ready, self.args, folder)
        return {
            "metrics": self.metrics,
            "accelerator_memory_max": seconds.pop("peak"),
            **seconds,
            "file_size": saved_size(folder),
            "num_trainable_params": sum(p.numel() for p in (*ready.head, *ready.adapted)),
            "num_total_params": sum(p.numel() for p in base.parameters()),
            "backbone_params": ready.backbone_size,
            "trained_share": ready.share,
            **self._selected(),
        }

    def probe(self, base: nn.Module) -> Probe:
        """Return the task set's probe, fitted on a model that is not adapted yet."""
        if self.task not in _PROBES:
            _PROBES[self.task] = Probe(backbone_of(base), self.args.image_size)
        return _PROBES[self.task]

    def _train(self, probe: Probe) -> dict[str, float]:
        """Train; return seconds and bytes."""
        ready, args = self.ready, self.args
        rates = self.script.rates(args)
        optimizer = make_optimizer(ready, rates, args)
        warmup = args.max_steps // 20 if args.warmup_steps is None else args.warmup_steps
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, warmup), args.max_steps)
        trained = [*ready.head, *ready.adapted]
        acts = hasattr(getattr(ready.model, "base_model", None), "update_and_allocate")
        validation = self._kept(self.data.evaluation)
        stops = {max(1, round(share * args.max_steps)) for share in CURVE}
        wall, cpu, losses = [], [], []
        memory = Memory(self.device.type)
        memory.reset()
        before = memory.now()
        for step, batch in enumerate(islice(self._batches(), args.max_steps), 1):
            started, started_cpu = time.perf_counter(), time.process_time()
            ready.model.train()
            loss = ready.model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            if acts:
                ready.model.base_model.update_and_allocate(step)
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} after step {step}")
            if step in stops:
                scores = self._evaluate(validation)
                self._note(step, "valid", scores, **{"train loss": fmean(losses[-20:])})
        peak = memory.peak() - before
        test = self.script.load_data(replace(args, split="test")).evaluation
        self._note(
            args.max_steps, "test", self._evaluate(test), **probe.compare(backbone_of(ready.base))
        )
        return {
            "peak": peak,
            "train_time": round(sum(wall), 2),
            "step_seconds": round(median(wall), 5),
            "step_cpu_seconds": round(median(cpu), 5),
        }

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches without end, epoch after epoch."""
        generator = torch.Generator().manual_seed(self.args.seed)
        loader = DataLoader(
            self.data.train,
            self.args.per_device_train_batch_size,
            shuffle=True,
            generator=generator,
            collate_fn=self.scoring.trainer_options(self.data).get("collator"),
        )
        for epoch in count():
            self.data.train.set_epoch(epoch)
            for batch in loader:
                yield {name: self._moved(value) for name, value in batch.items()}

    def _kept(self, data: Dataset[dict[str, Any]]) -> Any:
        """Return data that is looked at again and again: of small scenes the items themselves."""
        return [data[i] for i in range(len(data))] if self.is_rendered else data

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {name: self._moved(inner) for name, inner in value.items()}
        return [self._moved(inner) for inner in value] if isinstance(value, list) else value

    def _evaluate(self, data: Dataset[dict[str, Any]]) -> dict[str, float]:
        """Return the scores of the model as it is."""
        model, scoring = self.ready.model.eval(), self.scoring
        if not isinstance(scoring, MapScoring):
            return scoring.evaluate(SimpleNamespace(model=model), data)
        scoring.metric.reset()
        for batch in DataLoader(data, 8 if scoring.one_size else 1):
            labels = batch["labels"]
            pixels = batch["pixel_values"].to(self.device)
            with torch.no_grad():
                maps = scoring.plain(model, pixels, tuple(labels.shape[-2:]))
            scoring.metric.update(scoring.at_labels(maps, labels).cpu().numpy(), labels.numpy())
        return scoring.metric.compute()

    def _note(self, step: int, split: str, scores: dict[str, float], **more: Any) -> None:
        """Add scores to the metrics: those of the table, json has no NaN."""
        shown = {f"{split} {key}": scores[key] for key in self.scoring.headers.values()}
        numbers = shown | more
        self.metrics.append(
            {"step": step} | {k: _json_number(value) for k, value in numbers.items()}
        )

    def _selected(self) -> dict[str, Any]:
        """Return the selected share of each block's weights, where weights are selected."""
        model = self.ready.model
        configs = getattr(model, "peft_config", {}).values()
        if not any(isinstance(config, sfa_peft.SFAConfig) for config in configs):
            return {}
        rows: dict[Any, list[int]] = {}
        for row in sfa_peft.selection_summary(model):
            counts = rows.setdefault("other" if row["layer"] is None else row["layer"] + 1, [0, 0])
            counts[0] += row["selected"]
            counts[1] += row["numel"]
        return {"selected": {str(k): round(a / b, 5) for k, (a, b) in rows.items()}}


def _json_number(value: Any) -> Any:
    if isinstance(value, (int, str)):
        return value
    return round(float(value), 6) if math.isfinite(value) else None
