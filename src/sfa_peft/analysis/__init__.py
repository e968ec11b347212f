# SPDX-License-Identifier: Apache-2.0
"""Rows and pictures out of a model with an adapter."""

from .plots import plot_selection as plot_selection
from .stats import BudgetReport as BudgetReport
from .stats import budget_report as budget_report
from .stats import selection_summary as selection_summary
