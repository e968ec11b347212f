# SPDX-License-Identifier: Apache-2.0
"""The scale-invariant log loss of depth, alone and for models of transformers that have no loss."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sfa_peft.errors import SFAError

MIN_DEPTH = 1e-3  # Metres: below this a prediction has no useful logarithm.


def silog_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    *,
    lambd: float = 0.5,
    min_depth: float = MIN_DEPTH,
) -> torch.Tensor:
    r"""Return the scale-invariant log loss of depth maps (Eigen et al., 2014).

    .. math:: L = \sqrt{\frac{1}{n} \sum_i d_i^2 - \frac{\lambda}{n^2} \Big(\sum_i d_i\Big)^2},
        \qquad d_i = \log \hat y_i - \log y_i

    over all n valid pixels of the batch: those whose true depth is finite and above zero. Without
    any the loss is 0, with zero gradients, so that an empty crop moves nothing.

    Args:
        predicted: Depth in metres, floating point of any shape; smaller values than ``min_depth``
            count as ``min_depth`` and get no gradient.
        target: True depth in metres, the same shape; 0, negative, nan and inf mean "not measured".
        lambd: How much of a common scale error is forgiven, 0 (nothing) to 1 (all of it).
        min_depth: Smallest predicted depth in metres, above 0.

    Returns:
        The loss, a scalar; float32 for half-precision predictions, else of their dtype.

    Raises:
        SFAError: If the shapes differ, or ``lambd`` or ``min_depth`` is out of range.
    """
    if predicted.shape != target.shape:
        raise SFAError(
            f"predicted depth {tuple(predicted.shape)} and target {tuple(target.shape)} differ in "
            "shape; resize_depth brings a prediction to the size of its target"
        )
    _check_options(lambd, min_depth)
    if predicted.dtype in (torch.float16, torch.bfloat16):
        predicted = predicted.float()
    valid = target.isfinite() & (target > 0)
    # Pixels that do not count are replaced before the log: nan times 0 would be nan in backward.
    true = torch.where(valid, target, 1).to(predicted.dtype)
    guess = torch.where(valid, predicted, 1).clamp_min(min_depth)
    difference = guess.log() - true.log()
    count = valid.sum().clamp_min(1)
    mean = difference.sum() / count
    variance = (torch.where(valid, difference - mean, 0) ** 2).sum() / count
    square = variance + (1 - lambd) * mean**2
    # The slope of a root at 0 is infinite. Also, Trainer multiplies losses in place, which the
    # output of sqrt itself would not survive.
    root = torch.where(square > 0, square, 1).sqrt()
    return torch.where(square > 0, root, square)


def resize_depth(predicted: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return depth maps resized by bilinear interpolation.

    Args:
        predicted: Depth, floating point ``(B, h, w)``.
        size: Height and width wanted.

    Returns:
        Depth ``(B, H, W)``; the same tensor if it has that size.

    Raises:
        SFAError: If the depth does not have three dimensions.
    """
    if predicted.ndim != 3:
        raise SFAError(f"depth maps: expected (B, H, W), got {tuple(predicted.shape)}")
    if tuple(predicted.shape[1:]) == tuple(size):
        return predicted
    resized = functional.interpolate(
        predicted[:, None], size=size, mode="bilinear", align_corners=False
    )
    return resized[:, 0]


class SILogLoss:
    """The loss for depth models of transformers that refuse labels (DPT, ZoeDepth, DepthAnything).

    Give it to the Trainer, which then keeps the labels from the model::

        Trainer(model=dpt, compute_loss_func=SILogLoss(), ...)

    In a loop of one's own, ``SILogLoss()(model(pixel_values=...), labels)``. Predictions are
    resized to the labels first: DPT rounds its maps up to multiples of 32. Pixels where the head's
    last ReLU gives exactly 0 count as ``min_depth`` and get no gradient, as behind any dead ReLU.

    Args:
        lambd: See :func:`silog_loss`.
        min_depth: See :func:`silog_loss`.

    Raises:
        SFAError: If an option is out of range.
    """

    def __init__(self, lambd: float = 0.5, min_depth: float = MIN_DEPTH) -> None:
        _check_options(lambd, min_depth)
        self.lambd = lambd
        self.min_depth = min_depth

    def __call__(
        self,
        outputs: Any,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the loss of a model's outputs.

        Args:
            outputs: What the model returned, with ``predicted_depth``, ``(B, h, w)`` in metres.
            labels: True depth in metres, ``(B, H, W)``, see :func:`silog_loss`.
            num_items_in_batch: Trainer's count of pixels in all micro-batches of an update step.
                Trainer sums the losses of those as they are, so that each is weighted here by its
                share of the pixels.

        Returns:
            The loss, a scalar.

        Raises:
            SFAError: If there are no labels or their shape does not fit.
        """
        if labels is None:
            raise SFAError("SILogLoss: no labels; name the depth map `labels` in each batch")
        predicted = resize_depth(outputs["predicted_depth"], (labels.shape[-2], labels.shape[-1]))
        loss = silog_loss(predicted, labels, lambd=self.lambd, min_depth=self.min_depth)
        if num_items_in_batch is None:
            return loss
        # Counted as Trainer counts.
        return loss * (labels.ne(-100).sum() / num_items_in_batch)


def _check_options(lambd: float, min_depth: float) -> None:
    if not 0 <= lambd <= 1:
        raise SFAError(f"lambd: expected 0 to 1, got {lambd}")
    if not min_depth > 0:
        raise SFAError(f"min_depth: expected a depth above 0, got {min_depth}")
