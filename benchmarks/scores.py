# SPDX-License-Identifier: Apache-2.0
"""What cheaper scores select: their overlap with the exact selection of the same training.

Trains the small SwinV2 of the examples on rendered scenes, once with exact scores and once with
each cheaper kind, from the same start on the same images::

    python benchmarks/scores.py --output out/scores.json

Recall is the share of the exact selection that a run selects too: after the first pick (until
there all runs train alike, so only the scores differ) and at the end (where they also have trained
different weights since). Two rows give the scale: the exact run again, and on other images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from peft import get_peft_model
from semantic_segmentation import Arguments, build_model
from torch.utils.data import DataLoader

from sfa_peft import SFAConfig, SFAError, SFASelector
from sfa_peft.dense import CLASS_NAMES, SceneDataset

LEARNING_RATE, HEAD_LEARNING_RATE = 3e-3, 6e-3  # those of the example
LAST_LOSSES = 10


class Result(NamedTuple):
    """What a run selected (positions, sorted) and how it ended."""

    first: np.ndarray
    end: np.ndarray
    eligible: int
    loss: float  # mean of the last steps


def train(args: argparse.Namespace, options: dict[str, Any], data_seed: int) -> Result:
    """Run one training.

    Args:
        args: See `parse`.
        options: Fields of `SFAConfig` that say how to score.
        data_seed: Seed of the scenes.
    """
    # 1. Model and adapter
    base = build_model(Arguments(seed=args.seed), len(CLASS_NAMES))
    config = SFAConfig(
        budget=args.budget,
        rho=args.rho,
        selection_steps=args.selection_steps,
        modules_to_save=["decode_head"],
        **options,
    )
    torch.manual_seed(args.seed)  # external adapters start at random values
    model = get_peft_model(base, config).train()
    selector = SFASelector(model, total_steps=args.steps)

    # 2. Optimizer
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trained.items() if "decode_head" in n]
    rest = [p for n, p in trained.items() if "decode_head" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": head, "lr": HEAD_LEARNING_RATE}, {"params": rest, "lr": LEARNING_RATE}]
    )
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    # 3. Train
    scenes = SceneDataset(args.steps * args.batch_size, size=64, seed=data_seed)
    first, losses = None, []
    for batch in DataLoader(scenes, batch_size=args.batch_size):
        loss = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        if selector.step(optimizer) and first is None:
            first = positions(selector)
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if first is None:
        raise SFAError("the run ended without a pick")
    eligible = selector.pool.starts[-1]
    return Result(first, positions(selector), eligible, float(np.mean(losses[-LAST_LOSSES:])))


def positions(selector: SFASelector) -> np.ndarray:
    """Return the positions selected so far, sorted."""
    return np.sort(selector.pool.slots[: selector.selected].numpy())


def recall(exact: np.ndarray, other: np.ndarray) -> float:
    """Return the share of the exact selection that the other holds too."""
    return len(np.intersect1d(exact, other, assume_unique=True)) / len(exact)


def make_runs(every: list[int]) -> list[tuple[str, dict[str, Any], bool]]:
    """Return name, options and whether on other images, of each row; the first is the exact run."""
    return [
        ("exact", {}, False),
        ("exact, again", {}, False),
        ("exact, other images", {}, True),
        ("score_dtype=bfloat16", {"score_dtype": "bfloat16"}, False),
        *((f"score_every={k}", {"score_every": k}, False) for k in every),
    ]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything and return the rows of the table."""
    known = {f.name for f in fields(SFAConfig)}
    rows, exact = [], None
    for name, options, on_other_images in make_runs(args.every):
        print(f"train: {name}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"run": name}
        rows.append(row)
        if missing := set(options) - known:
            row["failure"] = f"not run: SFAConfig has no field {', '.join(missing)}"
            continue
        result = train(args, options, data_seed=args.seed + 1000 * on_other_images)
        exact = exact or result
        row |= {
            "recall_first": recall(exact.first, result.first),
            "recall_end": recall(exact.end, result.end),
            "selected_first": len(result.first),
            "selected_end": len(result.end),
            "eligible": result.eligible,
            "loss": result.loss,
        }
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    exact = rows[0]
    first, end, eligible = (exact[k] for k in ("selected_first", "selected_end", "eligible"))
    scale = (
        f"of {eligible:,} weights the first pick selects {first:,}, all picks {end:,}; by chance "
        f"recall would be {first / eligible:.3f} and {end / eligible:.3f}"
    )
    lines = [scale, f"{'run':22}{'first pick':>11}{'end':>8}{'loss':>9}"]
    for row in rows:
        if "failure" in row:
            lines.append(f"{row['run']:22}{row['failure']}")
            continue
        figures = f"{row['recall_first']:>11.4f}{row['recall_end']:>8.4f}{row['loss']:>9.4f}"
        lines.append(f"{row['run']:22}{figures}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=160, help="update steps of a run (default: 160)")
    add("--selection_steps", type=int, default=40, help="steps of a round (default: 40)")
    add("--batch_size", type=int, default=8, help="images per step (default: 8)")
    add("--budget", type=float, default=0.05, help="share that may be trained (default: 0.05)")
    add("--rho", type=float, default=0.0, help="external share of the budget (default: 0)")
    add("--every", type=int, nargs="*", default=[2, 4, 8], help="score_every (default: 2 4 8)")
    add("--seed", type=int, default=0, help="of head and images (default: 0)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(arguments)
    if args.selection_steps < 1 or args.steps < 2 * args.selection_steps:
        parser.error("--steps: expected two rounds or more, since picks stand between rounds")
    if args.batch_size < 2:
        parser.error("--batch_size: the head's batch norm needs 2 or more images")
    if args.threads < 1 or min(args.every, default=1) < 1:
        parser.error("--threads, --every: expected 1 or more")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        rows = measure(args)
    except SFAError as error:
        raise SystemExit(f"scores.py: error: {error}") from error
    print(render(rows))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = vars(args) | {"output": str(args.output)}
        results = {"settings": settings, "torch": torch.__version__, "rows": rows}
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
