# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can tell, on one card and within eight minutes: results as JSON.

    python benchmarks/gpu_check.py --output out/gpu.json

Exact reloads and switches, the same selection twice, mixed precision, compiled models, waits of
the host as torch itself sees them, and what a step, a pick and a switch cost. On a machine without
a card the same code runs on a tiny model on the CPU, which shows that it runs and nothing else. The
exit status is 1 if something is not as it must be.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that runs can be repeated

import torch
from cost import machine
from cost_cases import SFA_METHODS, Case
from cost_models import make_task
from cost_worker import Job, backend_settings
from gpu_runs import (
    Place,
    adapt,
    answer,
    chosen,
    counted_waits,
    cut,
    forward_turns,
    loaded_models,
    one_rank,
    save,
    share_of_same,
    train,
)
from peft import PeftModel
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainingArguments

from sfa_peft import SFACallback

ROOT = Path(__file__).resolve().parents[1]
Findings = Iterator[tuple[str, dict[str, Any]]]


def reload(place: Place) -> Findings:
    """A saved adapter answers like the trained one, to the bit."""
    kinds: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "float32": (torch.float32, {}),
        "bfloat16": (torch.bfloat16, {}),
        "rows": (torch.float32, {"granularity": "row"}),
        "bfloat16 scores": (torch.float32, {"score_dtype": "bfloat16"}),
    }
    for name, (dtype, options) in kinds.items():
        model = adapt(place.task(dtype), **options)
        selector, _ = train(place, model)
        again = PeftModel.from_pretrained(place.task(dtype), save(model))
        same = torch.equal(answer(place, model), answer(place, again))
        yield name, {"ok": same and selector.selected_share > 0.9}


def switching(place: Place) -> Findings:
    """Adapters replace each other, and leave, to the bit."""
    folders = []
    for seed in (1, 2):
        model = adapt(place.task(), score="random", seed=seed)
        train(place, model, steps=4)
        folders.append(save(model))
    model = PeftModel.from_pretrained(place.task(), folders[0], "a")
    model.load_adapter(folders[1], "b")
    answers = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        answers[name] = answer(place, model)
    exact = not torch.equal(answers["a"], answers["b"])
    for name in ("b", "a") * 10:
        model.set_adapter(name)
        exact = exact and torch.equal(answer(place, model), answers[name])
    model.merge_adapter()
    merged = torch.equal(answer(place, model), answers["a"])
    model.unmerge_adapter()
    with model.disable_adapter():
        backbones = [net.backbone.eval() for net in (model.get_base_model(), place.task())]
        with torch.no_grad():
            bare = [net(place.images()).feature_maps[-1] for net in backbones]
    yield "switches", {"ok": exact, "merged": merged, "pretrained": torch.equal(*bare)}
    yield "back to the pretrained weights", {"ok": merged and torch.equal(*bare)}


def repeat(place: Place) -> Findings:
    """Two runs select the same; to the last weight where torch is told to be deterministic."""
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            runs = [train(place, adapt(place.task())) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        same = share_of_same(*(chosen(selector) for selector, _ in runs))
        alike = runs[0][1] == runs[1][1]
        ok = same > 0.9 if not deterministic else same == 1 and alike
        kind = "deterministic" if deterministic else "as it is"
        yield kind, {"ok": ok, "same selection": same, "same losses": alike}


def optimizers(place: Place) -> Findings:
    """Every implementation of AdamW trains alike."""
    _, expected = train(place, adapt(place.task()), optimizer={"foreach": False})
    kinds = ["foreach", "fused", *(["capturable"] if place.is_gpu else [])]
    for kind in kinds:
        model = adapt(place.task())
        _, losses = train(place, model, optimizer={kind: True})
        again = PeftModel.from_pretrained(place.task(), save(model))
        off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        exact = torch.equal(answer(place, model), answer(place, again))
        yield kind, {"ok": off < 0.01 and exact, "largest difference of losses": off}


def waits(place: Place) -> Findings:
    """Steps between picks do not wait for the card (torch's sync debug mode counts)."""
    kinds = ("foreach", "fused", *(["fp16, foreach", "fp16, fused"] if place.is_gpu else []))
    for kind in kinds:
        found = counted_waits(place, kind)
        # A fused optimizer under a scaler does not say whether it skipped the step: one question.
        most = 1 if kind == "fp16, fused" else 0
        between = [sum(at.values()) for at in found["between picks"]]
        yield kind, found | {"ok": max(between, default=0) <= most}


class Pictures(torch.utils.data.Dataset):
    """Random images."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 64, 64, generator=generator)}


class WithLoss(torch.nn.Module):
    """What the Trainer wants of a model: a dictionary with the loss."""

    def __init__(self, task: torch.nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return it."""
        return {"loss": self.task(pixel_values)}


def trainer(place: Place) -> Findings:
    """The Trainer in mixed precision, with its own scaler and its own optimizer."""
    for kind in (["fp16"] if place.is_gpu else []) + ["bf16"]:
        model, callback = adapt(WithLoss(place.task())), SFACallback()
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=14, per_device_train_batch_size=2, report_to=[],
                save_strategy="no", logging_steps=7, remove_unused_columns=False,
                use_cpu=not place.is_gpu, learning_rate=1e-3, disable_tqdm=True, **{kind: True},
            )  # fmt: skip
            args._n_gpu = min(args.n_gpu, 1)  # one process, one card
            run = Trainer(model, args, train_dataset=Pictures(), callbacks=[callback])
            run.train()
        losses = [log["loss"] for log in run.state.log_history if "loss" in log]
        full = callback.selector.selected_share == 1
        yield kind, {"ok": full, "optimizer": str(args.optim), "losses": losses}


def compiled(place: Place) -> Findings:
    """Compiled models select what eager ones do, in every mode of torch.compile."""
    cases: dict[str, dict[str, Any]] = {
        "sums": {},
        "absolute": {"score": "absolute_gradient"},
        "bfloat16 scores": {"score_dtype": "bfloat16"},
    }
    if not place.is_gpu:  # Inductor would compile for minutes, and a CPU has no graphs to record
        yield "every mode", {"ok": True, "not run": "no card"}
        return
    modes = ("default", "reduce-overhead", "max-autotune")
    for name, options in cases.items():
        expected, _ = train(place, adapt(place.task(), **options))
        for mode in modes if name == "sums" else modes[:2]:
            torch._dynamo.reset()
            model = adapt(place.task(), **options)
            net = torch.compile(model, mode=mode)
            selector, losses = train(place, model, forward=net)
            same = share_of_same(chosen(expected), chosen(selector))
            again = PeftModel.from_pretrained(place.task(), save(model))
            exact = torch.equal(answer(place, model), answer(place, again))
            found = {"ok": same > 0.9 and exact, "same selection": same, "last loss": losses[-1]}
            yield f"{mode}, {name}", found


def sharded(place: Place) -> Findings:
    """One rank of FSDP2, on the card's own backend, selects and saves what it does without."""
    policies: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16": {"dtype": torch.bfloat16},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=place.is_gpu)},
    }
    expected, _ = train(place, adapt(place.task()))
    for name, policy in policies.items():
        with one_rank(place):
            model = cut(adapt(place.task()), **policy).train()
            selector, losses = train(place, model)
            folder, trained = save(model), answer(place, model)
        same = share_of_same(chosen(expected), chosen(selector))
        again = answer(place, PeftModel.from_pretrained(place.task(), folder))
        off = float((trained.float() - again).abs().max() / again.abs().max())
        ok = same > 0.9 and off < 1e-4 if name != "bfloat16" else selector.selected_share == 1
        yield name, {"ok": ok, "same selection": same, "difference": off, "last loss": losses[-1]}


def inference(place: Place) -> Findings:
    """Milliseconds of a forward with loaded adapters beside the bare model's, in turns."""
    for backbone, pixels in [("base", 512), ("tiny", 64)] if place.is_gpu else [("nano", 64)]:
        make = partial(make_task, backbone, pixels, torch.float32, place.device)
        models = loaded_models(make)
        x = torch.randn(1, 3, pixels, pixels, device=place.device)
        turns = forward_turns(place, models, x, 20 if place.is_gpu else 2)
        yield f"{backbone}, {pixels} px", {"ok": True, **turns}


def graphs(place: Place) -> Findings:
    """Loaded adapters compile to one graph, and answer as they do without, also when recorded."""
    backend = {"mode": "reduce-overhead"} if place.is_gpu else {"backend": "eager"}
    make = partial(make_task, "nano", 64, torch.float32, place.device)
    for name, model in loaded_models(make).items():
        if not (place.is_gpu or name == "both"):
            continue
        torch._dynamo.reset()
        net = torch.compile(model, fullgraph=True, **backend)
        x = place.images()
        with torch.no_grad():
            expected = model(x)
            off = max(abs(float(net(x) - expected)) for _ in range(4)) / abs(float(expected))
        yield name, {"ok": off < 1e-4, "difference": off}


def costs(place: Place) -> Findings:
    """Milliseconds and megabytes of a step, a pick and a switch."""
    backbone, pixels, count = ("base", 512, 10) if place.is_gpu else ("nano", 64, 1)
    settings = {"backbone": backbone, "resolution": pixels, "batch_size": 2, "rounds": 3}
    cases = [Case("frozen"), Case("full"), Case("lora", budget=0.05)]
    for method, (options, phases) in SFA_METHODS.items():
        cases += [Case(method, phase, 0.05, options) for phase in phases]
    for dtype in ("float32", "bfloat16"):
        for case in cases:
            job = Job(case.to_dict(), settings | {"device": place.device, "dtype": dtype})
            if case.phase == "pick":
                yield f"{dtype}: pick", job.pick() | {"ok": True}
                continue
            job.memory.reset()
            found = job.steps(count)
            peak = job.peak()
            yield (
                f"{dtype}: {case.label}",
                {
                    "ok": True,
                    "ms": 1e3 * median(found["seconds"]),
                    "least ms": 1e3 * min(found["seconds"]),
                    "host ms": 1e3 * median(found["host_seconds"]),
                    "launches": peak["launches"],
                    "peak MB": peak["peak_bytes"] / 1e6,
                },
            )
            del job
            gc.collect()  # a model and its hooks know each other
    folders = [save(adapt(make_task(backbone, pixels, torch.float32, place.device), rho=0.0,
                          score="random", seed=seed, budget=0.05)) for seed in (1, 2)]  # fmt: skip
    task = make_task(backbone, pixels, torch.float32, place.device)
    model = PeftModel.from_pretrained(task, folders[0], "a").eval()
    model.load_adapter(folders[1], "b")
    times = [place.timed(lambda name=name: model.set_adapter(name)) for name in ("b", "a") * 5]
    yield "switch", {"ok": True, "ms": sorted(times[4:])}


def demo(place: Place) -> Findings:
    """The table of `make demo` with three seeds."""
    small = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--max_eval_samples", "2"]
    runs = ["frozen", "sfa@0.05", "sfa@0.2", "full"] if place.is_gpu else ["frozen"]
    for seed in (0, 1, 2) if place.is_gpu else (0,):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "examples/compare_methods.py", "--runs", *runs]
            command += ["--seed", str(seed), "--output_dir", folder]
            command += [] if place.is_gpu else small
            done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                yield f"seed {seed}", {"ok": False, "error": done.stderr[-2000:]}
                return
            rows = json.loads((Path(folder) / "results.json").read_text())["rows"]
        yield f"seed {seed}", {"ok": True, "rows": rows}


CHECKS: dict[str, Callable[[Place], Findings]] = {
    check.__name__: check
    for check in (
        reload,
        switching,
        optimizers,
        waits,
        trainer,
        repeat,
        sharded,
        inference,
        graphs,
        costs,
        compiled,
        demo,
    )
}


def run(place: Place, names: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Return the findings of each check; what there was no time for says so."""
    start, results = time.monotonic(), {}
    for name in names:
        found = results[name] = {}
        try:
            for what, finding in CHECKS[name](place):
                found[what] = finding
                passed = time.monotonic() - start
                word = "ok  " if finding["ok"] else "FAIL"
                print(f"{passed:6.1f} s {word} {name}: {what}: {finding}", flush=True)
                if passed > seconds:
                    found["the rest"] = {"ok": True, "not run": f"{seconds:.0f} s were over"}
                    break
        except Exception as error:  # one check that breaks must not hide the others
            traceback.print_exc()
            found["error"] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        if time.monotonic() - start > seconds:
            late = {"time": {"ok": True, "not run": f"{seconds:.0f} s were over"}}
            results |= dict.fromkeys(names[names.index(name) + 1 :], late)
            break
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file for all findings")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK",
        help=f"of {', '.join(CHECKS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=440, help="after which nothing new begins (default: 440)"
    )
    args = parser.parse_args(arguments)
    place = Place("cuda" if torch.cuda.is_available() else "cpu")
    about = machine() | {"device": place.name, **backend_settings()}
    print(f"{place.name}, torch {torch.__version__}", flush=True)
    results = run(place, args.only, args.seconds)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": about, "checks": results}, indent=2) + "\n")
    return 0 if all(f["ok"] for found in results.values() for f in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
