# SPDX-License-Identifier: Apache-2.0
"""Options, model, checkpoint and README of `pretrain_backbone.py`."""

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pretrain_processes import Processes
from transformers import HfArgumentParser, Swinv2Config, Swinv2ForImageClassification

from sfa_peft import SFAError

HERE = Path(__file__).parent
# What may differ between a run and its continuation.
FREE_TO_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "num_workers", "threads"),
    *("save_dtype", "data_name", "data_licence"),
}


@dataclass
class Arguments:
    """What to train; every field is a command line option."""

    data: str = field(
        metadata={
            "help": "Folder with a training and a validation split: <split>/<class>/*.jpg, "
            "<split>.npz or <split>*.parquet; see pretrain_images.load_images."
        }
    )
    output_dir: str = field(
        default="out/pretrain", metadata={"help": "Folder for the model, its README and curves."}
    )
    config: str = field(
        default=str(HERE / "backbones" / "swinv2-nano"),
        metadata={"help": "SwinV2 config: a folder or a json file; its number of classes is set."},
    )
    epochs: float = field(default=20, metadata={"help": "Passes over the training images."})
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Train for this time instead; the learning rate then follows the clock."},
    )
    batch_size: int = field(
        default=128, metadata={"help": "Images per update step, of all processes together."}
    )
    optimizer: Literal["muon", "adamw"] = field(
        default="muon",
        metadata={
            "help": "What updates the matrices of the blocks: Muon (torch 2.9 or newer; learns "
            "more per epoch) or AdamW, which updates all else in any case."
        },
    )
    muon_learning_rate: float = field(default=3e-3, metadata={"help": "Highest rate of Muon."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Highest rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of matrices; the rest has none."})
    warmup: float = field(default=0.05, metadata={"help": "Share of the run in which rates rise."})
    label_smoothing: float = field(default=0.1, metadata={"help": "Share spread over all classes."})
    drop_path: float = field(default=0.0, metadata={"help": "Stochastic depth of the last block."})
    min_area: float = field(default=0.25, metadata={"help": "Smallest share of an image cropped."})
    jitter: float = field(default=0.3, metadata={"help": "Strength of colour changes, 0 to 1."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0 switches it off."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of cutmix; 0 switches it off."})
    ema: float = field(
        default=0.0, metadata={"help": "Decay of averaged weights, say 0.999; 0 saves the last."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to train."}
    )
    bf16: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Autocast to bfloat16."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the model."})
    threads: int = field(default=0, metadata={"help": "CPU threads of torch; 0 leaves them be."})
    num_workers: int = field(
        default=os.cpu_count() or 1, metadata={"help": "Threads that decode images at the start."}
    )
    eval_steps: int = field(
        default=0, metadata={"help": "Steps between evaluations; by default those of an epoch."}
    )
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    resume_from_checkpoint: bool = field(
        default=False,
        metadata={"help": "Go on from output_dir's checkpoint; start anew if there is none."},
    )
    save_dtype: Literal["float32", "float16"] = field(
        default="float32",
        metadata={"help": "Type of the stored weights; float16 files still load as float32."},
    )
    data_name: str = field(
        default="not stated", metadata={"help": "The data's name and origin, for the README."}
    )
    data_licence: str = field(
        default="not stated; ask before you use or pass on these weights",
        metadata={"help": "The data's terms, for the README."},
    )


def parse(description: str) -> Arguments:
    """Return the command line's arguments, checked as far as is possible without data."""
    parser = HfArgumentParser(Arguments, description=description)
    (args,) = parser.parse_args_into_dataclasses()
    positive = ["epochs", "batch_size", "learning_rate", "save_steps", "num_workers", "min_area"]
    if args.optimizer == "muon":
        positive.append("muon_learning_rate")
    for name in positive:
        if not getattr(args, name) > 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(args, name)}")
    for name in ("warmup", "label_smoothing", "drop_path", "min_area", "jitter", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name}: expected 0 to 1, got {getattr(args, name)}")
    if args.max_minutes is not None and args.max_minutes <= 0:
        parser.error(f"--max_minutes: expected more than 0, got {args.max_minutes}")
    if args.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        parser.error(f"--optimizer muon: torch {torch.__version__} has none; take adamw")
    if not Path(args.data).is_dir():
        parser.error(f"--data {args.data}: no such folder")
    return args


def make_model(args: Arguments, class_names: list[str]) -> Swinv2ForImageClassification:
    """Return a new classifier; the gains of residual norms are 0, as in the original SwinV2."""
    try:
        config = Swinv2Config.from_pretrained(args.config)
    except (OSError, ValueError) as error:
        raise SFAError(f"--config {args.config}: {error}") from error
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: i for i, name in enumerate(class_names)}
    config.drop_path_rate = args.drop_path
    torch.manual_seed(args.seed)
    model = Swinv2ForImageClassification(config)
    for stage in model.swinv2.encoder.layers:
        for block in stage.blocks:
            for norm in (block.layernorm_before, block.layernorm_after):
                torch.nn.init.zeros_(norm.weight)  # every block starts as the identity
    return model.to(args.device)


class Optimizers:
    """Several optimizers whose rates rise and fall together."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members
        self.highest = [[group["lr"] for group in m.param_groups] for m in members]

    def step(self, rate: float) -> None:
        """Update all parameters, at a share of the highest rates."""
        for member, highest in zip(self.members, self.highest, strict=True):
            for group, lr in zip(member.param_groups, highest, strict=True):
                group["lr"] = lr * rate
            member.step()

    def state_dict(self) -> list[dict]:
        """Return what a continuation needs."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, state: list[dict]) -> None:
        """Go on from what `state_dict` returned."""
        for member, content in zip(self.members, state, strict=True):
            member.load_state_dict(content)


def make_optimizer(model: torch.nn.Module, args: Arguments) -> Optimizers:
    """Return AdamW, and Muon for the matrices of the blocks if wanted.

    Only matrices and kernels decay, but not the attention's positions and scales.
    """
    undecayed = ("continuous_position_bias_mlp", "logit_scale")
    matrices, decayed, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(part in name for part in undecayed):
            rest.append(parameter)
        elif args.optimizer == "muon" and parameter.ndim == 2 and "classifier" not in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, args.learning_rate, fused=True)
    if not matrices:
        return Optimizers(adamw)
    muon = torch.optim.Muon(
        matrices,
        args.muon_learning_rate,
        weight_decay=args.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # rates of AdamW's size for any shape
    )
    return Optimizers(adamw, muon)


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, args: Arguments, state: dict, processes: Processes) -> None:
    """Write all that a continuation needs; random numbers are drawn anew from seed and step."""
    state = state | {"arguments": vars(args) | {"processes": processes.count}}
    if processes.first:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, args: Arguments, processes: Processes) -> dict:
    """Read a checkpoint, refusing one of a run with other options."""
    state = torch.load(path, map_location=args.device, weights_only=True)
    theirs = state.pop("arguments")
    for name, value in {**vars(args), "processes": processes.count}.items():
        if name not in theirs:
            raise SFAError(f"{path} is of another version of this script: start anew")
        unused = name == "muon_learning_rate" and args.optimizer != "muon"
        if name not in FREE_TO_CHANGE and not unused and theirs[name] != value:
            raise SFAError(
                f"{path}: {name} was {theirs.get(name)} in that run and is {value} in this one; "
                "use the same options and processes, or another --output_dir to start anew"
            )
    return state


def save_model(model: Swinv2ForImageClassification, args: Arguments, results: dict) -> None:
    """Write weights, config and README, so that `from_pretrained(output_dir)` works."""
    out = Path(args.output_dir)
    model.to(getattr(torch, args.save_dtype)).save_pretrained(out)
    # transformers 5 loads into the type that the config names.
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(out / "config.json", lambda path: path.write_text(text))
    write_atomically(out / "README.md", lambda path: path.write_text(readme(model, args, results)))


def readme(model: Swinv2ForImageClassification, args: Arguments, results: dict) -> str:
    """Return the text that goes with the weights."""
    config = model.config
    processes = f", {results['processes']} processes" if results["processes"] > 1 else ""
    averaged = f", weights averaged with decay {args.ema}" if args.ema else ""
    facts = {
        "Data": f"{args.data_name}; {results['train_images']:,} training and "
        f"{results['val_images']:,} validation images, {config.num_labels} classes.",
        "Terms of the data": f"{args.data_licence}. The code's licence does not cover the weights.",
        "Training": f"{results['epochs']:.1f} epochs in {results['minutes']:.1f} minutes on "
        f"{results['device']}{processes}, batch {args.batch_size}, {args.optimizer}{averaged}.",
        "Quality": f"{results['top1']:.1%} top-1 on the validation images.",
    }
    count = results["processes"]
    launcher = "python" if count == 1 else f"torchrun --nproc_per_node {count}"
    shape = (
        f"embedding {config.embed_dim}, depths {'-'.join(map(str, config.depths))}, window "
        f"{config.window_size}, patch {config.patch_size}, {config.image_size} px"
    )
    listed = "\n".join(f"- **{name}**: {fact}" for name, fact in facts.items())
    return f"""# {Path(args.output_dir).name}

A SwinV2 classifier of {model.num_parameters() / 1e6:.2f} M parameters, trained from scratch:
{shape}.

{listed}

```
{launcher} {shlex.join(sys.argv)}
```
"""
