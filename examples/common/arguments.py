# SPDX-License-Identifier: Apache-2.0
"""Arguments that all scripts share, read from a recipe file and the command line."""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from common.peers import PEERS
from common.peers.of_peft import OF_PEFT
from common.recipes import read_recipes
from sfa_peft import SFAError

OF_SFA = ("sfa", "internal", "external", "random", "gps")
METHODS = ("frozen", *OF_SFA, *OF_PEFT, *PEERS, "full")
ONE_SIZE = ("frozen", *(name for name, peer in PEERS.items() if peer.smallest is None), "full")
NEW_LAYERS = ("lora", *(name for name, peer in PEERS.items() if peer.is_new))
WITH_WIDTH = ("sfa", "adaptformer", "adapter_plus", "mona")
UNDECAYED = ("norms", "biases", "embeddings")
DEFAULT_BACKBONE = Path(__file__).parents[1] / "backbones" / "swinv2-nano"


@dataclass
class SharedArguments:
    """What to run; every field is a command line option."""

    recipe: list[str] | None = field(
        default=None,
        metadata={
            "help": "yaml or json files of options; later ones override earlier ones, and the "
            "command line all of them."
        },
    )
    output_dir: str = field(
        default="out/example",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Remove what an earlier run left in the folder; else it is refused."},
    )
    # --- method
    method: str = field(
        default="sfa",
        metadata={
            "choices": METHODS,
            "help": "What is trained beside the head: nothing, SFA, only one of its two parts, a "
            "random selection, a method of others (see docs/peers.md), or all of the backbone.",
        },
    )
    budget: float = field(
        default=0.05,
        metadata={
            "help": "Share of the backbone that may be trained, (0, 1]. Has no effect on methods "
            f"of one size: {', '.join(ONE_SIZE)}."
        },
    )
    rho: float | None = field(
        default=None,
        metadata={
            "help": "Of SFA: share of the budget for external adapters, 0.5 if not given; selected "
            "weights get the rest."
        },
    )
    adapter_dim: int | None = field(
        default=None,
        metadata={
            "help": "Width of SFA's external adapters, instead of --rho, or of the bottlenecks of "
            "AdaptFormer, Adapter+ and Mona, instead of what the budget allows."
        },
    )
    external_type: str = field(
        default="bottleneck",
        metadata={
            "help": "Of SFA: form of external adapters, bottleneck or mona (with convolutions)."
        },
    )
    score: str = field(
        default="accumulated_gradient", metadata={"help": "Of SFA: how weights are ranked."}
    )
    selection_steps: int | None = field(
        default=None, metadata={"help": "Of SFA: update steps in a round; as SFAConfig if not set."}
    )
    schedule: str = field(
        default="linear",
        metadata={"help": "Of SFA: how the selection grows: linear, cubic, one_shot or literal."},
    )
    select_until: float | None = field(
        default=None,
        metadata={"help": "Of SFA: share of the run after which nothing is selected any more."},
    )
    internal_lr_ratio: float = field(
        default=1.0, metadata={"help": "Of SFA: rate of selected weights over --learning_rate."}
    )
    selection_from: str | None = field(
        default=None,
        metadata={
            "help": "Of SFA: saved adapter whose selection is trained anew, instead of selecting."
        },
    )
    # --- backbone
    backbone: str = field(
        default=str(DEFAULT_BACKBONE),
        metadata={"help": "SwinV2 checkpoint: a folder or a Hub name."},
    )
    window_size: int | None = field(
        default=None, metadata={"help": "Attention window; the checkpoint's own if not given."}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth; the checkpoint's own if not given."}
    )
    norm_outputs: bool = field(
        default=False,
        metadata={
            "help": "Put a LayerNorm on each feature map that the head takes, as the Swin code of "
            "other libraries does; it belongs to the head."
        },
    )
    # --- data
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of the data. Rendered scenes if not given."},
    )
    dataset_format: Literal[
        "auto", "imagefolder", "folders", "ade20k", "cityscapes", "coco", "kitti", "nyuv2", "voc",
        "yolo",
    ] = field(
        default="auto",
        metadata={
            "help": "Layout of the folder; auto looks what it is. imagefolder is also parquet and "
            "the Hub, folders is images/ beside masks/ or depth/."
        },
    )  # fmt: skip
    on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "Stop at images that cannot be used, or look for them first and skip."},
    )
    classes: str | None = field(
        default=None,
        metadata={
            "help": 'json file with the class names: a list, {"id2label": {"0": name, ...}} or '
            '{"classes": [name, ...], "ignore_index": id}. If not given, meta.json, classes.json '
            "or id2label.json in the dataset's folder."
        },
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images; usual names are found."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of masks, depth or objects; usual names are found."},
    )
    ignore_index: int | None = field(
        default=None,
        metadata={"help": "Id of unlabelled pixels; if not given, what the json file says or 255."},
    )
    crowded: bool = field(
        default=False,
        metadata={
            "help": "Of rendered scenes: several things of a class, near and far, one before the "
            "other. Harder: detection and instance segmentation then want longer training."
        },
    )
    split: Literal["validation", "test"] = field(
        default="validation", metadata={"help": "Split to report on."}
    )
    image_size: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Height and width of training images, one number for a square. Needed with "
            "data of your own; rendered scenes have 64."
        },
    )
    eval_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width to evaluate at; as image_size if not given. In segmentation "
            "and depth, images of your own keep their shape and just cover it; in depth they stay "
            "as they are if it is not given."
        },
    )
    train_scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={"help": "Range of the random scale of your images; 1 just fits the crop."},
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Items to report on at most; of rendered scenes 200 if not given."},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load data."})
    # --- training
    max_steps: int = field(default=200, metadata={"help": "Update steps, 2 or more."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Of your own data: passes over it, instead of --max_steps."}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Images per step and device."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches that make up one update step."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Rate of what is trained in the backbone; if not given, one per method that "
            "suits the rendered scenes."
        },
    )
    external_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Rate of new layers in the backbone: SFA's external adapters, LoRA, SSF, VPT, "
            "AdaptFormer, Adapter+, Mona; as for pretrained weights if not given."
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Rate of the head; if not given, one that suits the rendered scenes."},
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the rates from each layer of the backbone to the one below; one "
            "rate for all if not given."
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    no_decay: list[str] = field(
        default_factory=list,
        metadata={"help": "What has no weight decay, of: norms, biases, embeddings."},
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Course of the rates: cosine, linear, polynomial, ..."}
    )
    lr_scheduler_kwargs: str | None = field(
        default=None, metadata={"help": 'Of the course, as json: {"power": 0.9}.'}
    )
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps of rising rates; a twentieth if not given."}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 (autocast)."})
    fp16: bool = field(
        default=False, metadata={"help": "Compute in float16, its loss scaled; for GPUs."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of head, data order and augmentation."})
    # --- reports, checkpoints and Hub
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "Where to log beside the screen: tensorboard, wandb, mlflow, ..."},
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints; none are kept if not given."}
    )
    eval_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between evaluations, drawn in scores.png; else only one, last."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint folder to go on from, or `last` for that in output_dir."},
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the adapter, results and pictures to the Hub."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Name on the Hub; that of output_dir if not given."}
    )

    def __post_init__(self) -> None:
        self.has_size = bool(self.image_size)
        self.image_size = self.image_size or [64, 64]

    def check(self) -> None:
        """Put sizes into one form and refuse what cannot work whatever the data.

        Raises:
            SFAError: If a value is out of range.
        """
        if Path(self.output_dir).is_file():
            raise SFAError(f"--output_dir: {self.output_dir} is a file")
        self.image_size = as_size(self.image_size, "image_size")
        self.eval_size = as_size(self.eval_size or self.image_size, "eval_size")
        if self.dataset_name is None and self.dataset_format not in ("auto", "imagefolder"):
            raise SFAError(f"--dataset_name: needed for --dataset_format {self.dataset_format}")
        square = all(height == width for height, width in (self.image_size, self.eval_size))
        if self.dataset_name is None and not square:
            raise SFAError("--image_size, --eval_size: rendered scenes are square")
        if len(self.train_scale) != 2:
            raise SFAError(f"--train_scale: expected two numbers, got {self.train_scale}")
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise SFAError("--max_eval_samples: expected 1 or more")
        self._check_length()
        self._check_training()

    def _check_length(self) -> None:
        if self.num_train_epochs is not None and self.num_train_epochs <= 0:
            raise SFAError(f"--num_train_epochs: expected above 0, got {self.num_train_epochs}")
        if self.num_train_epochs is not None and self.dataset_name is None:
            raise SFAError("--num_train_epochs: rendered scenes never repeat; give --max_steps")
        if self.max_steps < 2:
            raise SFAError("--max_steps: SFA selects between steps, so there must be 2 or more")
        if self.per_device_train_batch_size < 1 or self.gradient_accumulation_steps < 1:
            raise SFAError(
                "--per_device_train_batch_size, --gradient_accumulation_steps: expected 1 or more"
            )
        if self.bf16 and self.fp16:
            raise SFAError("--bf16, --fp16: one of them")

    def _check_training(self) -> None:
        if not 0 < self.budget <= 1:
            raise SFAError(
                f"--budget: expected a share of the backbone in (0, 1], got {self.budget}"
            )
        if self.selection_from is not None and self.method != "sfa":
            raise SFAError(f"--selection_from: needs --method sfa, got {self.method}")
        if self.adapter_dim is not None and self.method not in WITH_WIDTH:
            raise SFAError(
                f"--adapter_dim: needs --method {', '.join(WITH_WIDTH)}, got {self.method}"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise SFAError(f"--layer_decay: expected a factor in (0, 1], got {self.layer_decay}")
        if not set(self.no_decay) <= set(UNDECAYED):
            raise SFAError(f"--no_decay: expected some of {list(UNDECAYED)}, got {self.no_decay}")
        if self.lr_scheduler_kwargs is not None:
            _as_json(self.lr_scheduler_kwargs)

    def count_steps(self, num_images: int) -> None:
        """Set `max_steps` to what `num_train_epochs` come to, as the Trainer counts."""
        if self.num_train_epochs is None:
            return
        at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        batches = math.ceil(num_images / at_once)
        steps = math.ceil(batches / self.gradient_accumulation_steps)
        self.max_steps = max(2, math.ceil(steps * self.num_train_epochs))

    @property
    def num_train_images(self) -> int:
        """Images that a run sees on one device: so many scenes are rendered, each seen once."""
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.max_steps * per_step

    def facts(self) -> dict[str, Any]:
        """Return what more of a run stands in the row of results.json."""
        return {}

    def schedule_options(self) -> dict[str, Any]:
        """Return `lr_scheduler_kwargs` as a dict."""
        return _as_json(self.lr_scheduler_kwargs or "{}")


def find_checkpoint(args: SharedArguments) -> str | None:
    """Return the folder that `resume_from_checkpoint` means, if it is given.

    Raises:
        SFAError: If there is no such checkpoint.
    """
    wanted, out = args.resume_from_checkpoint, Path(args.output_dir)
    if wanted is None:
        return None
    if wanted == "last":
        found = get_last_checkpoint(str(out)) if out.is_dir() else None
        if found is None:
            raise SFAError(f"--resume_from_checkpoint last: no checkpoint in {out}")
        return found
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise SFAError(f"--resume_from_checkpoint {wanted}: no checkpoint of a Trainer there")
    return wanted


Arguments = TypeVar("Arguments", bound=SharedArguments)


def parse(kind: type[Arguments], argv: Sequence[str] | None, description: str) -> Arguments:
    """Return the checked arguments of a command line and of the recipes that it names.

    A recipe is a command line in a file: recipes are read first, then `argv`, and of two equal
    options the last holds. Ends the process with a message if an option cannot be used.

    Args:
        kind: The script's arguments.
        argv: Options; None for those of the process.
        description: First line of the help.
    """
    parser = HfArgumentParser(kind, description=description, allow_abbrev=False)
    given = list(sys.argv[1:] if argv is None else argv)
    first, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        close = [c for u in unknown for c in get_close_matches(u.split("=")[0], known, n=1)]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        parser.error(f"unknown options: {' '.join(unknown)}{hint}")
    try:
        options = read_recipes(first.recipe or [], set(vars(first)))
        (args,) = parser.parse_args_into_dataclasses([*options, *given])
        args.check()
    except SFAError as error:
        parser.error(str(error))
    return args


def as_size(numbers: Sequence[int], name: str) -> list[int]:
    """Return height and width of one or two positive numbers."""
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise SFAError(f"--{name}: expected one number or height and width, got {list(numbers)}")
    return (list(numbers) * 2)[:2]


def _as_json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise SFAError(f"--lr_scheduler_kwargs: not json: {text}") from error
    if not isinstance(content, dict):
        raise SFAError(f"--lr_scheduler_kwargs: expected a json object, got {text}")
    return content
