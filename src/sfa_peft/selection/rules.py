# SPDX-License-Identifier: Apache-2.0
"""What a resumed selection must have in common with the run that it goes on."""

from __future__ import annotations

import logging
from typing import Any

from ..config import SFAConfig
from ..errors import SelectionError
from .accumulators import num_ranks

logger = logging.getLogger(__name__)

#: Fields of the config that scores and picks depend on.
_SETTINGS = (
    "score",
    "score_dtype",
    "score_every",
    "ranking",
    "granularity",
    "schedule",
    "select_until",
)


def settings_state(config: SFAConfig) -> dict[str, Any]:
    """Return what a selector's state keeps of how it was made."""
    return {
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "num_processes": num_ranks(),
    }


def check_settings(state: dict[str, Any], config: SFAConfig, total_steps: int | None) -> None:
    """Check that a run can go on from a selector's state, and say where it will differ.

    Args:
        state: The selector's state, with `settings_state`.
        config: The config of the adapter that goes on.
        total_steps: Update steps that were asked for now; None for those of the config.

    Raises:
        SelectionError: If its selection was begun with other settings.
    """
    changed = [
        f"{name}={was!r}, now {getattr(config, name)!r}"
        for name, was in state.get("settings", {}).items()
        if getattr(config, name) != was
    ]
    if changed:
        raise SelectionError(
            f"The selection was started with {'; '.join(changed)}. It cannot change midway: resume "
            "with the settings it was started with, or begin a new run."
        )
    asked = {
        "total_steps": config.total_steps if total_steps is None else total_steps,
        "selection_steps": config.selection_steps,
    }
    other = [
        f"{name}={state[name]}, now {value}"
        for name, value in asked.items()
        if value is not None and value != state[name]
    ]
    if other:
        logger.warning(
            "The selection was started with %s. It goes on with the schedule it began with.",
            "; ".join(other),
        )
    saved_by = state.get("num_processes", num_ranks())
    if saved_by != num_ranks():
        logger.warning(
            "The selector state was saved by %d processes, and %d resume it. The run goes on, but "
            "with other batches (and another loss scale in scores of this round) than on as many "
            "processes as before.",
            saved_by,
            num_ranks(),
        )
