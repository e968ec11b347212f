# SPDX-License-Identifier: Apache-2.0
"""What is kept of one adapter in one weight to write and withdraw its change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spans import Spans


@dataclass
class Support:
    """One adapter's entries in one weight."""

    spans: Spans
    indices: Tensor  # flat positions, int32 (int64 in a huge weight), in slot order
    undo: Tensor  # the weight's original entries there, in its dtype


@dataclass
class Finished:
    """One adapter's entries in one weight as they are written, for switching back and forth.

    In the weight's order, which is several times as fast to write as that of many picks.
    """

    stamp: tuple[Any, ...]  # what the values were when they were added to the originals
    indices: Tensor  # as in `Support`, but increasing
    undo: Tensor
    adapted: Tensor  # what the weight holds there while this adapter alone is active


def index_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that flat positions in a weight are kept in."""
    return torch.int32 if weight.numel() <= torch.iinfo(torch.int32).max else torch.int64


def put(weight: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Overwrite entries of a weight at flat positions."""
    if indices.numel():  # scatter_ is faster than index_copy_
        weight.detach().view(-1).scatter_(0, indices.long(), entries)
