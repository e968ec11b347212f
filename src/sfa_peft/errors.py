# SPDX-License-Identifier: Apache-2.0
"""The errors and warnings of the package: every one says where, expected, got and what to do."""

from __future__ import annotations

import sys
import warnings


class SFAError(ValueError):
    """Base of all errors raised on purpose by this package."""


class ConfigError(SFAError):
    """A value in `SFAConfig` or another option is out of range or contradicts another one."""


class BudgetError(SFAError):
    """The budget cannot be met: the message names the smallest budget (or what else) that works."""


class TargetError(SFAError):
    """No layer to adapt was found, or one was named that cannot be wrapped."""


class SelectionError(SFAError):
    """The selection cannot go on: unknown run length, no pick left, or a state of another run."""


class AdapterFileError(SFAError):
    """A saved adapter is damaged, of an unknown version, or belongs to another model."""


class SFAWarning(UserWarning):
    """Something works but is probably not what was meant; each kind of it has its own type."""


class BudgetWarning(SFAWarning):
    """The budget is not spent, or not on what it usually is."""


class FrozenHeadWarning(SFAWarning):
    """Parameters outside the backbone are neither trained nor saved."""


class UnfinishedSelectionWarning(SFAWarning):
    """Fewer weights are selected than the budget allows, and no more will be."""


class EmptySelectionWarning(UnfinishedSelectionWarning):
    """No weight is selected at all."""


class ResumedRunWarning(SFAWarning):
    """A run goes on otherwise than it began."""


class GradientWarning(SFAWarning):
    """A gradient that scores wait for was not finite, or did not come."""


class LossScaleWarning(SFAWarning):
    """The loss is a multiple of what it should be."""


class LearningRateWarning(SFAWarning):
    """The learning rate is one that leaves a fresh adapter nearly where it starts."""


class OptimizerWarning(SFAWarning):
    """The optimizer gives late entries no bias correction of their own age."""


class ParameterGroupWarning(SFAWarning):
    """Groups of an optimizer that go by names or shapes mistake the selected weights."""


class OtherBaseWarning(SFAWarning):
    """An adapter is on other pretrained weights, or in another precision, than in training."""


class MergeWarning(SFAWarning):
    """A merged model needs more than its old class."""


class DataWarning(SFAWarning):
    """A part of a data set is left out."""


#: Packages whose code calls ours in between; contextlib stands for context managers of theirs.
_BETWEEN = {"sfa_peft", "peft", "transformers", "torch", "accelerate", "contextlib"}


def warn(message: str, kind: type[SFAWarning]) -> None:
    """Warn of the line that led here, the first one outside this package and those around it.

    Args:
        message: What is wrong and what to do.
        kind: The type that users filter by.
    """
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
    warnings.warn_explicit(message, kind, file, frame.f_lineno, module, registry)
