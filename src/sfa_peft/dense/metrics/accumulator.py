# SPDX-License-Identifier: Apache-2.0
"""What every metric here has in common: it adds up batches and can be Trainer's compute_metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Prediction(Protocol):
    """What ``transformers.EvalPrediction`` has and the metrics need."""

    predictions: Any
    label_ids: Any


class BatchMetric(ABC):
    """Add up one batch after another; give it to Trainer as ``compute_metrics``.

    Set ``batch_eval_metrics=True`` in the training arguments: then no prediction of an earlier
    batch is kept.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything counted so far."""

    @abstractmethod
    def update(self, predicted: Any, labels: Any) -> None:
        """Count one batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the scores of everything counted since the last reset."""

    def __call__(self, prediction: Prediction, compute_result: bool = True) -> dict[str, float]:
        """Count one batch and, after the last, return the scores and start over.

        Args:
            prediction: ``predictions`` and ``label_ids`` as in :meth:`update`.
            compute_result: Whether this is the last batch.

        Returns:
            The scores as in :meth:`compute`, or an empty dict before the last batch.

        Raises:
            SFAError: As :meth:`update`.
        """
        self.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        scores = self.compute()
        self.reset()
        return scores


def as_array(values: Any) -> NDArray[Any]:
    """Return a tensor of any device, or anything array-like, as a numpy array.

    Args:
        values: Tensor, array or nested lists. bfloat16, which numpy lacks, becomes float32.

    Returns:
        The values, same shape and, but for bfloat16, same dtype; without a copy where possible.
    """
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
