# SPDX-License-Identifier: Apache-2.0
"""At what size class maps and depth are scored: that of the data, unless another is asked for."""

from dataclasses import dataclass, field
from typing import Any

from common.arguments import SharedArguments, as_size
from common.augmented import Maps
from sfa_peft.dense import predict_maps


@dataclass
class MapArguments(SharedArguments):
    """Options of the tasks that predict maps."""

    score_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width to which predictions and labels are brought for the scores; "
            "if not given, the data's own, as published scores are. results.json says which."
        },
    )

    def check(self) -> None:
        """Put the size into one form."""
        super().check()
        if self.score_size is not None:
            self.score_size = as_size(self.score_size, "score_size")

    @property
    def one_size(self) -> bool:
        """Whether images and labels all have one size: those of rendered scenes."""
        return self.dataset_name is None and self.score_size is None

    def facts(self) -> dict[str, Any]:
        """Return at what size the scores of this run are counted."""
        return {"scored_at": self.score_size or "the data's own size"}


def plain_maps(args: MapArguments, *, size_divisor: int = 1) -> Maps | None:
    """Return the plain evaluation where labels may have another size than the images.

    Args:
        args: The run's arguments.
        size_divisor: Images are padded to multiples of it.

    Returns:
        What `AugmentedTrainer.maps` takes; None for rendered scenes, which Trainer's own way does.
    """
    if args.one_size:
        return None
    return lambda model, pixel_values, size: (
        predict_maps(model, pixel_values, size_divisor=size_divisor).values
    )
