# SPDX-License-Identifier: Apache-2.0
"""Selective Feature Adapter (SFA) for PEFT; importing the package registers the method."""

from .analysis import BudgetReport as BudgetReport
from .analysis import budget_report as budget_report
from .analysis import plot_selection as plot_selection
from .analysis import selection_summary as selection_summary
from .backbones import Backbone as Backbone
from .backbones import RoleModule as RoleModule
from .backbones import find_backbone as find_backbone
from .backbones import role_modules as role_modules
from .config import SFAConfig as SFAConfig
from .errors import AdapterFileError as AdapterFileError
from .errors import BudgetError as BudgetError
from .errors import ConfigError as ConfigError
from .errors import SelectionError as SelectionError
from .errors import SFAError as SFAError
from .errors import SFAWarning as SFAWarning
from .errors import TargetError as TargetError
from .model_card import set_card_metrics as set_card_metrics
from .selection.scores import register_score as register_score
from .training import SFACallback as SFACallback
from .training import SFASelector as SFASelector
from .tuner import SFALayer as SFALayer
from .tuner import SFAModel as SFAModel

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "Backbone",
    "BudgetError",
    "BudgetReport",
    "ConfigError",
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
    "budget_report",
    "find_backbone",
    "plot_selection",
    "register_score",
    "role_modules",
    "selection_summary",
    "set_card_metrics",
]
