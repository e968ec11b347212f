# SPDX-License-Identifier: Apache-2.0
"""Scores and pictures of models that put out one map an image: class maps and depth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.augmented import AugmentedTrainer, Maps
from common.data import Data
from common.items import picture


@dataclass
class MapScoring:
    """Scores that Trainer counts, with several runs an image where asked for, and pictures.

    Attributes:
        headers: Columns of the table: header to key of the scores.
        sheet: Writes rows of images and maps below their titles.
        metric: Counts batches, as Trainer's `batch_eval_metrics` wants it.
        output: The model's output that is scored: `logits` or `predicted_depth`.
        at_labels: Makes maps of that output, comparable with the labels that it is given too.
        maps: The augmented evaluation, if any.
        loss: For models without a loss of their own.
    """

    headers: dict[str, str]
    sheet: Callable[[list[list[Any]], list[str], Path], Any]
    metric: Callable[..., dict[str, float]]
    output: str
    at_labels: Callable[[Any, Tensor], Tensor]
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
        }

    def evaluate(
        self, trainer: AugmentedTrainer, data: Dataset[dict[str, Any]]
    ) -> dict[str, float]:
        """Return the scores of a trained model; those of the augmented evaluation come last."""
        scores = trainer.evaluate(data)
        return scores if self.maps is None else scores | trainer.evaluate_augmented(self.maps)

    def columns(self, model: Any, items: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return images, true and predicted maps of some items."""
        return {
            "input": [picture(item["pixel_values"]) for item in items],
            "truth": [item["labels"].numpy() for item in items],
            "prediction": [self._predict(model.eval(), item) for item in items],
        }

    def _predict(self, model: Any, item: dict[str, Any]) -> Any:
        with torch.no_grad():
            outputs = model(pixel_values=item["pixel_values"][None].to(model.device))
        predicted = self.at_labels(outputs[self.output], item["labels"][None])
        return predicted[0].cpu().numpy()
