# SPDX-License-Identifier: Apache-2.0
"""Scores and pictures of models that put out one map an image: class maps and depth.

They are scored at the data's own size, unless another is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from common.arguments import SharedArguments, as_size
from common.augmented import AugmentedTrainer, Maps
from common.data import Data
from common.items import picture
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


@dataclass
class MapScoring:
    """Scores that Trainer counts, with several runs an image where asked for, and pictures.

    Attributes:
        headers: Columns of the table: header to key of the scores.
        sheet: Writes rows of images and maps below their titles.
        metric: Counts batches, as Trainer's `batch_eval_metrics` wants it.
        at_labels: Makes maps of a model's output, comparable with the labels that it is given too.
        one_size: Images and labels all have one size, so that Trainer's own evaluation will do.
        size_divisor: Images are padded to multiples of it.
        maps: The augmented evaluation, if any.
        loss: For models without a loss of their own.
    """

    headers: dict[str, str]
    sheet: Callable[[list[list[Any]], list[str], Path], Any]
    metric: Callable[..., dict[str, float]]
    at_labels: Callable[[Any, Tensor], Tensor]
    one_size: bool
    size_divisor: int = 1
    maps: Maps | None = None
    loss: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.maps is not None:
            header, key = next(iter(self.headers.items()))
            self.headers = {**self.headers, f"{header.split()[0]} augm.": f"augmented_{key}"}

    def trainer_options(self, data: Data) -> dict[str, Any]:
        """Return what `make_trainer` is told of the task."""
        return {
            "eval_data": data.evaluation,
            "compute_metrics": self.metric,
            "preprocess": self.at_labels,
            "compute_loss": self.loss,
            "maps": None if self.one_size else self.plain,
        }

    def plain(self, model: Any, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the maps of one run over images of any size, as `AugmentedTrainer.maps` does."""
        return predict_maps(model, pixel_values, size_divisor=self.size_divisor).values

    def evaluate(
        self, trainer: AugmentedTrainer, data: Dataset[dict[str, Any]]
    ) -> dict[str, float]:
        """Return the scores of a trained model; those of the augmented evaluation come last."""
        scores = trainer.evaluate(data)
        return scores if self.maps is None else scores | trainer.evaluate_augmented(self.maps)

    def columns(self, model: Any, items: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return images, true and predicted maps of some items, these at the size of the labels."""
        return {
            "input": [picture(item["pixel_values"]) for item in items],
            "truth": [item["labels"].numpy() for item in items],
            "prediction": [self._predict(model.eval(), item) for item in items],
        }

    def _predict(self, model: Any, item: dict[str, Any]) -> Any:
        pixels, labels = item["pixel_values"][None].to(model.device), item["labels"][None]
        maps = self.plain(model, pixels, tuple(labels.shape[-2:]))
        return self.at_labels(maps, labels)[0].cpu().numpy()
