# SPDX-License-Identifier: Apache-2.0
"""Instance segmentation: a SwinV2 with a Mask2Former head, adapted within a budget.

Runs with no argument: rendered scenes and a small SwinV2 that ships with the examples, four minutes
of one core, to a mask AP of about 0.25 (AP50 0.57)::

    python examples/instance_segmentation.py

Your own data in COCO's layout (or a Hub name, or an imagefolder with an objects column)::

    python examples/instance_segmentation.py --dataset_name path/to/coco --dataset_format coco \
        --backbone microsoft/swinv2-base-patch4-window12-192-22k --image_size 1024 1024 \
        --hidden_size 256 --num_queries 100 --max_steps 90000 --learning_rate 1e-4

What the paper trained, as far as transformers has it:
`--recipe examples/recipes/coco_instances.yaml`. Several methods side by side:
`compare_methods.py`. Scores need faster-coco-eval: `pip install '.[examples,detection]'`.
"""

import os
from dataclasses import dataclass, field
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from common.arguments import SharedArguments, parse
from common.backbones import load_backbone
from common.data import Data, load_pairs
from common.finish import save_and_report
from common.mask2former import mask2former_config
from common.methods import prepare_method
from common.objects import columns_of, draw, evaluate
from common.reporting import Result, shown_indices
from common.training import make_trainer, pick_rates, run_script
from transformers import (
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    set_seed,
)

from sfa_peft.dense import instances_from_queries
from sfa_peft.dense.data.collate import collate_instances
from sfa_peft.dense.data.object_transforms import ObjectResize, ObjectScaleCrop
from sfa_peft.dense.data.splits import TransformedSplit
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.errors import SFAError

# The head's rate was the better of 1e-3 and 2e-3 on 100 validation scenes, SFA, 320 steps; the
# others were not searched.
LEARNING_RATES = {
    "frozen": 0.0,
    "sfa": 3e-3,
    "internal": 3e-3,
    "external": 3e-3,
    "lora": 3e-3,
    "adaptformer": 3e-3,
    "full": 1e-3,
}
HEAD_LEARNING_RATE = 2e-3
HEADERS = {"mask AP": "segm_map", "AP50": "segm_map_50", "AP75": "segm_map_75"}


@dataclass
class Arguments(SharedArguments):
    """Options of instance segmentation."""

    output_dir: str = field(
        default="out/instance_segmentation",
        metadata={"help": "Folder for results.json, pictures, checkpoints and the adapter."},
    )
    max_steps: int = field(default=1000, metadata={"help": "Update steps, 2 or more."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Images per step and device."}
    )
    hidden_size: int = field(
        default=64, metadata={"help": "Channels of the head; 256 in Mask2Former's paper."}
    )
    encoder_layers: int = field(
        default=2, metadata={"help": "Blocks of the pixel decoder; 6 in Mask2Former's paper."}
    )
    decoder_layers: int = field(
        default=3,
        metadata={"help": "Predictions of the decoder, the first from bare queries; paper 10."},
    )
    num_queries: int = field(
        default=12, metadata={"help": "Masks predicted per image; 100 in Mask2Former's paper."}
    )
    train_scale: list[float] = field(
        default_factory=lambda: [0.8, 1.6],
        metadata={"help": "Range of the random scale of your images; 1 just fits the crop."},
    )

    def check(self) -> None:
        """Refuse what cannot work whatever the data."""
        super().check()
        if self.hidden_size % 32:
            raise SFAError(f"--hidden_size: Mask2Former takes multiples of 32: {self.hidden_size}")
        if len(self.train_scale) != 2:
            raise SFAError(f"--train_scale: expected two numbers, got {self.train_scale}")


def load_data(args: Arguments) -> Data:
    """Return rendered scenes, or the user's data cropped and augmented."""
    pairs = load_pairs("instances", args)
    plain = ObjectResize(tuple(args.eval_size))
    if args.dataset_name is None:  # scenes are all different
        augment = ObjectScaleCrop(tuple(args.image_size), scale=(1.0, 1.0), jitter=0.0)
    else:
        augment = ObjectScaleCrop(tuple(args.image_size), scale=tuple(args.train_scale))
    return Data(
        TransformedSplit(pairs.train, augment, seed=args.seed),
        TransformedSplit(pairs.evaluation, plain),
        pairs.class_names,
    )


def make_model(args: Arguments, data: Data) -> PreTrainedModel:
    """Return the head on the pretrained backbone, the same for every method."""
    backbone = load_backbone(args)
    set_seed(args.seed)
    config = mask2former_config(
        backbone.config,
        image_size=args.image_size,
        hidden_size=args.hidden_size,
        encoder_layers=args.encoder_layers,
        decoder_layers=args.decoder_layers,
        num_queries=args.num_queries,
        num_labels=len(data.class_names),
    )
    config.init_std = args.hidden_size**-0.5  # as Xavier's; by default 0.02 whatever the width
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder = backbone
    return model


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


def main(argv: list[str] | None = None) -> Result:
    args = parse(Arguments, argv, __doc__.splitlines()[0])

    # 1. Data
    data = load_data(args)
    metric = CocoMetrics(data.class_names, iou_types=["segm"])

    # 2. Model
    model = make_model(args, data)

    # 3. Adapter
    ready = prepare_method(model, args)

    # 4. Train
    rates = pick_rates(args, LEARNING_RATES, HEAD_LEARNING_RATE)
    collate = collate_instances
    trainer = make_trainer(
        ready,
        args,
        rates=rates,
        train_data=data.train,
        collator=collate,
        label_names=("mask_labels", "class_labels"),
    )
    trainer.train(resume_from_checkpoint=ready.checkpoint)

    # 5. Evaluate
    workers = args.dataloader_num_workers
    scores = evaluate(ready.model, data.evaluation, metric, collate, predict, workers)
    items = [data.evaluation[i] for i in shown_indices(len(data.evaluation))]
    columns = columns_of(ready.model, items, collate, predict)

    # 6. Save, and load it again to see that nothing is lost
    return save_and_report(
        ready,
        args,
        trainer,
        rates=rates,
        scores=scores,
        headers=HEADERS,
        columns=columns,
        draw=partial(draw, class_names=data.class_names),
        fresh=make_model(args, data),
        pixels=items[0]["pixel_values"][None],
    )


if __name__ == "__main__":
    run_script(main)
