# SPDX-License-Identifier: Apache-2.0
"""Evaluation at the size of the labels, and with test-time augmentation beside the plain one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Dataset
from transformers import Trainer

from sfa_peft.dense import IGNORE_INDEX, DenseMaps

Maps = Callable[[Any, torch.Tensor, tuple[int, int]], torch.Tensor]
PREFIX = "augmented"


def try_maps(maps: Maps | None, data: Dataset[dict[str, Any]], *, output: str) -> None:
    """Augment one image for a model that returns it, so that wrong sizes show before training.

    Args:
        maps: The augmented evaluation, if any.
        data: Its first item is taken.
        output: What the task's models return: `logits` or `predicted_depth`.

    Raises:
        SFAError: If images of this size cannot be augmented so.
    """

    def stand_in(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {output: pixel_values if output == "logits" else pixel_values[:, 0]}

    if maps is not None:
        item = data[0]
        maps(stand_in, item["pixel_values"][None], tuple(item["labels"].shape[-2:]))


class AugmentedTrainer(Trainer):
    """A Trainer whose evaluation can be other than one run at one size, on all its processes.

    Attributes:
        maps: Called with the model, images `(B, 3, h, w)` and the height and width of the labels;
            returns what the metric takes in place of the model's maps: class scores
            `(B, C, H, W)` or depth `(B, H, W)` of any size. None: the model's own, with the loss.
    """

    maps: Maps | None = None

    def evaluate_augmented(self, maps: Maps) -> dict[str, float]:
        """Evaluate once more by `maps`; the names of the scores begin with ``augmented_``."""
        plain, self.maps = self.maps, maps
        try:
            return self.evaluate(metric_key_prefix=PREFIX)
        finally:
            self.maps = plain

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the model that is saved: that of the first process.

        DDP makes buffers equal before a forward, but not after the last one: each process would
        count its images with the running statistics of its own batches.
        """
        if distributed.is_available() and distributed.is_initialized():
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return loss, maps and labels of a batch; with `maps` no loss."""
        if self.maps is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self._prepare_inputs(inputs)
        labels = batch["labels"]
        size = tuple(labels.shape[-2:])
        with torch.no_grad(), self.compute_loss_context_manager():
            maps = self.maps(model, batch["pixel_values"], size)
        maps = DenseMaps(maps if maps.ndim == 4 else maps[:, None], "scores").resized(size).values
        return None, *self._gatherable(maps, labels)

    def _gatherable(self, maps: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Pad to the largest of all processes, right and below; padding is not labelled."""
        unlabelled = 0 if labels.is_floating_point() else IGNORE_INDEX
        pad = self.accelerator.pad_across_processes
        for axis in (-2, -1):
            maps = pad(maps, dim=maps.ndim + axis)
            labels = pad(labels, dim=labels.ndim + axis, pad_index=unlabelled)
        return maps, labels
