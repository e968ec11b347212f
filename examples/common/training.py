# SPDX-License-Identifier: Apache-2.0
"""One way to train for all scripts: AdamW with a rate for the head, and transformers' Trainer."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import ProgressCallback, TrainingArguments

import sfa_peft
from common.arguments import NEW_LAYERS, SharedArguments
from common.augmented import AugmentedTrainer, Maps
from common.methods import Prepared
from common.progress import TrainingTable
from common.wording import as_typed
from sfa_peft import SFAError


class Rates(NamedTuple):
    """Learning rates.

    Attributes:
        backbone: Of the backbone's pretrained weights, or of what a method changes them by.
        head: Of the head.
        added: Of new layers in the backbone.
    """

    backbone: float
    head: float
    added: float


def pick_rates(args: SharedArguments, *, adapters: float, full: float, head: float) -> Rates:
    """Return the rates that the user gave, else those that suit a script's rendered scenes.

    Args:
        args: The run's arguments.
        adapters: Rate of every adapter.
        full: Rate of full fine-tuning.
        head: Rate of the head.
    """
    backbone = {"frozen": 0.0, "full": full}.get(args.method, adapters)
    backbone = backbone if args.learning_rate is None else args.learning_rate
    return Rates(
        backbone,
        head if args.head_learning_rate is None else args.head_learning_rate,
        backbone if args.external_learning_rate is None else args.external_learning_rate,
    )


def make_trainer(
    ready: Prepared,
    args: SharedArguments,
    *,
    rates: Rates,
    train_data: Dataset[Any],
    eval_data: Dataset[Any] | None = None,
    compute_metrics: Callable[..., dict[str, float]] | None = None,
    preprocess: Callable[..., Any] | None = None,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    label_names: tuple[str, ...] = ("labels",),
    compute_loss: Callable[..., torch.Tensor] | None = None,
    maps: Maps | None = None,
) -> AugmentedTrainer:
    """Return a Trainer for a prepared model.

    Args:
        ready: The model and what of it is trained.
        args: The run's arguments.
        rates: Learning rates.
        train_data: Items to train on.
        eval_data: Items that `trainer.evaluate` is for, if it is used.
        compute_metrics: Called for each batch of predictions, as `batch_eval_metrics` wants it.
        preprocess: Trainer's `preprocess_logits_for_metrics`.
        collator: Makes a batch of items; by default tensors are stacked.
        label_names: Keys of a batch that are labels.
        compute_loss: Trainer's `compute_loss_func`, for models without a loss of their own.
        maps: The plain evaluation of images of several sizes, one at a time.
    """
    # Without this Trainer takes the loss as summed over micro-batches (transformers #47688).
    ready.model.accepts_loss_kwargs = ready.base.accepts_loss_kwargs = False
    if args.eval_steps and eval_data is None:
        raise SFAError("--eval_steps: this task is evaluated once, after training")
    twentieth = max(1, args.max_steps // 20)
    settings = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=8 if maps is None else 1,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        lr_scheduler_type=args.lr_scheduler_type,
        lr_scheduler_kwargs=args.schedule_options(),
        warmup_steps=twentieth if args.warmup_steps is None else args.warmup_steps,
        max_grad_norm=args.max_grad_norm,
        logging_steps=twentieth,
        save_strategy="no" if args.save_steps is None else "steps",
        save_steps=args.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if args.eval_steps else "no",
        eval_steps=args.eval_steps,
        batch_eval_metrics=True,
        label_names=list(label_names),
        remove_unused_columns=False,
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=args.bf16,
        fp16=args.fp16,
        report_to=args.report_to,
        disable_tqdm=False,  # it would be, without transformers' own log
        seed=args.seed,
    )
    trainer = AugmentedTrainer(
        model=ready.model,
        args=settings,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        compute_loss_func=compute_loss,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess,
        callbacks=ready.callbacks,
        optimizers=(make_optimizer(ready, rates, args), None),
    )
    trainer.maps = maps
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainingTable())
    return trainer


def make_optimizer(ready: Prepared, rates: Rates, args: SharedArguments) -> torch.optim.AdamW:
    """Return AdamW with rates for the head, new layers and pretrained weights, decayed or not."""
    groups = sfa_peft.parameter_groups(
        ready.model,
        rates.backbone,
        head_lr=rates.head,
        external_lr=rates.added,
        new_layers=ready.adapted if args.method in NEW_LAYERS else (),
        layer_decay=args.layer_decay,
        weight_decay=args.weight_decay,
        no_decay=args.no_decay,
    )
    # `lr_end` of the polynomial course is where AdamW's own rate ends; others keep their ratio.
    return torch.optim.AdamW(groups, lr=groups[0]["lr"])


def run_script(main: Callable[[], Any]) -> None:
    """Run a script; an error of the data or options ends it with one line, not a traceback."""
    try:
        main()
    except SFAError as error:
        # A data loader's process hands its error over as text, the traceback before the message.
        message = str(error).strip()
        if "Traceback" in message:
            message = re.split(r"^[\w.]+Error: ", message, flags=re.MULTILINE)[-1]
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {as_typed(message)}") from error
