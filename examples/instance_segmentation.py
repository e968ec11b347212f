# SPDX-License-Identifier: Apache-2.0
"""Instance segmentation: a SwinV2 with a Mask2Former or Mask R-CNN head, within a budget.

Runs with no argument: rendered scenes and a small SwinV2 that ships with the examples, four minutes
of one core, to a mask AP of about 0.27 (AP50 0.59)::

    python examples/instance_segmentation.py

Your own data, in COCO's layout or another (docs/dense-data.md)::

    python examples/instance_segmentation.py --dataset_name path/to/coco \
        --backbone microsoft/swinv2-base-patch4-window12-192-22k --image_size 1024 1024 \
        --hidden_size 256 --num_queries 100 --max_steps 90000 --learning_rate 1e-4

What the paper trained: `--recipe examples/recipes/coco_mask_rcnn.yaml`, or without torchvision
`coco_instances.yaml`. Several methods side by side: `compare_methods.py`. Scores need
faster-coco-eval, `--head mask_rcnn` torchvision: `pip install '.[examples,detection,torchvision]'`.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from common.backbones import load_backbone
from common.data import Data
from common.mask2former import (
    DECODER_HELP,
    QUERIES_HELP,
    Mask2FormerOptions,
    build_mask2former,
    check_width,
)
from common.objects import ObjectArguments, ObjectScoring, load_objects, preprocessing
from common.rcnn import RCNNOptions, check_rcnn, make_rcnn, score_rcnn
from common.reporting import Result
from common.task import Task, run_task
from common.training import Rates, pick_rates, run_script
from transformers import (
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    set_seed,
)

from sfa_peft.dense import collate_instances, instances_from_queries


@dataclass
class Arguments(RCNNOptions, Mask2FormerOptions, ObjectArguments):
    """Options of instance segmentation."""

    head: Literal["mask2former", "mask_rcnn"] = field(
        default="mask2former",
        metadata={"help": "Task head: Mask2Former, or Mask R-CNN with the paper's necks."},
    )
    output_dir: str = field(
        default="out/instance_segmentation",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    max_steps: int = field(default=1000, metadata={"help": "Update steps, 2 or more."})
    decoder_layers: int = field(default=3, metadata={"help": DECODER_HELP})
    num_queries: int = field(default=12, metadata={"help": QUERIES_HELP})

    def check(self) -> None:
        """Refuse what cannot work whatever the data."""
        super().check()
        check_rcnn(self, is_used=self.head == "mask_rcnn")
        if self.head == "mask2former":
            check_width(self)


def load_data(args: Arguments) -> Data:
    """Return rendered scenes, or the user's data cropped and augmented."""
    return load_objects("instances", args)


def make_model(args: Arguments, data: Data) -> PreTrainedModel:
    """Return the head on the pretrained backbone, the same for every method."""
    if args.head == "mask_rcnn":
        return make_rcnn(args, len(data.class_names), masks=True)
    backbone = load_backbone(args)
    set_seed(args.seed)
    kind = Mask2FormerForUniversalSegmentation
    return build_mask2former(kind, args, backbone, len(data.class_names))


def predict(model, batch, sizes) -> list[dict]:
    """Return scores, classes and masks in each image of a batch, at those sizes."""
    with torch.no_grad():
        outputs = model(pixel_values=batch["pixel_values"].to(model.device))
    return instances_from_queries(
        outputs.class_queries_logits,
        outputs.masks_queries_logits,
        sizes,
        pixel_mask=batch["pixel_mask"],
        encode=True,
    )


def rates(args: Arguments) -> Rates:
    """Return those of the rendered scenes.

    The head's was the better of 1e-3 and 2e-3 on 100 validation scenes, SFA, 320 steps; the others
    were not searched.
    """
    return pick_rates(args, adapters=3e-3, full=1e-3, head=2e-3)


def scoring(args: Arguments, data: Data) -> ObjectScoring:
    """Return the average precision of masks, and their pictures."""
    if args.head == "mask_rcnn":
        workers = args.dataloader_num_workers
        return score_rcnn(data.class_names, masks=True, num_workers=workers)
    return ObjectScoring(
        headers={"mask AP": "segm_map", "AP50": "segm_map_50", "AP75": "segm_map_75"},
        class_names=data.class_names,
        collate=collate_instances,
        predict=predict,
        iou_types=("segm",),
        label_names=("mask_labels", "class_labels"),
        num_workers=args.dataloader_num_workers,
    )


TASK = Task(
    "instance_segmentation", Arguments, load_data, make_model, rates, scoring, preprocessing
)


def main(argv: list[str] | None = None) -> Result:
    return run_task(TASK, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
