# SPDX-License-Identifier: Apache-2.0
"""Options, data and bare model of `semantic_segmentation.py`, checked before any training."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import (
    AutoConfig,
    HfArgumentParser,
    Swinv2Backbone,
    Swinv2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

from sfa_peft.dense.data.datasets import load_segmentation
from sfa_peft.dense.data.splits import SubSplit, TransformedSplit
from sfa_peft.dense.data.transforms import IGNORE_INDEX, EvalTransform, TrainTransform
from sfa_peft.dense.scenes.render import CLASS_NAMES, SceneDataset
from sfa_peft.errors import SFAError

HERE = Path(__file__).parent
STAGES = ["stage1", "stage2", "stage3", "stage4"]
METHODS = ("frozen", "sfa", "full")


@dataclass
class Arguments:
    """What to run; every field is a command line option."""

    output_dir: str = field(
        default="out/demo",
        metadata={
            "help": "Folder for results.json, pictures and adapters; overwrites an earlier run."
        },
    )
    backbone: str = field(
        default=str(HERE / "backbones" / "swinv2-nano"),
        metadata={"help": "SwinV2 checkpoint: a folder or a Hub name."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name: images, and masks whose pixels are class ids. Rendered "
            "scenes if not given."
        },
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
        default=None, metadata={"help": "Column of the masks; usual names are found."}
    )
    ignore_index: int | None = field(
        default=None,
        metadata={"help": "Id of unlabelled pixels; if not given, what the json file says or 255."},
    )
    split: Literal["validation", "test"] = field(
        default="validation", metadata={"help": "Split to report on."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["frozen", "sfa", "full"],
        metadata={"help": "Rows of the table: any of frozen, sfa, full."},
    )
    budget: list[float] = field(
        default_factory=lambda: [0.05, 0.2],
        metadata={"help": "Shares of the backbone that SFA may train; one row each."},
    )
    rho: float = field(
        default=0.5,
        metadata={
            "help": "Share of the budget for external adapters; selected weights get the rest."
        },
    )
    score: str = field(
        default="accumulated_gradient",
        metadata={"help": "How weights are ranked: accumulated_gradient, magnitude or random."},
    )
    image_size: list[int] = field(
        default_factory=lambda: [64, 64],
        metadata={"help": "Height and width of training crops; one number for a square."},
    )
    eval_size: list[int] | None = field(
        default=None,
        metadata={"help": "Height and width to evaluate at; as image_size if not given."},
    )
    hidden_size: int = field(default=64, metadata={"help": "Channels of the UperNet head."})
    max_steps: int = field(
        default=200, metadata={"help": "Update steps of each method, 2 or more."}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Images per step and device, 2 or more."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Rate of what is trained in the backbone; if not given, one per method that "
            "suits the rendered scenes."
        },
    )
    head_learning_rate: float = field(
        default=6e-3, metadata={"help": "Rate of the head, which starts at random values."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    num_workers: int = field(default=0, metadata={"help": "Processes that load data."})
    seed: int = field(default=0, metadata={"help": "Seed of head, data order and augmentation."})


def parse(description: str) -> Arguments:
    """Return the command line's arguments, checked as far as is possible without data."""
    parser = HfArgumentParser(Arguments, description=description)
    (args,) = parser.parse_args_into_dataclasses()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods: unknown {sorted(unknown)}; choose from {list(METHODS)}")
    if Path(args.output_dir).is_file():
        parser.error(f"--output_dir: {args.output_dir} is a file")
    args.eval_size = as_size(args.eval_size or args.image_size)
    args.image_size = as_size(args.image_size)
    if None in (args.image_size, args.eval_size):
        parser.error("--image_size, --eval_size: expected one number or height and width")
    square = all(height == width for height, width in (args.image_size, args.eval_size))
    if args.dataset_name is None and not square:
        parser.error("--image_size, --eval_size: rendered scenes are square")
    if args.max_steps < 2:
        parser.error("--max_steps: SFA selects between steps, so there must be 2 or more")
    if args.per_device_train_batch_size < 2:
        parser.error("--per_device_train_batch_size: the head's batch norm needs 2 or more images")
    return args


def as_size(numbers: list[int]) -> list[int] | None:
    """Return height and width of one or two positive numbers, else None."""
    return (numbers * 2)[:2] if len(numbers) in (1, 2) and min(numbers) > 0 else None


def load_data(args: Arguments):
    """Return training and evaluation dataset, class names."""
    if args.dataset_name is None:
        count = args.max_steps * args.per_device_train_batch_size
        train = SceneDataset(count, size=args.image_size[0], seed=0)
        seed = {"validation": 1, "test": 2}[args.split]
        return train, SceneDataset(200, size=args.eval_size[0], seed=seed), list(CLASS_NAMES)
    if args.classes is None and not Path(args.dataset_name).is_dir():
        raise SFAError(
            f"--dataset_name {args.dataset_name}: no such folder; for a dataset of the Hub give "
            "the class names with --classes."
        )
    try:
        data = load_segmentation(
            args.dataset_name,
            classes=args.classes,
            image_column=args.image_column_name,
            label_column=args.label_column_name,
            ignore_index=args.ignore_index,
            holdout=0.2,
        )
    except OSError as error:
        raise SFAError(f"--dataset_name {args.dataset_name}: {error}") from error
    chosen = getattr(data, args.split)
    if chosen is None:
        raise SFAError(f"--split {args.split}: the dataset has no such split.")
    pairs, batch = data.train, args.per_device_train_batch_size
    if len(pairs) < 2:
        raise SFAError(f"--dataset_name {args.dataset_name}: 2 training images are needed.")
    if len(pairs) % batch == 1:  # a last batch of one image would fail in the head's batch norm
        pairs = SubSplit(pairs, range(len(pairs) - 1))
    ignore, names = data.ignore_index, list(data.class_names)
    augment = TrainTransform(tuple(args.image_size), scale=(1.0, 2.0), ignore_index=ignore)
    plain = EvalTransform(tuple(args.eval_size), ignore_index=ignore)
    train = TransformedSplit(pairs, partial(checked, augment, len(names)), seed=args.seed)
    return train, TransformedSplit(chosen, partial(checked, plain, len(names))), names


def checked(transform, num_classes: int, image, mask, rng):
    """Transform a pair; refuse class ids without a name, on which the loss fails unclearly."""
    item = transform(image, mask, rng)
    wrong = (item["labels"] >= num_classes) & (item["labels"] != IGNORE_INDEX)
    if wrong.any():
        raise SFAError(
            f"the mask holds class id {int(item['labels'][wrong].max())}, but there are "
            f"{num_classes} class names (ids 0 to {num_classes - 1}); name every class in "
            "--classes, or give the id of unlabelled pixels as --ignore_index."
        )
    return item


def make_model(args: Arguments, num_labels: int) -> UperNetForSemanticSegmentation:
    """Return UperNet on the pretrained backbone, the same head for every method."""
    try:
        trained = AutoConfig.from_pretrained(args.backbone)
    except (OSError, ValueError) as error:
        raise SFAError(f"--backbone {args.backbone}: {error}") from error
    if not isinstance(trained, Swinv2Config):
        raise SFAError(
            f"--backbone {args.backbone}: a {trained.model_type} checkpoint, but this example "
            "takes SwinV2."
        )
    # SwinV2 clamps windows to its configured image size, so tell it the crop it will see, and what
    # the windows were in pretraining, so that its position bias is scaled as in the paper. 0 is
    # "not known"; a window of 1 has no positions to scale and would divide by 0.
    grids = [trained.image_size // (trained.patch_size * 2**i) for i in range(len(trained.depths))]
    windows = [min(trained.window_size, grid) for grid in grids]
    stated = trained.pretrained_window_sizes
    config = Swinv2Config.from_pretrained(
        args.backbone,
        image_size=min(args.image_size),
        out_features=STAGES,
        pretrained_window_sizes=[
            known or (window if window > 1 else 0)
            for known, window in zip(stated, windows, strict=True)
        ],
    )
    backbone = Swinv2Backbone.from_pretrained(args.backbone, config=config)
    set_seed(args.seed)
    head = UperNetConfig(
        backbone_config=config,
        hidden_size=args.hidden_size,
        num_labels=num_labels,
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(head)
    model.backbone = backbone
    return model
