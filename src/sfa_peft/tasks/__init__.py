# SPDX-License-Identifier: Apache-2.0
"""Many tasks on one backbone."""

from .bank import TaskBank as TaskBank
from .combine import CombineReport as CombineReport
from .combine import PairOverlap as PairOverlap
from .combine import combine as combine
from .export import ExportReport as ExportReport
from .export import export_onnx as export_onnx
from .export import export_overwrites as export_overwrites
from .extract import ExtractReport as ExtractReport
from .extract import LostTensor as LostTensor
from .extract import extract as extract
from .folder import VerifyReport as VerifyReport
from .folder import convert as convert
from .folder import load_task as load_task
from .folder import merge as merge
from .folder import verify as verify
from .memory import TaskMemory as TaskMemory
from .plan import TrainingPlan as TrainingPlan
from .plan import plan_training as plan_training
from .saved import DiffReport as DiffReport
from .saved import SavedPart as SavedPart
from .saved import SavedReport as SavedReport
from .saved import diff as diff
from .saved import inspect as inspect
from .saved import overlaps as overlaps
from .saved import plot_saved as plot_saved

__all__ = [
    "CombineReport",
    "DiffReport",
    "ExportReport",
    "ExtractReport",
    "LostTensor",
    "PairOverlap",
    "SavedPart",
    "SavedReport",
    "TaskBank",
    "TaskMemory",
    "TrainingPlan",
    "VerifyReport",
    "combine",
    "convert",
    "diff",
    "export_onnx",
    "export_overwrites",
    "extract",
    "inspect",
    "load_task",
    "merge",
    "overlaps",
    "plan_training",
    "plot_saved",
    "verify",
]
