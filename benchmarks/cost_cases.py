# SPDX-License-Identifier: Apache-2.0
"""What `cost.py` can measure: backbones, methods and their phases. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

#: SwinV2 sizes: embedding, blocks and attention heads of each stage.
BACKBONES: dict[str, tuple[int, list[int], list[int]]] = {
    "nano": (16, [1, 1, 2, 1], [1, 2, 4, 8]),
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
#: Pixels of a patch of the last stage: 4 in the first, doubled three times.
LAST_PATCH = 32
LARGEST_WINDOW = 12

#: SFA's methods: options of `SFAConfig` beside the budget, and the phases to measure.
SFA_METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sfa_internal": ({"rho": 0.0}, ("scoring", "after")),
    "sfa_internal_bf16": ({"rho": 0.0, "score_dtype": "bfloat16"}, ("scoring",)),
    "sfa_internal_every4": ({"rho": 0.0, "score_every": 4}, ("scoring",)),
    "sfa_both": ({}, ("scoring", "after")),
    "sfa_external": ({"rho": 1.0}, ("after",)),
    "sfa_internal_uniform": ({"rho": 0.0}, ("after",)),
    "pick": ({"rho": 0.0}, ("pick",)),
}
#: Its positions are spread evenly; those of the others are like trained ones.
UNIFORM = "sfa_internal_uniform"
#: Methods that ignore the budget.
FIXED_METHODS = ("frozen", "full", "lora_r16")
PEERS = ("lora", "shira", "super_tuning")
METHODS = (*FIXED_METHODS, *PEERS, *SFA_METHODS)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        method: One of `METHODS`.
        phase: "scoring", "after" (the last pick), "pick", or "" where there are no phases.
        budget: Trained share of the backbone; None where the method has none.
        options: Fields of `SFAConfig` beside the budget.
    """

    method: str
    phase: str = ""
    budget: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cycle(self) -> int:
        """After how many steps their work repeats."""
        return self.options.get("score_every", 1)

    @property
    def label(self) -> str:
        """Name of the case in messages."""
        budget = "" if self.budget is None else f" {self.budget:.1%}"
        return f"{self.method}{budget}{f' ({self.phase})' if self.phase else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return what a worker needs to build the case."""
        return asdict(self)


def make_cases(methods: list[str], budgets: list[float]) -> list[Case]:
    """Return the rows of the table, in the order of `METHODS`, budget by budget."""
    cases = [Case(method) for method in FIXED_METHODS if method in methods]
    for budget in budgets:
        cases += [Case(method, budget=budget) for method in PEERS if method in methods]
        cases += [
            Case(method, phase, budget, options)
            for method, (options, phases) in SFA_METHODS.items()
            if method in methods
            for phase in phases
        ]
    return cases


def window_of(resolution: int) -> int:
    """Return the largest attention window that divides every stage's grid; 0 if there is none."""
    if resolution < 1 or resolution % LAST_PATCH:
        return 0
    last = resolution // LAST_PATCH
    # A window of 1 has no positions for SwinV2's bias.
    return max((w for w in range(2, LARGEST_WINDOW + 1) if last % w == 0), default=0)
