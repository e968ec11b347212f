# SPDX-License-Identifier: Apache-2.0
"""The errors and warnings of the package: every one says where, expected, got and what to do."""

from __future__ import annotations


class SFAError(ValueError):
    """Base of all errors raised on purpose by this package."""


class ConfigError(SFAError):
    """A value in `SFAConfig` is out of range or contradicts another one."""


class BudgetError(SFAError):
    """The budget cannot be met: the message names the smallest budget (or what else) that works."""


class TargetError(SFAError):
    """No layer to adapt was found, or one was named that cannot be wrapped."""


class SelectionError(SFAError):
    """The selection cannot go on: unknown run length, no pick left, or a state of another run."""


class AdapterFileError(SFAError):
    """A saved adapter is damaged, of an unknown version, or belongs to another model."""


class SFAWarning(UserWarning):
    """Something works but is probably not what was meant."""
