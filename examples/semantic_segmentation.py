# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation with UperNet: frozen backbone, SFA and full fine-tuning side by side.

Runs with no argument: rendered scenes and a small SwinV2 that ships with the examples, a few
minutes on two cores::

    python examples/semantic_segmentation.py

Your own data (a Hub name, or a folder: imagefolder with image and label columns, parquet, or pairs
`train/*.jpg` + `trainannot/*.png`) and backbone::

    python examples/semantic_segmentation.py --dataset_name path/to/data --classes classes.json \
        --backbone microsoft/swinv2-base-patch4-window12-192-22k --image_size 512 512 \
        --max_steps 40000 --learning_rate 1e-4

It prints a table (trainable share, mIoU, bytes per task) and writes adapters and pictures to
`--output_dir`: input, truth and predictions, learning curves, and where the selected weights are.
"""

import copy
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from segmentation_setup import Arguments, load_data, make_model, parse
from transformers import Trainer, TrainingArguments

import sfa_peft
from sfa_peft.dense.metrics.segmentation import SegmentationMetrics, argmax_logits
from sfa_peft.dense.pictures.sheets import contact_sheet, curve_plot
from sfa_peft.errors import SFAError

# Found on the validation scenes; a run on other data wants its own (see --learning_rate).
LEARNING_RATES = {"frozen": 0.0, "sfa": 3e-3, "full": 2e-3}


def prepare(model, method: str, budget: float | None, args: Arguments):
    """Return the model made ready for a method, and the Trainer callbacks it needs."""
    if method == "sfa":
        config = sfa_peft.SFAConfig(  # SFA: one budget, the head in modules_to_save
            budget=budget, rho=args.rho, score=args.score, modules_to_save=["decode_head"]
        )
        return get_peft_model(model, config), [sfa_peft.SFACallback()]  # SFA
    model.backbone.requires_grad_(method == "full")
    return model, []


def make_optimizer(model, rate: float, args: Arguments) -> torch.optim.AdamW:
    """Return AdamW with one rate for the head and one for the rest of what is trained."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trained.items() if "decode_head" in n]
    rest = [p for n, p in trained.items() if "decode_head" not in n]
    groups = [{"params": head, "lr": args.head_learning_rate}, {"params": rest, "lr": rate}]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=args.weight_decay)


def save(model, method: str, folder: Path) -> int:
    """Save what a task needs beside the backbone; return its bytes."""
    if method == "frozen":
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.decode_head.state_dict(), folder / "head.pt")
    else:
        model.save_pretrained(folder)  # SFA: adapters, sparse change and head only
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".pt"))


def predict(model, dataset, indices) -> list[np.ndarray]:
    """Return predicted class maps of some items."""
    model.eval()
    maps = []
    for index in indices:
        item = dataset[index]
        with torch.no_grad():
            logits = model(pixel_values=item["pixel_values"][None].to(model.device)).logits
        maps.append(argmax_logits(logits, item["labels"][None])[0].cpu().numpy())
    return maps


def picture(item) -> np.ndarray:
    """Undo the normalisation of an item's image."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = item["pixel_values"].permute(1, 2, 0).numpy() * std + mean
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def main() -> None:
    args = parse(__doc__.splitlines()[0])

    # 1. Data
    train_data, eval_data, class_names = load_data(args)

    # 2. One run per row of the table; all are set up once, so that mistakes show before training
    budgets = dict.fromkeys(args.budget)
    runs = [
        (m, b) for m in dict.fromkeys(args.methods) for b in (budgets if m == "sfa" else [None])
    ]
    for method, budget in runs:
        prepare(make_model(args, len(class_names)), method, budget, args)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows, curves, sheets = [], {}, {}
    shown = range(0, len(eval_data), max(1, len(eval_data) // 4))[:4]
    for method, budget in runs:
        name = f"SFA {100 * budget:g}%" if method == "sfa" else method
        print(f"\n--- {name} ---")

        # 3. Model and adapter
        base = make_model(args, len(class_names))
        untouched = copy.deepcopy(base) if method == "sfa" else None
        backbone_size = sum(p.numel() for p in base.backbone.parameters())
        model, callbacks = prepare(base, method, budget, args)
        share = {"frozen": 0.0, "full": 1.0}.get(method)
        if method == "sfa":
            report = sfa_peft.budget_report(model)  # SFA
            print(report)
            share = report.share
        # Without this Trainer takes the loss as summed over micro-batches (transformers #47688).
        model.accepts_loss_kwargs = base.accepts_loss_kwargs = False

        # 4. Train
        rate = LEARNING_RATES[method] if args.learning_rate is None else args.learning_rate
        folder = out / name.lower().replace(" ", "_").replace("%", "")
        settings = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.per_device_train_batch_size,
            per_device_eval_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.max_steps // 20),
            logging_steps=max(1, args.max_steps // 20),
            save_strategy="no",
            batch_eval_metrics=True,
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_num_workers=args.num_workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            seed=args.seed,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=train_data,
            eval_dataset=eval_data,
            compute_metrics=SegmentationMetrics(len(class_names), class_names=class_names),
            preprocess_logits_for_metrics=argmax_logits,
            callbacks=callbacks,
            optimizers=(make_optimizer(model, rate, args), None),
        )
        trainer.train()

        # 5. Evaluate
        scores = trainer.evaluate()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves[name] = ([e["step"] for e in log], [e["loss"] for e in log])

        # 6. Save, and for SFA load it again to see that nothing is lost
        size = save(model, method, folder)
        sheets[name] = predict(model, eval_data, shown)
        if method == "sfa":
            restored = PeftModel.from_pretrained(untouched, folder).to(model.device)
            again = predict(restored, eval_data, shown)
            same = all(np.array_equal(a, b) for a, b in zip(again, sheets[name], strict=True))
            print(f"loaded again from {folder}: {'same predictions' if same else 'DIFFERENT'}")
            summary = sfa_peft.selection_summary(model)
            sfa_peft.plot_selection(summary, out / f"{folder.name}_selection.png")
        ious = {n: scores[f"eval_iou_{n}"] for n in class_names}
        rows.append(
            {
                "method": name,
                "trainable_share": share,
                "trainable_backbone": round(share * backbone_size),
                "mean_iou": scores["eval_mean_iou"],
                "pixel_accuracy": scores["eval_pixel_accuracy"],
                "iou": {n: None if np.isnan(iou) else iou for n, iou in ious.items()},
                "bytes": size,
                "learning_rate": rate,
            }
        )

    # 7. Table and pictures
    print(
        f"\n{'method':10} {'trainable':>10} {'mIoU':>7} {'pixel acc.':>10} {'bytes per task':>15}"
    )
    for row in rows:
        print(
            f"{row['method']:10} {row['trainable_share']:>10.1%} {row['mean_iou']:>7.3f} "
            f"{row['pixel_accuracy']:>10.3f} {row['bytes']:>15,}"
        )
    (out / "results.json").write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2))
    inputs = [picture(eval_data[i]) for i in shown]
    truths = [eval_data[i]["labels"].numpy() for i in shown]
    table = [list(r) for r in zip(inputs, truths, *sheets.values(), strict=True)]
    contact_sheet(
        table, ["input", "truth", *sheets], out / "predictions.png", class_names=class_names
    )
    curve_plot(curves, out / "training.png", xlabel="update step", ylabel="training loss")
    print(f"\nPictures, adapters and results.json are in {out}/")


if __name__ == "__main__":
    try:
        main()
    except SFAError as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from error
