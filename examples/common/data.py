# SPDX-License-Identifier: Apache-2.0
"""Pairs of image and target: rendered scenes, or the user's data."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from common.arguments import SharedArguments
from sfa_peft import SFAError
from sfa_peft.dense import CLASS_NAMES, THING_NAMES, SceneSplit, Split, SubSplit, load_dense

EVAL_SCENES = 200
HOLDOUT = 0.2  # of the training pairs, where the data has no validation split
LARGEST_ADVISED = 512  # pixels
NAMES = {
    "segmentation": CLASS_NAMES,
    "depth": (),
    "detection": THING_NAMES,
    "instances": THING_NAMES,
}


class Pairs(NamedTuple):
    """Undecoded pairs of image and target."""

    train: Split[Any]
    evaluation: Split[Any]
    class_names: list[str]


class Data(NamedTuple):
    """Items as the model takes them, to train on and to report on."""

    train: Dataset[dict[str, Any]]
    evaluation: Dataset[dict[str, Any]]
    class_names: list[str]


def load_pairs(task: str, args: SharedArguments, **options: Any) -> Pairs:
    """Return rendered scenes, or what `--dataset_name` names.

    Args:
        task: `segmentation`, `depth`, `detection` or `instances`.
        args: The run's arguments.
        options: More for `load_dense`.

    Raises:
        SFAError: If the data cannot be found or read, or is too little to train on.
    """
    if args.dataset_name is None:
        seed = {"validation": 1, "test": 2}[args.split]
        count = args.max_eval_samples or EVAL_SCENES
        scenes = partial(SceneSplit, task=task, crowded=args.crowded)
        train = scenes(args.num_train_images, size=args.image_size[0], seed=0)
        chosen = scenes(count, size=args.eval_size[0], seed=seed)
        return Pairs(train, chosen, list(NAMES[task]))
    where = f"--dataset_name {args.dataset_name}"
    needs_classes = task != "depth" and args.dataset_format in ("auto", "imagefolder")
    if needs_classes and args.classes is None and not Path(args.dataset_name).is_dir():
        raise SFAError(
            f"{where}: no such folder; for a dataset of the Hub give the class names with "
            "--classes."
        )
    try:
        data = load_dense(
            task,
            args.dataset_name,
            dataset_format=args.dataset_format,
            on_error=args.on_error,
            classes=args.classes,
            image_column=args.image_column_name,
            label_column=args.label_column_name,
            ignore_index=args.ignore_index,
            holdout=HOLDOUT,
            **options,
        )
    except OSError as error:
        raise SFAError(f"{where}: {error}") from error
    train, chosen = data.train, data.pick(args.split)
    if not args.has_size:
        raise _ask_for_size(args, train[0][0])
    if len(train) < 2:
        raise SFAError(f"{where}: 2 training images are needed.")
    if len(train) % args.per_device_train_batch_size == 1:
        # A last batch of one image would fail in a head's batch norm.
        train = SubSplit(train, range(len(train) - 1))
    if args.max_eval_samples is not None:
        chosen = SubSplit(chosen, range(min(len(chosen), args.max_eval_samples)))
    return Pairs(train, chosen, list(data.class_names))


def _ask_for_size(args: SharedArguments, image: Image.Image) -> SFAError:
    """Return an error that says what sizes there are to choose from."""
    advised = max(32, min(LARGEST_ADVISED, *image.size) // 32 * 32)
    return SFAError(
        f"--image_size: needed with --dataset_name {args.dataset_name}: height and width of "
        f"training images, which are cut from yours. The first of those is {image.height} x "
        f"{image.width}. More pixels show smaller things and cost more memory; try --image_size "
        f"{advised}. --eval_size is the same unless given."
    )
