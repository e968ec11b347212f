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
from .onnx_export import ExportReport as ExportReport
from .onnx_export import export_onnx as export_onnx
from .onnx_export import export_overwrites as export_overwrites
from .saved_adapters import DiffReport as DiffReport
from .saved_adapters import SavedPart as SavedPart
from .saved_adapters import SavedReport as SavedReport
from .saved_adapters import diff as diff
from .saved_adapters import inspect as inspect
from .saved_adapters import overlaps as overlaps
from .saved_adapters import plot_saved as plot_saved
from .task_folder import VerifyReport as VerifyReport
from .task_folder import convert as convert
from .task_folder import load_task as load_task
from .task_folder import merge as merge
from .task_folder import verify as verify
from .training_plan import TrainingPlan as TrainingPlan
from .training_plan import plan_training as plan_training

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
