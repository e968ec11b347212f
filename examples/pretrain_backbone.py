# SPDX-License-Identifier: Apache-2.0
"""Pretrain a small SwinV2 backbone from scratch by image classification.

On a CPU in hours, going on after an interruption with the same line (`--bf16` pays where the CPU
computes in bfloat16)::

    python examples/pretrain_backbone.py --data path/to/images --epochs 20 --bf16 --compile \
        --resume_from_checkpoint

One process per core computes faster there than threads do (per GPU likewise)::

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/pretrain_backbone.py --threads 1 ...

On a GPU in minutes, the learning rates following the clock; larger batches may want other rates::

    python examples/pretrain_backbone.py --data path/to/images --max_minutes 15 --compile \
        --batch_size 512 --data_name "Tiny-ImageNet"

All images are decoded once and kept as bytes on the device (100,000 of 48 px take 0.7 GB);
augmentation runs there too, in batches. `--output_dir` can then be loaded as any backbone:
`Swinv2Backbone.from_pretrained("out/pretrain", out_features=["stage1", "stage2", ...])`.
"""

import json
import math
import os
import time
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from pretrain_images import ImageSet, augment, decode, load_images, mix, normalise, stored_side
from pretrain_processes import Processes
from pretrain_setup import (
    Arguments,
    load_checkpoint,
    make_model,
    make_optimizer,
    parse,
    save_checkpoint,
    save_model,
    write_atomically,
)
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sfa_peft import SFAError
from sfa_peft.dense import curve_plot


def rate_at(progress: float, warmup: float) -> float:
    """Return the learning rate, as a share of the highest, at a share of the run."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1, (progress - warmup) / max(1e-9, 1 - warmup))))


@lru_cache(maxsize=1)
def order_of(epoch: int, count: int, seed: int) -> torch.Tensor:
    """Return the order of the training images in an epoch."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(count, generator=generator)


def update(compiled, optimizer, images, labels, rate: float, args, processes) -> torch.Tensor:
    """Train on a process's part of a batch, uint8 `(B, 3, h, w)`; return its loss."""
    config = compiled.config
    pixels = augment(images, config.image_size, args.min_area, args.jitter)
    targets = functional.one_hot(labels, config.num_labels).float()
    pixels, targets = mix(pixels, targets, args.mixup, args.cutmix)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
        logits = compiled(pixel_values=pixels).logits
    loss = functional.cross_entropy(logits.float(), targets, label_smoothing=args.label_smoothing)
    compiled.zero_grad()
    loss.backward()
    processes.average_gradients(compiled)
    torch.nn.utils.clip_grad_norm_(compiled.parameters(), 5.0)
    optimizer.step(rate)
    return loss.detach()


@torch.no_grad()
def top1(model, images: torch.Tensor, labels: torch.Tensor, args, processes) -> float:
    """Return the share of images whose likeliest class is the true one."""
    model.eval()
    size, right, total = model.config.image_size, 0, len(images)
    images, labels = processes.part(images), processes.part(labels)
    for start in range(0, len(images), 500):
        batch = images[start : start + 500].to(args.device).float() / 255
        batch = functional.interpolate(batch, (size, size), mode="bilinear", align_corners=False)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(pixel_values=normalise(batch)).logits
        right += int((logits.argmax(1) == labels[start : start + 500]).sum())
    model.train()
    return processes.sum(right) / total


def on_device(split: ImageSet, side: int, args: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, uint8 `(N, 3, side, side)`, and class ids `(N,)`."""
    images = decode(split, side, args.num_workers)
    return images.to(args.device), torch.from_numpy(split.labels).to(args.device)


def finite(loss: float, step: int) -> float:
    """Return a loss that is a number; stop the run of any other."""
    if not math.isfinite(loss):
        raise SFAError(f"the loss is {loss} by step {step}: lower the learning rates")
    return loss


def draw_curves(history: list[list[float]], out: Path) -> None:
    """Plot training loss and validation accuracy over epochs, if there was an evaluation."""
    if history:
        _, epochs, losses, accuracies = zip(*history, strict=True)
        curves = {"loss.png": ("training loss", losses), "top1.png": ("top-1 accuracy", accuracies)}
        for file, (name, values) in curves.items():
            curve_plot({name: (epochs, values)}, out / file, xlabel="epoch", ylabel=name)


def main() -> None:
    args = parse(__doc__.splitlines()[0])
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")
    out = Path(args.output_dir)
    processes = Processes(args.device, args.batch_size)

    # 1. Data: found and checked, not decoded yet
    splits = load_images(Path(args.data))
    names = splits["train"].names
    count = len(splits["train"].labels)
    if count < args.batch_size:
        raise SFAError(f"--batch_size {args.batch_size}: there are only {count} training images")

    # 2. Model, optimizers, and averaged weights if wanted
    model = make_model(args, names)
    optimizer = make_optimizer(model, args)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema or 0.0))
    final = averaged.module if args.ema else model
    compiled = torch.compile(model) if args.compile else model

    # 3. Go on where a checkpoint ends
    step, seconds, history = 0, 0.0, []
    loss_sum = torch.zeros((), device=args.device)
    checkpoint = out / "checkpoint.pt"
    if args.resume_from_checkpoint and checkpoint.exists():
        state = load_checkpoint(checkpoint, args, processes)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.load_state_dict(state["averaged"])
        step, seconds, history = state["step"], state["seconds"], state["history"]
        loss_sum = state["loss_sum"]
        print(f"going on after step {step}")
    out.mkdir(parents=True, exist_ok=True)

    # 4. All images decoded, onto the device
    side = stored_side(splits["train"], model.config.image_size)
    train, val = (on_device(splits[name], side, args) for name in ("train", "val"))

    # 5. Train. All random numbers of a step follow from the seed and its number, so that a run
    #    that was killed and goes on from a checkpoint gives the weights of one that was not.
    steps_per_epoch = count // args.batch_size
    total = max(1, round(args.epochs * steps_per_epoch))
    eval_steps = args.eval_steps or steps_per_epoch
    limit = 60 * args.max_minutes if args.max_minutes else math.inf
    started = time.monotonic() - seconds
    bar = tqdm(
        total=None if args.max_minutes else total,
        initial=step,
        mininterval=1,
        disable=not processes.first,
    )
    model.train()
    while True:
        seconds = time.monotonic() - started
        progress = processes.mean(seconds) / limit if args.max_minutes else step / total
        if progress >= 1:
            break
        torch.manual_seed(args.seed + 1_000_003 * (step + 1) + processes.rank)
        epoch, place = divmod(step, steps_per_epoch)
        start = place * args.batch_size
        chosen = order_of(epoch, count, args.seed)[start : start + args.batch_size]
        chosen = processes.part(chosen).to(args.device)
        batch = [tensor[chosen] for tensor in train]
        rate = rate_at(progress, args.warmup)
        loss_sum += update(compiled, optimizer, *batch, rate, args, processes)
        step += 1
        if args.ema and progress >= args.warmup:
            averaged.update_parameters(model)
        bar.update()

        # 6. Look at the validation images now and then, and keep what was reached
        if step % eval_steps == 0:
            loss_mean = finite(processes.mean(loss_sum.item()) / eval_steps, step)
            accuracy = top1(final, *val, args, processes)
            history.append([step, step / steps_per_epoch, loss_mean, accuracy])
            loss_sum.zero_()
            bar.set_postfix(loss=f"{loss_mean:.3f}", top1=f"{accuracy:.3f}")
        if step % args.save_steps == 0:
            loss_sum.fill_(processes.mean(loss_sum.item()))
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "averaged": averaged.state_dict(),
                "step": step,
                "seconds": time.monotonic() - started,
                "history": history,
                "loss_sum": loss_sum,
            }
            save_checkpoint(checkpoint, args, state, processes)
    bar.close()

    # 7. Evaluate and save: weights, config, README, curves
    results = {
        "top1": top1(final, *val, args, processes),
        "epochs": step / steps_per_epoch,
        "steps": step,
        "minutes": seconds / 60,
        "images_per_second": step * args.batch_size / max(seconds, 1e-9),
        "train_images": count,
        "val_images": len(val[0]),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "a CPU",
        "processes": processes.count,
    }
    processes.close()
    if processes.first:
        write_results(final, args, results, history)


def write_results(model, args: Arguments, results: dict, history: list[list[float]]) -> None:
    """Write weights, config, README, figures and curves."""
    out = Path(args.output_dir)
    save_model(model, args, results)
    text = json.dumps({"arguments": vars(args), "results": results, "history": history}, indent=2)
    write_atomically(out / "results.json", lambda path: path.write_text(text))
    draw_curves(history, out)
    print(
        f"top-1 {results['top1']:.1%} after {results['epochs']:.1f} epochs, "
        f"{results['images_per_second']:.0f} images/s; written to {out}/"
    )


if __name__ == "__main__":
    try:
        main()
    except SFAError as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from error
