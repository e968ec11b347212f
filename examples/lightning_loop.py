# SPDX-License-Identifier: Apache-2.0
"""SFA in Lightning's Trainer: one callback more.

Rendered scenes, a small SwinV2 that ships with the examples, and a UperNet head; needs
`pip install lightning`::

    python examples/lightning_loop.py
    python examples/lightning_loop.py --ckpt_path out/lightning/last.ckpt  # goes on where it ended
"""

import os
from argparse import ArgumentParser

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import lightning.pytorch as lightning
import torch
from accelerate_loop import BACKBONE, make_model
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import sfa_peft
from sfa_peft.dense import CLASS_NAMES, SceneDataset, SegmentationMetrics, argmax_logits
from sfa_peft.training.lightning import SFALightningCallback

parser = ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output_dir", default="out/lightning")
parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of a SwinV2 checkpoint.")
parser.add_argument("--budget", type=float, default=0.2, help="Share of the backbone to train.")
parser.add_argument("--max_epochs", type=int, default=4)
parser.add_argument("--train_images", type=int, default=800)
parser.add_argument("--batch_size", type=int, default=16, help="Images per step and process.")
parser.add_argument("--accumulate", type=int, default=1, help="Batches of an update step.")
parser.add_argument("--precision", default="32-true", help="Or bf16-mixed, 16-mixed.")
parser.add_argument("--eval_images", type=int, default=200)
parser.add_argument("--learning_rate", type=float, default=3e-3)
parser.add_argument("--ckpt_path", help="Checkpoint of Lightning to go on from.")
parser.add_argument("--seed", type=int, default=0)


class Segmentation(lightning.LightningModule):
    """An adapted UperNet; nothing in it knows of the selection.

    Args:
        model: PEFT's, around the task model.
        learning_rate: Of all that is trained.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.metrics = SegmentationMetrics(len(CLASS_NAMES))

    def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
        """Count a batch."""
        logits = self.model(batch["pixel_values"]).logits
        self.metrics.update(argmax_logits(logits, batch["labels"]), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the score of all batches."""
        self.log("mean_iou", self.metrics.compute()["mean_iou"], prog_bar=True)
        self.metrics.reset()

    def configure_optimizers(self) -> dict:
        """Return AdamW with a rate that falls from step to step."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parser.parse_args(argv)
    lightning.seed_everything(args.seed)

    # 1. Data
    train = DataLoader(SceneDataset(args.train_images, seed=0), args.batch_size, shuffle=True)
    validation = DataLoader(SceneDataset(args.eval_images, seed=1), args.batch_size)

    # 2. Model and adapter
    config = sfa_peft.SFAConfig(budget=args.budget, modules_to_save=["decode_head"])
    model = get_peft_model(make_model(args.backbone), config)

    # 3. Train: the callback goes to the Trainer, the rest is as without SFA
    keep = ModelCheckpoint(args.output_dir, save_last=True, save_top_k=0)
    trainer = lightning.Trainer(
        max_epochs=args.max_epochs,
        accumulate_grad_batches=args.accumulate,
        precision=args.precision,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        default_root_dir=args.output_dir,
        logger=False,
        callbacks=[SFALightningCallback(), keep],
    )
    module = Segmentation(model, args.learning_rate)
    trainer.fit(module, train, validation, ckpt_path=args.ckpt_path)

    # 4. Save the adapter alone; checkpoints of Lightning hold the backbone too
    if trainer.is_global_zero:
        model.save_pretrained(args.output_dir)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    scores |= trainer.validate(module, validation, verbose=False)[0]
    print(f"mean IoU {scores['mean_iou']:.3f}; the adapter is in {args.output_dir}/")
    return scores


if __name__ == "__main__":
    main()
