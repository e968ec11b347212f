# SPDX-License-Identifier: Apache-2.0
"""SFA in a training loop of your own with Accelerate, on one process or several.

Rendered scenes, a small SwinV2 that ships with the examples, and a UperNet head::

    python examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_loop.py  # no GPU

It ends with the same bits if it is interrupted and taken up from a checkpoint (on as many
processes as before; a warning says so where they are not)::

    python examples/accelerate_loop.py --resume_from_checkpoint out/accelerate/step_100
"""

import os
import shutil
from argparse import ArgumentParser
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    Swinv2Backbone,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    get_cosine_schedule_with_warmup,
)

import sfa_peft
from sfa_peft.dense import (
    CLASS_NAMES,
    Preprocessing,
    SceneDataset,
    SegmentationMetrics,
    TaskSpec,
    argmax_logits,
)

BACKBONE = Path(__file__).parent / "backbones" / "swinv2-nano"
STAGES = ["stage1", "stage2", "stage3", "stage4"]

parser = ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output_dir", default="out/accelerate")
parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of a SwinV2 checkpoint.")
parser.add_argument("--budget", type=float, default=0.2, help="Share of the backbone to train.")
parser.add_argument("--max_steps", type=int, default=200, help="Update steps.")
parser.add_argument("--batch_size", type=int, default=16, help="Images per step and process.")
parser.add_argument("--eval_images", type=int, default=200)
parser.add_argument("--learning_rate", type=float, default=3e-3)
parser.add_argument("--checkpoint_steps", type=int, default=50, help="Update steps in between.")
parser.add_argument("--resume_from_checkpoint", help="Folder of a checkpoint.")
parser.add_argument("--log_with", help="A tracker of Accelerate, such as tensorboard.")
parser.add_argument("--seed", type=int, default=0)


def make_model(folder: str) -> UperNetForSemanticSegmentation:
    """Return a new UperNet head on the pretrained backbone."""
    backbone = Swinv2Backbone.from_pretrained(folder, out_features=STAGES)
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=64,
        num_labels=len(CLASS_NAMES),
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone
    return model


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Save all that a resumed run needs; the name appears when everything is written."""
    partial = folder.with_name(f"{folder.name}.partial")
    accelerator.save_state(str(partial))  # every process has a part
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def evaluate(accelerator: Accelerator, model, loader) -> dict[str, float]:
    """Return the scores over the images of all processes, each counted once."""
    metrics = SegmentationMetrics(len(CLASS_NAMES))
    model.eval()
    for batch in loader:
        with torch.no_grad():
            predicted = argmax_logits(model(batch["pixel_values"]).logits, batch["labels"])
        metrics.update(*accelerator.gather_for_metrics((predicted, batch["labels"])))
    return metrics.compute()


def main() -> None:
    args = parser.parse_args()
    out = Path(args.output_dir)

    # 1. Accelerate finds out how it was started: one process or several, CPU or GPU
    accelerator = Accelerator(log_with=args.log_with, project_dir=str(out))
    accelerator.init_trackers("sfa")
    set_seed(args.seed)

    # 2. Data: each scene is new, so one pass over them is the run
    count = args.max_steps * args.batch_size * accelerator.num_processes
    train_loader = DataLoader(SceneDataset(count, seed=0), args.batch_size)
    eval_loader = DataLoader(SceneDataset(args.eval_images, seed=1), args.batch_size)

    # 3. Model and adapter; the optimizer sees one set of parameters from the first step to the last
    config = sfa_peft.SFAConfig(budget=args.budget, modules_to_save=["decode_head"])
    model = make_model(args.backbone)
    spec = TaskSpec.describe(  # what a prediction needs beside the adapter
        model,
        task="semantic_segmentation",
        backbone="backbone",
        source=args.backbone,
        preprocessing=Preprocessing("cover", (64, 64)),
        class_names=CLASS_NAMES,
    )
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    if accelerator.is_main_process:
        print(sfa_peft.budget_report(model))
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model, optimizer, train_loader, eval_loader
    )

    # 4. The selector, and with the learning rate's schedule into checkpoints. (A schedule that is
    # given to `prepare` would count steps once for each process.)
    selector = sfa_peft.SFASelector(model, total_steps=args.max_steps, scaler=accelerator.scaler)
    accelerator.register_for_checkpointing(selector, schedule)
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
    done = schedule.last_epoch

    # 5. Train
    is_quiet = not accelerator.is_local_main_process
    bar = tqdm(initial=done, total=args.max_steps, disable=is_quiet)
    model.train()
    for step, batch in enumerate(accelerator.skip_first_batches(train_loader, done), done + 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        picked = selector.step(optimizer)  # before the learning rate and the gradients change
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(selector.progress, refresh=False)
        bar.update()
        if picked:
            accelerator.log({"loss": loss.item()} | selector.metrics(), step)
        if step % args.checkpoint_steps == 0:
            save_checkpoint(accelerator, out / f"step_{step}")
    bar.close()

    # 6. Evaluate, and save the adapter once
    scores = evaluate(accelerator, model, eval_loader)
    adapted = accelerator.unwrap_model(model)
    # What wraps the model goes before the processes' group does: in the other order torch may hang.
    del model
    accelerator.free_memory()
    accelerator.end_training()
    if accelerator.is_main_process:
        adapted.save_pretrained(out)
        spec.write(out, metrics=scores)
        print(f"mean IoU {scores['mean_iou']:.3f}; the adapter is in {out}/")


if __name__ == "__main__":
    main()
