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
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from common.arguments import as_size, parse
from common.augmented import Maps, try_maps
from common.backbones import load_backbone
from common.data import Data, load_pairs
from common.finish import save_and_report
from common.items import picture
from common.maps import MapArguments, plain_maps
from common.mask2former import Mask2FormerForSemanticSegmentation, mask2former_config
from common.methods import prepare_method
from common.reporting import Result, shown_indices
from common.training import make_trainer, pick_rates, run_script
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation, set_seed

from sfa_peft.dense.data.splits import TransformedSplit
from sfa_peft.dense.data.transforms import EvalTransform, TrainTransform
from sfa_peft.dense.inference import predict_maps
from sfa_peft.dense.inference_augmented import multi_scale_probabilities
from sfa_peft.dense.metrics.segmentation import SegmentationMetrics, argmax_logits
from sfa_peft.dense.pictures.sheets import contact_sheet
from sfa_peft.errors import SFAError

# Found on the validation scenes; a run on other data wants its own (see --learning_rate).
LEARNING_RATES = {
    "frozen": 0.0,
    "sfa": 6e-3,
    "internal": 6e-3,
    "external": 6e-3,
    "lora": 6e-3,
    "adaptformer": 6e-3,
    "full": 2e-3,
}
HEAD_LEARNING_RATES = {"upernet": 6e-3, "mask2former": 1e-3}
SIZE_DIVISORS = {"upernet": 1, "mask2former": 32}  # of test images, as in mmseg and Mask2Former
HEADERS = {"mIoU": "mean_iou", "pixel acc.": "pixel_accuracy"}


@dataclass
class Arguments(MapArguments):
    """Options of semantic segmentation."""

    output_dir: str = field(
        default="out/semantic_segmentation",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    head: Literal["upernet", "mask2former"] = field(
        default="upernet", metadata={"help": "Task head on the backbone."}
    )
    hidden_size: int = field(
        default=64, metadata={"help": "Channels of the head; Mask2Former's are 256 in its paper."}
    )
    encoder_layers: int = field(
        default=2, metadata={"help": "Blocks of Mask2Former's pixel decoder; 6 in its paper."}
    )
    decoder_layers: int = field(
        default=4,
        metadata={"help": "Mask2Former's predictions, the first from bare queries; paper 10."},
    )
    num_queries: int = field(
        default=20, metadata={"help": "Masks that Mask2Former predicts; 100 in its paper."}
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
        if self.head == "mask2former" and self.hidden_size % 32:
            raise SFAError(f"--hidden_size: Mask2Former takes multiples of 32: {self.hidden_size}")
        if len(self.train_scale) != 2:
            raise SFAError(f"--train_scale: expected two numbers, got {self.train_scale}")
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
        config = mask2former_config(
            backbone.config,
            image_size=args.image_size,
            hidden_size=args.hidden_size,
            encoder_layers=args.encoder_layers,
            decoder_layers=args.decoder_layers,
            num_queries=args.num_queries,
            num_labels=num_labels,
        )
        model = Mask2FormerForSemanticSegmentation(config)
        model.model.pixel_level_module.encoder = backbone
        return model
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=args.hidden_size,
        num_labels=num_labels,
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone
    return model


def predict(model, items, *, size_divisor: int = 1) -> list[np.ndarray]:
    """Return the predicted class map of each item, at the size of its labels."""
    model.eval()
    maps = []
    for item in items:
        pixels = item["pixel_values"][None].to(model.device)
        scores = predict_maps(model, pixels, size_divisor=size_divisor)
        maps.append(argmax_logits(scores.values, item["labels"][None])[0].cpu().numpy())
    return maps


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


def draw(columns, path: Path, class_names: list[str]) -> None:
    """Write columns of images and class maps as a contact sheet."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    contact_sheet(rows, list(columns), path, class_names=class_names)


def main(argv: list[str] | None = None) -> Result:
    args = parse(Arguments, argv, __doc__.splitlines()[0])

    # 1. Data
    data = load_data(args)

    # 2. Model
    model = make_model(args, data)
    maps = augmented_maps(args)
    try_maps(maps, data.evaluation, output="logits")

    # 3. Adapter
    ready = prepare_method(model, args)

    # 4. Train
    rates = pick_rates(args, LEARNING_RATES, HEAD_LEARNING_RATES[args.head])
    trainer = make_trainer(
        ready,
        args,
        rates=rates,
        train_data=data.train,
        eval_data=data.evaluation,
        compute_metrics=SegmentationMetrics(len(data.class_names), class_names=data.class_names),
        preprocess=argmax_logits,
        maps=plain_maps(args, size_divisor=SIZE_DIVISORS[args.head]),
    )
    trainer.train(resume_from_checkpoint=ready.checkpoint)

    # 5. Evaluate
    scores, headers = trainer.evaluate(), HEADERS
    if maps is not None:
        scores |= trainer.evaluate_augmented(maps)
        headers = HEADERS | {"mIoU augm.": "augmented_mean_iou"}
    items = [data.evaluation[i] for i in shown_indices(len(data.evaluation))]
    columns = {
        "input": [picture(item["pixel_values"]) for item in items],
        "truth": [item["labels"].numpy() for item in items],
        "prediction": predict(ready.model, items, size_divisor=SIZE_DIVISORS[args.head]),
    }

    # 6. Save, and load it again to see that nothing is lost
    return save_and_report(
        ready,
        args,
        trainer,
        rates=rates,
        scores=scores,
        headers=headers,
        columns=columns,
        draw=partial(draw, class_names=data.class_names),
        fresh=make_model(args, data),
        pixels=items[0]["pixel_values"][None],
    )


if __name__ == "__main__":
    run_script(main)
