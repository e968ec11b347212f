# SPDX-License-Identifier: Apache-2.0
"""Evaluation with test-time augmentation, beside the plain one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer

Maps = Callable[[Any, torch.Tensor, tuple[int, int]], torch.Tensor]
PREFIX = "augmented"


@torch.no_grad()
def try_maps(maps: Maps | None, model: Any, data: Dataset[dict[str, Any]]) -> None:
    """Run an augmented evaluation on one image, so that what cannot work shows before training.

    Raises:
        SFAError: If images of this size cannot be augmented so.
    """
    if maps is not None:
        item = data[0]
        maps(model.eval(), item["pixel_values"][None], tuple(item["labels"].shape[-2:]))


class AugmentedTrainer(Trainer):
    """A Trainer that can evaluate with several runs over each image, on all its processes."""

    _maps: Maps | None = None

    def evaluate_augmented(self, maps: Maps) -> dict[str, float]:
        """Evaluate once more; return the scores with names that begin with ``augmented_``.

        Args:
            maps: Called with the model, images `(B, 3, H, W)` and the height and width of the
                labels; returns what the metric takes in place of the model's maps: class
                probabilities `(B, C, h, w)` or depth `(B, h, w)`.
        """
        self._maps = maps
        try:
            return self.evaluate(metric_key_prefix=PREFIX)
        finally:
            self._maps = None

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return loss, maps and labels of a batch; of an augmented evaluation no loss."""
        if self._maps is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self._prepare_inputs(inputs)
        labels = batch["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            maps = self._maps(model, batch["pixel_values"], tuple(labels.shape[-2:]))
        return None, maps, labels
