# SPDX-License-Identifier: Apache-2.0
"""What each command does: it calls the library and says what came out."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import SFAConfig
from ..errors import SFAError
from ..files.packing import SAVED_VALUES
from ..tasks import onnx_export, saved_adapters, task_folder, training_plan
from ..tasks.extract import extract
from .parser import Command, did_you_mean

#: Training scripts, by what they may be called.
SCRIPTS = {
    "semantic_segmentation": "semantic_segmentation",
    "depth_estimation": "depth_estimation",
    "object_detection": "object_detection",
    "instance_segmentation": "instance_segmentation",
    "segmentation": "semantic_segmentation",
    "depth": "depth_estimation",
    "detection": "object_detection",
    "instances": "instance_segmentation",
}
Answer = tuple[Any, str]


def _folder(parser: ArgumentParser, name: str = "folder", **options: Any) -> None:
    parser.add_argument(name, help="Folder of an adapter, or its name on the Hub.", **options)


def _base(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="Folder or Hub name of the pretrained model (of the backbone, where the folder has a "
        "task.json), if it is no longer where the files say.",
    )


def _out(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="PATH", help=what)


# --- look ----------------------------------------------------------------------------------------


def _inspect(args: Namespace) -> Answer:
    report = saved_adapters.inspect(args.folder)
    return report.to_dict(), str(report)


def _diff_arguments(parser: ArgumentParser) -> None:
    _folder(parser, "first")
    _folder(parser, "second")


def _diff(args: Namespace) -> Answer:
    report = saved_adapters.diff(args.first, args.second)
    return report.to_dict(), str(report)


def _plot_arguments(parser: ArgumentParser) -> None:
    _folder(parser, "folders", nargs="+")
    _out(parser, "Picture to write; its ending decides the format.")


def _plot(args: Namespace) -> Answer:
    shares = saved_adapters.plot_saved(args.folders, args.out)
    pairs = [{"first": a, "second": b, "share": share} for (a, b), share in shares.items()]
    lines = [f"{p['first']} and {p['second']}: {p['share']:.1%} of the smaller" for p in pairs]
    return {"path": args.out, "overlaps": pairs}, "\n".join([*lines, f"drawn in {args.out}"])


def _verify_arguments(parser: ArgumentParser) -> None:
    _folder(parser)
    _base(parser)


def _verify(args: Namespace) -> Answer:
    report = task_folder.verify(args.folder, args.base)
    return asdict(report), str(report)


def _budget_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="Folder or Hub name; only its config is read.")
    add("--budget", type=float, default=0.05, help="Share of the backbone to train (0.05).")
    add("--rho", type=float, help="Share of it for external adapters (0.5).")
    add("--adapter_dim", type=int, help="Width of external adapters, instead of --rho.")
    add("--image_size", type=int, nargs="+", help="Height and width; the model's own.")
    add("--batch_size", type=int, default=1, help="Images in a micro-batch (1).")
    add(
        "--optimizer",
        choices=training_plan.OPTIMIZERS,
        default="adamw",
        help="What trains (adamw).",
    )
    add(
        "--dtype", choices=training_plan.DTYPES, default="float32", help="Of all weights (float32)."
    )


def _plan(args: Namespace) -> Answer:
    config = SFAConfig(budget=args.budget, rho=args.rho, adapter_dim=args.adapter_dim)
    found = training_plan.plan_training(
        args.model,
        config,
        image_size=_as_size(args.image_size),
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        dtype=args.dtype,
    )
    return found.to_dict(), str(found)


# --- train ---------------------------------------------------------------------------------------


def _train_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help=", ".join(sorted(set(SCRIPTS.values()))))
    parser.add_argument(
        "--scripts",
        default=str(_scripts()),
        help="The repository's folder `examples`, where this is not run in a clone.",
    )
    parser.epilog = "All other options are the script's: `train TASK --options` lists them."
    parser.add_argument("--options", action="store_true", help="List the options of the script.")


def _scripts() -> Path:
    """Return the folder of scripts: of the clone that this lies in, else that one stands in."""
    folders = [Path(__file__).resolve().parents[3] / "examples", Path("examples")]
    return next((f for f in folders if (f / "semantic_segmentation.py").is_file()), folders[-1])


def _train(args: Namespace) -> Answer:
    if args.task not in SCRIPTS:
        known = ", ".join(sorted(set(SCRIPTS.values())))
        raise SFAError(f"task {args.task!r}{did_you_mean(args.task, SCRIPTS)} Known are {known}")
    script = Path(args.scripts) / f"{SCRIPTS[args.task]}.py"
    if not script.is_file():
        raise SFAError(
            f"{script}: no such script. Training scripts are in the folder `examples` of the "
            "repository; clone it and say --scripts path/to/examples"
        )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *args.others]
    result = importlib.import_module(script.stem).main(["--help"] if args.options else args.others)
    return result.row, ""  # the script has said what there is to say


# --- use -----------------------------------------------------------------------------------------


def _predict_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder of a task, or its name on the Hub.")
    parser.add_argument("images", nargs="+", help="Picture files.")
    _out(parser, "Folder for results.")
    _base(parser)
    parser.add_argument("--device", default="cpu", help="Where to compute (cpu).")
    parser.add_argument("--batch_size", type=int, default=8, help="Pictures in a batch (8).")
    parser.add_argument("--threshold", type=float, default=0.5, help="Lowest score of an object.")


def _predict(args: Namespace) -> Answer:
    from ..dense.prediction.output import write_predictions  # needs pillow

    model = task_folder.load_task(args.folder, backbone=args.base, device=args.device)
    sizes = {"batch_size": args.batch_size, "threshold": args.threshold}
    content = write_predictions(model, args.images, args.out, **sizes)
    count, task = len(args.images), model.task_spec.task
    return content, f"{count} pictures of {task}: results in {args.out}"


# --- change --------------------------------------------------------------------------------------


def _merge_arguments(parser: ArgumentParser) -> None:
    _folder(parser)
    _out(parser, "Folder for the merged model.")
    _base(parser)


def _merge(args: Namespace) -> Answer:
    task_folder.merge(args.folder, args.out, args.base)
    return {"out": args.out}, f"merged model in {args.out}"


def _extract_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="Folder of a fully fine-tuned model.")
    parser.add_argument(
        "--base", required=True, metavar="MODEL",
        help="Folder or Hub name of the pretrained model (of the backbone, where the checkpoint "
        "has a task.json).",
    )  # fmt: skip
    _out(parser, "Folder for the adapter.")
    parser.add_argument("--budget", type=float, default=0.05, help="Share to keep (0.05).")


def _extract(args: Namespace) -> Answer:
    model = task_folder.load_like(args.checkpoint, args.base)
    config = SFAConfig(budget=args.budget, rho=0, modules_to_save="auto")
    adapted, report = extract(model, args.checkpoint, config)
    adapted.save_pretrained(args.out)
    task_folder.copy_spec(args.checkpoint, args.out)
    return {**asdict(report), "out": args.out}, f"{report}\nadapter in {args.out}"


def _convert_arguments(parser: ArgumentParser) -> None:
    _folder(parser)
    _out(parser, "Folder for the new adapter.")
    parser.add_argument("--values", required=True, choices=SAVED_VALUES, help="How to store them.")
    _base(parser)


def _convert(args: Namespace) -> Answer:
    nbytes = task_folder.convert(args.folder, args.out, args.values, args.base)
    return {"out": args.out, "nbytes": nbytes}, f"{nbytes:,} bytes in {args.out}"


# --- ship ----------------------------------------------------------------------------------------


def _export_arguments(parser: ArgumentParser) -> None:
    _folder(parser)
    add = parser.add_argument
    add("--onnx", metavar="FILE", help="Write the adapted model.")
    add("--overwrites", metavar="FILE", help="Write what the task overwrites in the base's file.")
    add("--base_onnx", metavar="FILE", help="The base's file; written if there is none.")
    add("--size", type=int, nargs="+", help="Height and width of images; the task's if it says.")
    add("--batch_size", type=int, default=1, help="Images (1).")
    _base(parser)


def _export(args: Namespace) -> Answer:
    if bool(args.onnx) == bool(args.overwrites) or bool(args.overwrites) != bool(args.base_onnx):
        raise SFAError("export: give --onnx FILE, or both --overwrites FILE and --base_onnx FILE")
    options = {"size": _size(args), "batch_size": args.batch_size, "base": args.base}
    if args.onnx:
        report = onnx_export.export_onnx(args.folder, args.onnx, **options)
    else:
        report = onnx_export.export_overwrites(
            args.folder, args.base_onnx, args.overwrites, **options
        )
    return asdict(report), str(report)


def _as_size(numbers: list[int] | None) -> tuple[int, int] | None:
    if numbers is not None and len(numbers) > 2:
        raise SFAError(f"size: expected one number or height and width, got {numbers}")
    return None if numbers is None else (numbers[0], numbers[-1])


def _size(args: Namespace) -> tuple[int, int]:
    size = _as_size(args.size) or task_folder.image_size(args.folder)
    if size is None:
        raise SFAError(f"--size: needed, since {args.folder} does not say how large images are")
    return size


COMMANDS = {
    "inspect": Command(
        "look", "DIR", "what an adapter holds, by stage and role", _folder, _inspect
    ),
    "diff": Command("look", "A B", "how two adapters differ", _diff_arguments, _diff),
    "plot": Command(
        "look", "DIR... -o FILE", "where selected weights are, and overlaps", _plot_arguments, _plot
    ),
    "verify": Command(
        "look", "DIR", "check files, base and earlier adapters", _verify_arguments, _verify
    ),
    "budget": Command(
        "train", "MODEL", "widths, counts and memory, from a config", _budget_arguments, _plan
    ),
    "train": Command(
        "train", "TASK ...", "train a task with its script", _train_arguments, _train, passes=True
    ),
    "predict": Command(
        "use",
        "DIR IMAGE... -o DIR",
        "class maps, metres, boxes, masks",
        _predict_arguments,
        _predict,
    ),
    "export": Command(
        "use", "DIR --onnx FILE", "ONNX, or what to overwrite in it", _export_arguments, _export
    ),
    "merge": Command(
        "change", "DIR -o DIR", "put an adapter into the weights", _merge_arguments, _merge
    ),
    "convert": Command(
        "change", "DIR -o DIR", "store changes otherwise", _convert_arguments, _convert
    ),
    "extract": Command(
        "change",
        "DIR -o DIR",
        "make an adapter of a fine-tuned model",
        _extract_arguments,
        _extract,
    ),
}
