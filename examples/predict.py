# SPDX-License-Identifier: Apache-2.0
"""Predict with a trained task: pictures in, results at their own size out.

Works for the folder of every script here, whatever its task, method and head::

    python examples/predict.py out/semantic_segmentation photo.jpg other.png -o out/predictions

writes `photo_overlay.png` to look at, and for programs `photo.png` (class ids, or depth in 16 bits)
or `predictions.json` (objects, in COCO's form). The same as `sfa-peft predict`.
"""

import os
from argparse import ArgumentParser

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from common.training import run_script

import sfa_peft
from sfa_peft.dense import write_predictions

parser = ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", help="What a script wrote to --output_dir, or its name on the Hub.")
parser.add_argument("images", nargs="+", help="Picture files.")
parser.add_argument("-o", "--output_dir", default="out/predictions", help="Folder for results.")
parser.add_argument("--backbone", help="Pretrained backbone, if it is elsewhere now.")
parser.add_argument("--device", default="cpu", help="Where to compute, such as cuda.")
parser.add_argument("--batch_size", type=int, default=8, help="Pictures in a batch.")
parser.add_argument("--threshold", type=float, default=0.5, help="Lowest score of an object.")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model = sfa_peft.load_task(args.folder, backbone=args.backbone, device=args.device)
    write_predictions(
        model,
        args.images,
        args.output_dir,
        batch_size=args.batch_size,
        threshold=args.threshold,
        tell=print,
    )
    print(f"{len(args.images)} pictures of {model.task_spec.task}: results in {args.output_dir}/")


if __name__ == "__main__":
    run_script(main)
