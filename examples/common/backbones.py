# SPDX-License-Identifier: Apache-2.0
"""The pretrained backbone that every script puts a head on."""

from collections.abc import Sequence

from transformers import AutoConfig, Swinv2Backbone, Swinv2Config

from common.arguments import SharedArguments
from sfa_peft import SFAError

STAGES = ("stage1", "stage2", "stage3", "stage4")


def load_backbone(args: SharedArguments, stages: Sequence[str] = STAGES) -> Swinv2Backbone:
    """Return a pretrained SwinV2, set up for the size of the training images.

    SwinV2 clamps windows to its configured image size, so it is told the crop that it will see, and
    what the windows were in pretraining, so that its position bias is scaled as in its paper. With
    `image_size` 480 and `window_size` 30 the four stages get windows of 30, 30, 30 and 15.

    Args:
        args: `backbone`, `image_size`, `window_size` and `drop_path_rate` are used.
        stages: Stages whose feature maps the head takes.

    Raises:
        SFAError: If there is no such checkpoint, or it is none of SwinV2.
    """
    try:
        trained = AutoConfig.from_pretrained(args.backbone)
    except (OSError, ValueError) as error:
        raise SFAError(f"--backbone {args.backbone}: {error}") from error
    if not isinstance(trained, Swinv2Config):
        raise SFAError(
            f"--backbone {args.backbone}: a {trained.model_type} checkpoint, but this example "
            "takes SwinV2."
        )
    # 0 is "not known"; a window of 1 has no positions to scale and would divide by 0.
    grids = [trained.image_size // (trained.patch_size * 2**i) for i in range(len(trained.depths))]
    windows = [min(trained.window_size, grid) for grid in grids]
    stated = trained.pretrained_window_sizes
    changes = {"window_size": args.window_size, "drop_path_rate": args.drop_path_rate}
    config = Swinv2Config.from_pretrained(
        args.backbone,
        image_size=min(args.image_size),
        out_features=list(stages),
        pretrained_window_sizes=[
            known or (window if window > 1 else 0)
            for known, window in zip(stated, windows, strict=True)
        ],
        **{name: value for name, value in changes.items() if value is not None},
    )
    return Swinv2Backbone.from_pretrained(args.backbone, config=config)
