# SPDX-License-Identifier: Apache-2.0
"""The checks of `SFAConfig`: one clear error for each value that is out of range."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .errors import ConfigError, SFAError
from .files.packing import SAVED_VALUES
from .selection.accumulators import SCORE_DTYPES
from .selection.pick import GRANULARITIES, RANKINGS
from .selection.schedule import SCHEDULES
from .selection.scores import find_score

if TYPE_CHECKING:
    from .config import SFAConfig

#: What weight decay of the optimizer pulls towards its neutral value.
WEIGHT_DECAYS = ("change", "weight")

#: What the values of a saved selection start from.
SELECTION_VALUES = ("zero", "trained")


def check_registered(config: SFAConfig) -> None:
    """Check that PEFT still takes the config's type for this method.

    Raises:
        SFAError: If a package that was imported later has put another method under the name.
    """
    name: Any = config.peft_type
    of_config: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
    theirs = None
    if of_config is not None and not isinstance(config, of_config):
        theirs = of_config
    elif tuner is not None and not any(_is_own(cls) for cls in tuner.__mro__):
        theirs = tuner
    if theirs is not None:
        raise SFAError(
            "Another package has put its own method "
            f"({theirs.__module__}.{theirs.__qualname__}) in "
            "the place of SFA in PEFT's tables, after sfa_peft was imported. Import only one of "
            "the two in a process."
        )


def check_budget(config: SFAConfig) -> None:
    """Check how much may be trained."""
    if not _is_number(config.budget) or not 0 < config.budget <= 1:
        raise ConfigError(
            f"SFAConfig.budget: expected a share of the backbone, 0 < budget <= 1, got "
            f"{config.budget!r}. 0.05 is the paper's small setting, 0.2 its large one."
        )
    if config.rho is not None and config.adapter_dim is not None:
        raise ConfigError(
            f"SFAConfig: rho={config.rho!r} and adapter_dim={config.adapter_dim!r} are both given, "
            "but each follows from the other and the budget. Leave one of them out."
        )
    if config.rho is not None and (not _is_number(config.rho) or not 0 <= config.rho <= 1):
        raise ConfigError(
            "SFAConfig.rho: expected the external adapters' share of the budget, 0 <= rho <= "
            f"1, got {config.rho!r}. 0.5 is the paper's value."
        )
    if config.adapter_dim is not None and (
        not _is_int(config.adapter_dim) or config.adapter_dim < 1
    ):
        raise ConfigError(
            f"SFAConfig.adapter_dim: expected a width of at least 1, got {config.adapter_dim!r}. "
            "For no external adapters use rho=0."
        )


def check_types(config: SFAConfig) -> None:
    """Check the types of fields that hold names or folders."""
    for field in ("target_modules", "target_parameters", "external_modules", "exclude_modules"):
        value = getattr(config, field)
        if value is not None and not isinstance(value, str) and not _is_names(value):
            raise ConfigError(
                f"SFAConfig.{field}: expected a list of names, one regular expression or None, got "
                f"{value!r}."
            )
    if config.modules_to_save is not None and not _is_names(config.modules_to_save):
        named = config.modules_to_save
        advice = f" Write [{named!r}]." if isinstance(named, str) else ""
        raise ConfigError(
            f"SFAConfig.modules_to_save: expected a list of names or None, got {named!r}.{advice}"
        )
    for field in ("selection_from", "continue_from"):
        value = getattr(config, field)
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise ConfigError(
                f"SFAConfig.{field}: expected a saved adapter's folder or Hub id, or None, got "
                f"{value!r}."
            )


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(name, str) for name in value
    )


def check_layers(config: SFAConfig) -> None:
    """Check which layers are named."""
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            "SFAConfig: When `layers_pattern` is specified, `layers_to_transform` must also be "
            "specified."
        )
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ConfigError(
            "SFAConfig: `layers_to_transform` cannot be used when `target_modules` is a str, "
            "because a regular expression can name the layers itself."
        )


def check_schedule(config: SFAConfig) -> None:
    """Check when and how weights are picked, trained and saved."""
    choices = {
        "score_dtype": SCORE_DTYPES,
        "ranking": RANKINGS,
        "granularity": GRANULARITIES,
        "schedule": SCHEDULES,
        "weight_decay_on": WEIGHT_DECAYS,
        "saved_values": SAVED_VALUES,
        "selection_values": SELECTION_VALUES,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(
                f"SFAConfig.{name}: expected one of {', '.join(allowed)}, got "
                f"{getattr(config, name)!r}."
            )
    if not _is_number(config.internal_lr_ratio) or config.internal_lr_ratio <= 0:
        raise ConfigError(
            "SFAConfig.internal_lr_ratio: expected a factor above 0, got "
            f"{config.internal_lr_ratio!r}."
        )
    until = config.select_until
    if until is not None and (not _is_number(until) or not 0 < until <= 1):
        raise ConfigError(
            f"SFAConfig.select_until: expected a share of the run, 0 < select_until <= 1, got "
            f"{until!r}."
        )
    for name in ("selection_steps", "total_steps"):
        value = getattr(config, name)
        if value is not None and (not _is_int(value) or value < 1):
            raise ConfigError(
                f"SFAConfig.{name}: expected a number of update steps of at least 1, got "
                f"{value!r}. None lets the run decide."
            )


def check_score(config: SFAConfig) -> None:
    """Check how weights are ranked."""
    if config.resolved is None:  # a trained adapter loads without its user's own score
        find_score(config.score)
    if not _is_int(config.seed):
        raise ConfigError(f"SFAConfig.seed: expected an integer, got {config.seed!r}.")
    if not _is_int(config.score_every) or config.score_every < 1:
        raise ConfigError(
            f"SFAConfig.score_every: expected a number of steps of at least 1, got "
            f"{config.score_every!r}."
        )
    if config.score == "weight_difference" and (
        config.score_every > 1 or config.score_dtype != "float32"
    ):
        raise ConfigError(
            'SFAConfig: score="weight_difference" trains candidates in fp32 on every step; '
            f"leave out score_every={config.score_every} and score_dtype={config.score_dtype!r}."
        )


def check_reuse(config: SFAConfig) -> None:
    """Check what is taken from another adapter."""
    if config.selection_from is not None and config.rho == 1:
        raise ConfigError(
            "SFAConfig: rho=1 leaves no budget for the weights of selection_from="
            f"{config.selection_from!r}. Lower rho, or leave selection_from out."
        )
    if config.selection_from is None and config.selection_values == "trained":
        raise ConfigError(
            "SFAConfig: selection_values='trained' is about a saved selection, but "
            "selection_from names none. Give an adapter's folder there."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
