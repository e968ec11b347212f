# SPDX-License-Identifier: Apache-2.0
"""The last step of all scripts: save the task, load it again to compare, report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from common.arguments import SharedArguments
from common.methods import Prepared, check_loaded_again, save_method, saved_size
from common.reporting import Columns, Result, make_result, report
from common.training import Rates


def save_and_report(
    ready: Prepared,
    args: SharedArguments,
    trainer: Trainer,
    *,
    rates: Rates,
    scores: Mapping[str, float],
    headers: dict[str, str],
    columns: Mapping[str, Sequence[Any]],
    draw: Callable[[Columns, Path], Any],
    fresh: PreTrainedModel,
    pixels: torch.Tensor,
) -> Result:
    """Save what the method trained, see that nothing is lost, and write results and pictures.

    Of several processes the first one does it and the others wait.

    Args:
        ready: The trained model.
        args: The run's arguments.
        trainer: It trained.
        rates: Learning rates.
        scores: What the evaluation found.
        headers: Columns of the table: header to key of `scores`.
        columns: Inputs, truths and predictions to show; the last is titled by the run's name.
        draw: Writes such columns as a contact sheet.
        fresh: The task model as before training: what was saved is loaded into it.
        pixels: Images to compare both models on, float32 `(B, 3, H, W)`.
    """
    out = Path(args.output_dir)
    with trainer.args.main_process_first(local=False, desc="saving"):
        if trainer.is_world_process_zero():
            save_method(ready, args, out)
            check_loaded_again(ready, fresh, args, out, pixels)
        result = make_result(
            ready,
            args,
            trainer,
            rates=rates,
            size=saved_size(out),
            scores=scores,
            headers=headers,
            columns=columns,
            draw=draw,
        )
        if trainer.is_world_process_zero():
            report(result, ready, args)
    return result
