# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: a SwinV2 with a UperNet or Mask2Former head, adapted within a budget.

Runs with no argument: rendered scenes and a small SwinV2 that ships with the examples, under a
minute on two cores, to a mean IoU of about 0.58::

    python examples/semantic_segmentation.py

Your own data (a Hub name, or a folder: imagefolder with image and label columns, parquet, or pairs
`train/*.jpg` + `trainannot/*.png`) and backbone::

    python examples/semantic_segmentation.py --dataset_name path/to/data --classes classes.json \
        --backbone microsoft/swinv2-base-patch4-window12-192-22k --image_size 512 512 \
        --max_steps 40000 --learning_rate 1e-4 --method sfa --budget 0.2

What the paper trained (see the file)::

    python examples/semantic_segmentation.py --dataset_name path/to/ade20k \
        --recipe examples/recipes/ade20k_mask2former.yaml

Several methods side by side: `compare_methods.py`.
"""

import math
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from common.arguments import as_size
from common.augmented import Maps, try_maps
from common.backbones import load_backbone
from common.data import Data, load_pairs
from common.maps import MapArguments, MapScoring
from common.mask2former import Mask2FormerOptions, build_mask2former, check_width
from common.reporting import Result
from common.task import Task, run_task
from common.training import Rates, pick_rates, run_script
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation, set_seed

from sfa_peft import SFAError
from sfa_peft.dense import (
    EvalTransform,
    Mask2FormerForSemanticSegmentation,
    NormedFeatures,
    Preprocessing,
    SegmentationMetrics,
    TrainTransform,
    TransformedSplit,
    argmax_logits,
    contact_sheet,
    multi_scale_probabilities,
)

SIZE_DIVISORS = {"upernet": 1, "mask2former": 32}  # of test images, as in mmseg and Mask2Former


@dataclass
class Arguments(Mask2FormerOptions, MapArguments):
    """Options of semantic segmentation."""

    output_dir: str = field(
        default="out/semantic_segmentation",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    head: Literal["upernet", "mask2former"] = field(
        default="upernet", metadata={"help": "Task head on the backbone."}
    )
    train_scale: list[float] = field(
        default_factory=lambda: [1.0, 2.0],
        metadata={"help": "Range of the random scale of training images; 1 just covers the crop."},
    )
    test_scales: list[float] | None = field(
        default=None,
        metadata={
            "help": "At the end, evaluate once more over these scales and mirror images: 0.5 0.75 "
            "1.0 1.25 1.5 1.75 are those of multi-scale results on ADE20K."
        },
    )
    test_crop_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "At the end, evaluate once more in windows of this height and width, at each "
            "of --test_scales if given."
        },
    )
    test_stride: list[int] | None = field(
        default=None,
        metadata={"help": "Distance of the windows; two thirds of --test_crop_size if not given."},
    )

    def check(self) -> None:
        """Refuse what cannot work whatever the data."""
        super().check()
        if self.head == "upernet" and self.per_device_train_batch_size < 2:
            raise SFAError(
                "--per_device_train_batch_size: UperNet's batch norm needs 2 or more images"
            )
        if self.head == "mask2former":
            check_width(self)
        if self.test_scales is not None and not all(0 < s < math.inf for s in self.test_scales):
            raise SFAError(f"--test_scales: expected numbers above 0, got {self.test_scales}")
        if self.test_stride is not None and self.test_crop_size is None:
            raise SFAError("--test_stride: needs --test_crop_size")
        if self.test_crop_size is not None:
            crop = self.test_crop_size = as_size(self.test_crop_size, "test_crop_size")
            stride = as_size(self.test_stride or [(2 * s + 2) // 3 for s in crop], "test_stride")
            if stride[0] > crop[0] or stride[1] > crop[1]:
                raise SFAError(f"--test_stride: {stride} leaves gaps between windows of {crop}")
            self.test_stride = stride


def load_data(args: Arguments) -> Data:
    """Return rendered scenes, or the user's data cropped and augmented."""
    pairs = load_pairs("segmentation", args)
    plain = EvalTransform(
        tuple(args.eval_size), label_size=args.score_size and tuple(args.score_size)
    )
    # Rendered scenes are all different: nothing to augment.
    augment = (
        EvalTransform()
        if args.dataset_name is None
        else TrainTransform(tuple(args.image_size), scale=tuple(args.train_scale))
    )
    return Data(
        TransformedSplit(pairs.train, augment, seed=args.seed),
        TransformedSplit(pairs.evaluation, plain),
        pairs.class_names,
    )


def make_model(args: Arguments, data: Data) -> PreTrainedModel:
    """Return the head on the pretrained backbone, the same for every method."""
    return build_model(args, len(data.class_names))


def build_model(args: Arguments, num_labels: int) -> PreTrainedModel:
    """Return a model for a number of classes."""
    backbone = load_backbone(args)
    set_seed(args.seed)
    if args.head == "mask2former":
        return build_mask2former(Mask2FormerForSemanticSegmentation, args, backbone, num_labels)
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=args.hidden_size,
        num_labels=num_labels,
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone
    if args.norm_outputs:
        model.decode_head = NormedFeatures(model.decode_head, backbone.channels)
    return model


def augmented_maps(args: Arguments) -> Maps | None:
    """Return the evaluation that the options ask for beside the plain one, if any."""
    if args.test_scales is None and args.test_crop_size is None:
        return None
    windows = args.test_crop_size and tuple(args.test_crop_size)
    return lambda model, pixel_values, size: multi_scale_probabilities(
        model,
        pixel_values,
        size=size,
        scales=args.test_scales or (1.0,),
        flip=args.test_scales is not None,
        crop_size=windows,
        stride=args.test_stride and tuple(args.test_stride),
        size_divisor=SIZE_DIVISORS[args.head],
    )


def rates(args: Arguments) -> Rates:
    """Return those found on the validation scenes; other data wants its own (see the options)."""
    head = {"upernet": 6e-3, "mask2former": 1e-3}[args.head]
    return pick_rates(args, adapters=6e-3, full=2e-3, head=head)


def scoring(args: Arguments, data: Data) -> MapScoring:
    """Return the mean IoU of class maps, and their pictures."""
    maps, names = augmented_maps(args), data.class_names
    try_maps(maps, data.evaluation, output="logits")
    return MapScoring(
        headers={"mIoU": "mean_iou", "pixel acc.": "pixel_accuracy"},
        sheet=partial(contact_sheet, class_names=names),
        metric=SegmentationMetrics(len(names), class_names=names),
        at_labels=argmax_logits,
        one_size=args.one_size,
        size_divisor=SIZE_DIVISORS[args.head],
        maps=maps,
    )


def preprocessing(args: Arguments) -> Preprocessing:
    """Return what `load_data` does with images to evaluate on."""
    return Preprocessing("cover", tuple(args.eval_size), size_divisor=SIZE_DIVISORS[args.head])


TASK = Task(
    "semantic_segmentation", Arguments, load_data, make_model, rates, scoring, preprocessing
)


def main(argv: list[str] | None = None) -> Result:
    return run_task(TASK, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
