# SPDX-License-Identifier: Apache-2.0
"""Object detection: a SwinV2 with an RT-DETR or Faster R-CNN head, adapted within a budget.

Runs with no argument: rendered scenes and a small SwinV2 that ships with the examples, four minutes
of one core, to a box AP of about 0.26 (AP50 0.51; measured with `--select_until 1`)::

    python examples/object_detection.py

Your own data, in COCO's layout or another (docs/dense-data.md)::

    python examples/object_detection.py --dataset_name path/to/coco \
        --backbone microsoft/swinv2-base-patch4-window12-192-22k --image_size 640 640 \
        --hidden_size 256 --num_queries 300 --max_steps 90000 --learning_rate 1e-4

What the paper trained has masks too: `instance_segmentation.py --head mask_rcnn`. RT-DETR's recipe
is `--recipe examples/recipes/coco_detection.yaml`. Several methods side by side:
`compare_methods.py`. Scores need faster-coco-eval, `--head faster_rcnn` torchvision:
`pip install '.[examples,detection,torchvision]'`.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from common.backbones import STAGES, load_backbone
from common.data import Data
from common.objects import ObjectArguments, ObjectScoring, load_objects, preprocessing
from common.rcnn import RCNNOptions, check_rcnn, make_rcnn, score_rcnn
from common.reporting import Result
from common.task import Task, run_task
from common.training import Rates, pick_rates, run_script
from torch import nn
from transformers import (
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    set_seed,
)

from sfa_peft import SFAError
from sfa_peft.dense import MapNorm, collate_detection

STRIDES = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}


@dataclass
class Arguments(RCNNOptions, ObjectArguments):
    """Options of object detection."""

    head: Literal["rt_detr", "faster_rcnn"] = field(
        default="rt_detr",
        metadata={"help": "Task head: RT-DETR, or Faster R-CNN with the paper's necks."},
    )
    output_dir: str = field(
        default="out/object_detection",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    stages: list[str] = field(
        default_factory=lambda: ["stage2", "stage3"],
        metadata={
            "help": "Feature maps that RT-DETR takes: stage2 to stage4 (strides 8 to 32) in its "
            "paper; images of 64 pixels have only 2 x 2 cells in the last."
        },
    )
    hidden_size: int = field(
        default=64, metadata={"help": "Channels of the head; 256 in RT-DETR's paper."}
    )
    decoder_layers: int = field(
        default=2, metadata={"help": "Layers of the decoder; 6 in RT-DETR's paper."}
    )
    num_queries: int = field(
        default=20, metadata={"help": "Boxes predicted per image; 300 in RT-DETR's paper."}
    )

    def check(self) -> None:
        """Refuse what cannot work whatever the data."""
        super().check()
        check_rcnn(self, is_used=self.head == "faster_rcnn")
        if self.head == "rt_detr":
            self._check_detr()

    def _check_detr(self) -> None:
        if sorted(set(self.stages)) != self.stages or not set(self.stages) <= set(STAGES):
            raise SFAError(f"--stages: expected some of {list(STAGES)} in order: {self.stages}")
        if any(side % 32 for side in (*self.image_size, *self.eval_size)):
            raise SFAError("--image_size, --eval_size: RT-DETR takes multiples of 32")
        # It begins with the best cells of all feature maps.
        cells = sum(self.image_size[0] * self.image_size[1] // STRIDES[s] ** 2 for s in self.stages)
        if not 1 <= self.num_queries <= cells:
            raise SFAError(f"--num_queries: expected 1 to {cells}, the cells of the feature maps")


def load_data(args: Arguments) -> Data:
    """Return rendered scenes, or the user's data cropped and augmented."""
    return load_objects("detection", args)


def make_model(args: Arguments, data: Data) -> PreTrainedModel:
    """Return the head on the pretrained backbone, the same for every method."""
    if args.head == "faster_rcnn":
        return make_rcnn(args, len(data.class_names), masks=False)
    backbone = load_backbone(args, args.stages)
    set_seed(args.seed)
    levels = len(args.stages)
    config = RTDetrConfig(
        backbone_config=backbone.config,
        encoder_in_channels=list(backbone.channels),
        feat_strides=[STRIDES[stage] for stage in args.stages],
        encoder_hidden_dim=args.hidden_size,
        encode_proj_layers=[levels - 1],
        encoder_ffn_dim=4 * args.hidden_size,
        d_model=args.hidden_size,
        decoder_in_channels=[args.hidden_size] * levels,
        decoder_ffn_dim=4 * args.hidden_size,
        decoder_layers=args.decoder_layers,
        num_feature_levels=levels,
        num_queries=args.num_queries,
        num_denoising=args.num_queries // 3,  # 100 of 300 in the paper
        num_labels=len(data.class_names),
        initializer_range=args.hidden_size**-0.5,  # as Xavier's; 0.01 by default, see start_head
    )
    model = RTDetrForObjectDetection(config)
    start_head(model)
    model.model.backbone.model = backbone
    if args.norm_outputs:
        for level, (projection, channels) in enumerate(
            zip(model.model.encoder_input_proj, backbone.channels, strict=True)
        ):
            model.model.encoder_input_proj[level] = nn.Sequential(MapNorm(channels), *projection)
    return model


def start_head(model: RTDetrForObjectDetection) -> None:
    """Mend the random start that transformers gives RT-DETR's head, in place.

    Its batch norms begin with scales around 0 (standard deviation `initializer_range`), so that
    nearly nothing of an image reaches the decoder; nobody sees it who starts from a trained head.
    RT-DETR's own code begins with 1, and with encoder boxes that are the anchors.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    last = model.model.enc_bbox_head.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def predict(model, batch, sizes) -> list[dict[str, torch.Tensor]]:
    """Return scores, classes and boxes (corners in pixels) in each image, at those sizes."""
    with torch.no_grad():
        outputs = model(pixel_values=batch["pixel_values"].to(model.device))
    found = RTDetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.0, target_sizes=sizes
    )
    return [{name: value.cpu() for name, value in objects.items()} for objects in found]


def rates(args: Arguments) -> Rates:
    """Return those of the rendered scenes: not searched, the head's as in instances."""
    return pick_rates(args, adapters=3e-3, full=1e-3, head=2e-3)


def scoring(args: Arguments, data: Data) -> ObjectScoring:
    """Return the average precision of boxes, and their pictures."""
    if args.head == "faster_rcnn":
        workers = args.dataloader_num_workers
        return score_rcnn(data.class_names, masks=False, num_workers=workers)
    return ObjectScoring(
        headers={"box AP": "bbox_map", "AP50": "bbox_map_50", "AP75": "bbox_map_75"},
        class_names=data.class_names,
        collate=collate_detection,
        predict=predict,
        num_workers=args.dataloader_num_workers,
    )


TASK = Task("object_detection", Arguments, load_data, make_model, rates, scoring, preprocessing)


def main(argv: list[str] | None = None) -> Result:
    return run_task(TASK, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
