# SPDX-License-Identifier: Apache-2.0
"""Selective Feature Adapter (SFA) for PEFT; importing the package registers the method."""

from .backbones import Backbone as Backbone
from .backbones import RoleModule as RoleModule
from .backbones import find_backbone as find_backbone
from .backbones import head_modules as head_modules
from .backbones import role_modules as role_modules
from .config import SFAConfig as SFAConfig
from .errors import AdapterFileError as AdapterFileError
from .errors import BudgetError as BudgetError
from .errors import BudgetWarning as BudgetWarning
from .errors import ConfigError as ConfigError
from .errors import DataWarning as DataWarning
from .errors import EmptySelectionWarning as EmptySelectionWarning
from .errors import FrozenHeadWarning as FrozenHeadWarning
from .errors import GradientWarning as GradientWarning
from .errors import LearningRateWarning as LearningRateWarning
from .errors import LossScaleWarning as LossScaleWarning
from .errors import MergeWarning as MergeWarning
from .errors import OptimizerWarning as OptimizerWarning
from .errors import OtherBaseWarning as OtherBaseWarning
from .errors import ParameterGroupWarning as ParameterGroupWarning
from .errors import ResumedRunWarning as ResumedRunWarning
from .errors import SelectionError as SelectionError
from .errors import SFAError as SFAError
from .errors import SFAWarning as SFAWarning
from .errors import TargetError as TargetError
from .errors import UnfinishedSelectionWarning as UnfinishedSelectionWarning
from .model_card import set_card_metrics as set_card_metrics
from .selection.scores import register_score as register_score
from .sparse.pairs import limit_switch_memory as limit_switch_memory
from .tasks.task_folder import load_task as load_task
from .training import SFACallback as SFACallback
from .training import SFASelector as SFASelector
from .tuner import SFALayer as SFALayer
from .tuner import SFAModel as SFAModel
from .tuner.parameter_groups import parameter_groups as parameter_groups
from .tuner.report import BudgetReport as BudgetReport
from .tuner.report import budget_report as budget_report
from .tuner.report import plot_selection as plot_selection
from .tuner.report import selection_summary as selection_summary
from .version import __version__ as __version__

__all__ = [
    "AdapterFileError",
    "Backbone",
    "BudgetError",
    "BudgetReport",
    "BudgetWarning",
    "ConfigError",
    "DataWarning",
    "EmptySelectionWarning",
    "FrozenHeadWarning",
    "GradientWarning",
    "LearningRateWarning",
    "LossScaleWarning",
    "MergeWarning",
    "OptimizerWarning",
    "OtherBaseWarning",
    "ParameterGroupWarning",
    "ResumedRunWarning",
    "RoleModule",
    "SFACallback",
    "SFAConfig",
    "SFAError",
    "SFALayer",
    "SFAModel",
    "SFASelector",
    "SFAWarning",
    "SelectionError",
    "TargetError",
    "UnfinishedSelectionWarning",
    "budget_report",
    "find_backbone",
    "head_modules",
    "limit_switch_memory",
    "load_task",
    "parameter_groups",
    "plot_selection",
    "register_score",
    "role_modules",
    "selection_summary",
    "set_card_metrics",
]
