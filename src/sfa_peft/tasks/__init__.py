# SPDX-License-Identifier: Apache-2.0
"""Many tasks on one backbone."""

from .bank import TaskBank as TaskBank
from .combine import CombineReport as CombineReport
from .combine import PairOverlap as PairOverlap
from .combine import combine as combine
from .extract import ExtractReport as ExtractReport
from .extract import LostTensor as LostTensor
from .extract import extract as extract
from .memory import TaskMemory as TaskMemory

__all__ = [
    "CombineReport",
    "ExtractReport",
    "LostTensor",
    "PairOverlap",
    "TaskBank",
    "TaskMemory",
    "combine",
    "extract",
]
