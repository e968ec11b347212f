# SPDX-License-Identifier: Apache-2.0
"""The rules of a selection, and whether a run may go on under those that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import ResumedRunWarning, SelectionError, warn
from .accumulators import num_ranks


@dataclass(frozen=True)
class SelectionRules:
    """How weights are scored and picked; a field means what it means in `SFAConfig`.

    Rules are equal where one run may go on from the other: fields that this does not depend on are
    not compared.

    Attributes:
        selects_while_training: Whether the selection grows during training.
    """

    score: str = "accumulated_gradient"
    score_dtype: str = "float32"
    score_every: int = 1
    ranking: str = "global"
    granularity: str = "weight"
    schedule: str = "linear"
    select_until: float | None = None
    seed: int = field(default=0, compare=False)
    late_bias_correction: bool = field(default=True, compare=False)
    selects_while_training: bool = field(default=True, compare=False)

    def to_state(self) -> dict[str, Any]:
        """Return what a selector's state keeps of how its selection was begun."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return {"settings": settings, "num_processes": num_ranks()}


def check_resumed(
    state: Mapping[str, Any], rules: SelectionRules, asked: Mapping[str, int | None]
) -> SelectionRules:
    """Check that a run can go on from a selector's state, and say where it will differ.

    Args:
        state: The selector's state, with that of its rules.
        rules: Those of the adapter that goes on.
        asked: `total_steps` and `selection_steps` asked for now, None where the run decides.

    Returns:
        The rules under which it was begun: what was left to the run stays as it was decided.

    Raises:
        SelectionError: If its selection was begun under other rules.
    """
    begun = replace(rules, **state.get("settings", {}))
    if rules.select_until is None:
        rules = replace(rules, select_until=begun.select_until)
    if begun != rules:
        changed = [
            f"{f.name}={getattr(begun, f.name)!r}, now {getattr(rules, f.name)!r}"
            for f in fields(rules)
            if getattr(begun, f.name) != getattr(rules, f.name)
        ]
        raise SelectionError(
            f"The selection was started with {'; '.join(changed)}. It cannot change midway: resume "
            "with the settings it was started with, or begin a new run."
        )
    other = [
        f"{name}={state[name]}, now {value}"
        for name, value in asked.items()
        if value is not None and value != state[name]
    ]
    if other:
        warn(
            f"The selection was started with {'; '.join(other)}. It goes on with the schedule it "
            "began with.",
            ResumedRunWarning,
        )
    saved_by = state.get("num_processes", num_ranks())
    if saved_by != num_ranks():
        warn(
            f"The selector state was saved by {saved_by} processes, and {num_ranks()} resume it. "
            "The run goes on, but with other batches (and another loss scale in scores of this "
            "round) than on as many processes as before.",
            ResumedRunWarning,
        )
    return begun
