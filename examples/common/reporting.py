# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: a row of figures, a training curve and a contact sheet."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import Trainer

import sfa_peft
from common.arguments import OF_SFA, ONE_SIZE, SharedArguments
from common.methods import METHOD_NAME, TRAINED_NAME, Prepared
from common.peers import PEERS
from common.training import Rates
from sfa_peft import SFAError
from sfa_peft.dense import curve_plot

RESULTS_NAME, SHEET_NAME = "results.json", "predictions.png"
CURVE_NAME, SCORES_NAME, SELECTION_NAME = "training.png", "scores.png", "selection.png"
SHOWN = 4  # scenes in a contact sheet
NAMES = {
    "sfa": "SFA",
    "gps": "GPS",
    "lora": "LoRA",
    "shira": "SHiRA",
    "super_tuning": "Super-Tuning",
    **{name: peer.title for name, peer in PEERS.items()},
}
# What Trainer.evaluate adds to the scores.
TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
SIGNS = (RESULTS_NAME, "task.json", "adapter_config.json", "checkpoint-*")  # of a run in a folder
LEFT_BEHIND = (
    *SIGNS, SHEET_NAME, CURVE_NAME, SCORES_NAME, SELECTION_NAME, TRAINED_NAME, METHOD_NAME,
    "README.md", "*.safetensors", "config.json", "sfa_selector*",
)  # fmt: skip
# Not for the Hub: checkpoints are large and only good for going on with this run.
LOCAL_FILES = ["checkpoint-*", "sfa_selector*", ".*"]

Columns = Mapping[str, Sequence[Any]]
Curve = tuple[list[float], list[float]]


@dataclass
class Result:
    """One run: a row of the table, and what its pictures are made of.

    Attributes:
        name: Method and budget, for tables and pictures.
        row: Figures that json can hold; `scores` holds those of the task.
        headers: Columns of the table: header to key of `scores`.
        curve: Update steps and training losses.
        progress: By header of the table, update steps and scores while it trained.
        columns: Pictures of some scenes by title: input, truth and prediction.
        draw: Writes such columns as a contact sheet.
    """

    name: str
    row: dict[str, Any]
    headers: dict[str, str]
    curve: Curve
    progress: dict[str, Curve]
    columns: dict[str, Sequence[Any]]
    draw: Callable[[Columns, Path], Any] = field(repr=False)


def run_name(args: SharedArguments) -> str:
    """Return method and budget of a run for people: "SFA 5%"."""
    name = NAMES.get(args.method, args.method)
    return name if args.method in ONE_SIZE else f"{name} {100 * args.budget:g}%"


def folder_name(name: str) -> str:
    """Return the name of a run for files: "sfa_5"."""
    return name.lower().replace(" ", "_").replace("%", "").replace("+", "_plus")


def shown_indices(count: int) -> range:
    """Return the items of a dataset of `count` that a contact sheet shows."""
    return range(0, count, max(1, count // SHOWN))[:SHOWN]


def open_output(args: SharedArguments) -> None:
    """Refuse a folder that holds another run, or take that out of it where asked to.

    Raises:
        SFAError: If there is another run, or it would be removed though this one needs it.
    """
    out = Path(args.output_dir)
    found = sorted({path for pattern in LEFT_BEHIND for path in out.glob(pattern)})
    if args.resume_from_checkpoint or not any(path.match(p) for p in SIGNS for path in found):
        return
    if not args.overwrite_output_dir:
        raise SFAError(
            f"--output_dir {out}: holds another run ({', '.join(p.name for p in found[:3])}, ...). "
            "Name another folder, go on with that run (--resume_from_checkpoint last), or remove "
            "it (--overwrite_output_dir)"
        )
    if args.selection_from and Path(args.selection_from).resolve().is_relative_to(out.resolve()):
        raise SFAError(f"--overwrite_output_dir: would remove --selection_from {out}")
    if os.environ.get("RANK", "0") == "0":
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_result(
    ready: Prepared,
    args: SharedArguments,
    trainer: Trainer,
    *,
    rates: Rates,
    size: int,
    scores: Mapping[str, float],
    headers: dict[str, str],
    columns: Mapping[str, Sequence[Any]],
    draw: Callable[[Columns, Path], Any],
) -> Result:
    """Gather what a finished run reports.

    Args:
        ready: The trained model.
        args: The run's arguments.
        trainer: It trained.
        rates: Learning rates.
        size: Bytes of the saved task.
        scores: What `trainer.evaluate` returned.
        headers: Columns of the table: header to key of `scores`.
        columns: Inputs, truths and predictions to show; the last is titled by the run's name.
        draw: Writes such columns as a contact sheet.
    """
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    name = run_name(args)
    row = {
        "method": name,
        "trainable_share": ready.share,
        "trainable_backbone": round(ready.share * ready.backbone_size),
        "scores": scores_of(scores),
        **args.facts(),
        "bytes": size,
        "learning_rate": rates.backbone,
        "external_learning_rate": rates.added,
        "head_learning_rate": rates.head,
        "layer_decay": args.layer_decay,
        "train_seconds": round(_seconds(trainer), 1),
    }
    curve = ([e["step"] for e in log], [e["loss"] for e in log])
    first = f"eval_{next(iter(headers.values()))}"
    # By step: the evaluation after training repeats that of the last step.
    evals = [*{e["step"]: e for e in trainer.state.log_history if first in e}.values()]
    progress = {
        header: ([e["step"] for e in evals], [e[f"eval_{key}"] for e in evals])
        for header, key in headers.items()
        if all(f"eval_{key}" in e for e in evals)  # augmented scores come once, at the end
    }
    row["progress"] = {header: list(curve) for header, curve in progress.items()}
    *rest, last = columns
    titled = {**{title: columns[title] for title in rest}, name: columns[last]}
    return Result(name, row, headers, curve, progress, titled, draw)


def scores_of(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Return what `trainer.evaluate` returned without timings; what is not a number is None."""
    return {
        name.removeprefix("eval_"): None if math.isnan(value) else value
        for name, value in scores.items()
        if name != "epoch" and not name.endswith(TIMINGS)
    }


def report(result: Result, ready: Prepared, args: SharedArguments) -> None:
    """Print the row, write results and pictures beside the adapter, and upload if asked to."""
    out = Path(args.output_dir)
    write_text(out / RESULTS_NAME, to_json({"arguments": asdict(args), "row": result.row}))
    result.draw(result.columns, out / SHEET_NAME)
    curve_plot(
        {result.name: result.curve}, out / CURVE_NAME, xlabel="update step", ylabel="training loss"
    )
    if args.eval_steps:
        curve_plot(result.progress, out / SCORES_NAME, xlabel="update step", ylabel="score")
    if args.method in OF_SFA and sfa_peft.budget_report(ready.model).internal:
        sfa_peft.plot_selection(sfa_peft.selection_summary(ready.model), out / SELECTION_NAME)
    print(f"\n{table([result])}\n\n{summary(result, args)}")
    if args.push_to_hub:
        push(out, args.hub_model_id or out.resolve().name)


def summary(result: Result, args: SharedArguments) -> str:
    """Return how long training took, where everything is and what can be done with it."""
    seconds, out = result.row["train_seconds"], args.output_dir
    took = f"{args.max_steps} steps in {seconds:.0f} s, {seconds / args.max_steps:.2f} s a step"
    if torch.cuda.is_available():
        took += f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GB"
    return (
        f"{took}\nAdapter, pictures and {RESULTS_NAME} are in {out}/\n"
        f"predict: sfa-peft predict {out} photo.jpg -o {out}/seen"
    )


def push(folder: Path, name: str) -> None:
    """Upload a run's folder, checkpoints left out, to a model repository of the Hub."""
    api = HfApi()
    repo = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=LOCAL_FILES)
    print(f"uploaded to https://huggingface.co/{repo}")


def table(results: Sequence[Result], separator: str = "  ") -> str:
    """Return a table, one line per run; with ``" | "`` between columns it is markdown."""
    headers = results[0].headers
    lines = [["method", "trainable", *headers, "bytes per task"]]
    for row in (result.row for result in results):
        scores = [row["scores"].get(key) for key in headers.values()]
        shown = ["-" if value is None else f"{value:.3f}" for value in scores]
        lines.append([row["method"], f"{row['trainable_share']:.1%}", *shown, f"{row['bytes']:,}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if separator.strip():
        lines.insert(1, ["-" * width for width in widths])
    rows = [
        separator.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join(f"| {row} |" if separator.strip() else row for row in rows)


def to_json(content: Any) -> str:
    """Return json of plain values; numpy's numbers become Python's."""
    return json.dumps(content, indent=2, default=np.ndarray.tolist) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", text=True)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)  # mkstemp makes files that only their owner may read
    Path(name).replace(path)


def _seconds(trainer: Trainer) -> float:
    return next(
        (e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e),
        math.nan,
    )
