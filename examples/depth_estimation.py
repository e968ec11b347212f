# SPDX-License-Identifier: Apache-2.0
"""Depth estimation: a SwinV2 with the paper's depth head or DPT, adapted within a budget.

Runs with no argument: rendered scenes and a small SwinV2 that ships with the examples, about a
minute on two cores, to a depth error (RMSE) of about 3.2 m in scenes of up to 40 m::

    python examples/depth_estimation.py

Your own data (a Hub name or a folder with image and depth columns) and backbone::

    python examples/depth_estimation.py --dataset_name path/to/data --max_depth 10 \
        --depth_scale 1000 --backbone microsoft/swinv2-base-patch4-window12-192-22k \
        --image_size 480 480 --window_size 30 --max_steps 25000 --learning_rate 1e-4

What the paper trained: `--recipe examples/recipes/nyuv2_depth.yaml`. Several methods
side by side: `compare_methods.py`.
"""

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from common.augmented import Maps, try_maps
from common.backbones import STAGES, load_backbone
from common.data import Data, load_pairs
from common.maps import MapArguments, MapScoring
from common.reporting import Result
from common.task import Task, run_task
from common.training import Rates, pick_rates, run_script
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation, PreTrainedModel, set_seed

from sfa_peft import SFAError
from sfa_peft.dense import (
    MAX_DEPTH,
    DeconvDepthConfig,
    DeconvForDepthEstimation,
    DepthEvalTransform,
    DepthMetrics,
    DepthTrainTransform,
    NormedFeatures,
    Preprocessing,
    SILogLoss,
    TransformedSplit,
    depth_at_labels,
    depth_sheet,
    kitti_benchmark_crop,
    predict_depth,
)

# NYUv2's frame stays, as in MIM-Depth: without it images are lower than its crops of 480.
CROPS = {"none": None, "nyu": None, "kitti": kitti_benchmark_crop}
PROTOCOLS = {"nyu": DepthMetrics.nyu, "kitti": DepthMetrics.kitti}


@dataclass
class Arguments(MapArguments):
    """Options of depth estimation."""

    output_dir: str = field(
        default="out/depth_estimation",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    head: Literal["deconv", "dpt"] = field(
        default="deconv",
        metadata={"help": "Three transposed convolutions on the last stage (the paper's), or DPT."},
    )
    hidden_size: int = field(default=64, metadata={"help": "Channels of DPT's fusion layers."})
    max_depth: float = field(
        default=MAX_DEPTH,
        metadata={"help": "Farthest depth in metres: 10 for NYUv2, 80 for KITTI."},
    )
    protocol: Literal["none", "nyu", "kitti"] = field(
        default="none",
        metadata={"help": "Crops of a benchmark in training and evaluation; none: whole images."},
    )
    cut_depth: float = field(
        default=0.0, metadata={"help": "Share of training images with vertical CutDepth."}
    )
    depth_scale: float = field(
        default=1000.0,
        metadata={"help": "Of integer depth in an imagefolder: stored units per metre."},
    )
    test_flip: bool = field(
        default=False,
        metadata={"help": "At the end, evaluate once more, averaged with the mirror image."},
    )
    test_shifts: int | None = field(
        default=None,
        metadata={
            "help": "At the end, evaluate once more over so many square windows along the width; "
            "MIM-Depth takes 2 on NYUv2 and 16 on KITTI."
        },
    )

    def check(self) -> None:
        """Refuse what cannot work whatever the data."""
        own_size = self.dataset_name is not None and self.eval_size is None
        super().check()
        if own_size:  # the scale that training has, see `train_scale`
            self.eval_size = None
        if self.head == "deconv" and self.per_device_train_batch_size < 2:
            raise SFAError(
                "--per_device_train_batch_size: the head's batch norm needs 2 or more images"
            )
        if self.max_depth <= 0:
            raise SFAError(f"--max_depth: expected metres above 0, got {self.max_depth}")
        if self.test_shifts is not None and self.test_shifts < 2:
            raise SFAError(f"--test_shifts: expected 2 or more, got {self.test_shifts}")


def load_data(args: Arguments) -> Data:
    """Return rendered scenes, or the user's data cropped and augmented."""
    pairs = load_pairs("depth", args, depth_scale=args.depth_scale)
    crop = CROPS[args.protocol]
    scenes = args.dataset_name is None  # are all different: nothing to augment but left and right
    augment = DepthTrainTransform(
        tuple(args.image_size),
        max_depth=args.max_depth,
        scale=(1.0, 1.0) if scenes else tuple(args.train_scale),
        fit=False,
        jitter=0.0 if scenes else 0.1,
        cut_depth=0.0 if scenes else args.cut_depth,
        crop=crop,
    )
    plain = DepthEvalTransform(
        args.eval_size and tuple(args.eval_size),
        label_size=args.score_size and tuple(args.score_size),
        crop=crop,
    )
    return Data(
        TransformedSplit(pairs.train, augment, seed=args.seed),
        TransformedSplit(pairs.evaluation, plain),
        [],
    )


def make_model(args: Arguments, data: Data) -> PreTrainedModel:
    """Return the head on the pretrained backbone, the same for every method."""
    backbone = load_backbone(args, STAGES if args.head == "dpt" else STAGES[-1:])
    set_seed(args.seed)
    if args.head == "dpt":
        config = DPTConfig(
            backbone_config=backbone.config,
            neck_hidden_sizes=list(backbone.channels),
            fusion_hidden_size=args.hidden_size,
            reassemble_factors=[1] * len(STAGES),
        )
        model = DPTForDepthEstimation(config)
        # The head ends in a ReLU: where it starts at 0 it has no gradient.
        nn.init.constant_(model.head.head[-2].bias, args.max_depth / 4)
        if args.norm_outputs:
            model.neck = NormedFeatures(model.neck, backbone.channels)
    else:
        config = DeconvDepthConfig(
            backbone.config, max_depth=args.max_depth, norm_features=args.norm_outputs
        )
        model = DeconvForDepthEstimation(config)
    model.backbone = backbone
    return model


def augmented_maps(args: Arguments) -> Maps | None:
    """Return the evaluation that the options ask for beside the plain one, if any."""
    if not args.test_flip and args.test_shifts is None:
        return None
    return lambda model, pixel_values, size: predict_depth(
        model, pixel_values, flip=args.test_flip, num_shifts=args.test_shifts
    )


def rates(args: Arguments) -> Rates:
    """Return those of the rendered scenes, where only the head's was searched."""
    head = {"deconv": 6e-3, "dpt": 1e-3}[args.head]
    return pick_rates(args, adapters=3e-3, full=2e-3, head=head)


def scoring(args: Arguments, data: Data) -> MapScoring:
    """Return the errors of depth maps, and their pictures."""
    maps = augmented_maps(args)
    try_maps(maps, data.evaluation, output="predicted_depth")
    return MapScoring(
        headers={"RMSE (m)": "rmse", "abs. rel.": "abs_rel", "d1": "d1"},
        sheet=depth_sheet,
        metric=PROTOCOLS.get(args.protocol, partial(DepthMetrics, args.max_depth))(),
        at_labels=depth_at_labels,
        one_size=args.one_size,
        maps=maps,
        loss=SILogLoss() if args.head == "dpt" else None,
    )


def preprocessing(args: Arguments) -> Preprocessing:
    """Return what `load_data` does with images to evaluate on."""
    size = args.eval_size and tuple(args.eval_size)
    crop = args.protocol if CROPS[args.protocol] else None
    return Preprocessing("cover" if size else "keep", size, crop=crop)


TASK = Task("depth_estimation", Arguments, load_data, make_model, rates, scoring, preprocessing)


def main(argv: list[str] | None = None) -> Result:
    return run_task(TASK, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
