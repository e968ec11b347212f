# SPDX-License-Identifier: Apache-2.0
"""One budget for two adapters: (beta, rho) or (beta, d) to widths and a number of weights.

Plain arithmetic over sizes; knows no model. What is solved here never exceeds the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from .errors import BudgetError

#: `rho` where neither `rho` nor `adapter_dim` is given (the paper's value, Sec. 3).
DEFAULT_RHO = 0.5


@dataclass(frozen=True)
class BudgetPlan:
    """What a budget was solved to.

    Attributes:
        total: Parameters of the backbone, the paper's norm of theta(T).
        allowed: floor(beta * total): the most that may be trained, head not counted.
        adapter_dim: The common width d; 0 without external adapters.
        widths: Width min(d, D) of each external adapter by layer name.
        external: Parameters of all external adapters.
        internal: Number of pretrained weights to select.
        eligible: Number of pretrained weights that may be selected.
    """

    total: int
    allowed: int
    adapter_dim: int
    widths: Mapping[str, int]
    external: int
    internal: int
    eligible: int


@dataclass(frozen=True)
class External:
    """What the size of external adapters depends on, beside their width.

    Attributes:
        outputs: Number of output features D of each layer that gets one.
        bias: Whether projections (and convolutions) have biases.
        kind: "bottleneck" (Eq. 3), or "mona" with a norm and convolutions besides.
    """

    outputs: Mapping[str, int]
    bias: bool = True
    kind: str = "bottleneck"

    def parameters(self, adapter_dim: int) -> int:
        """Return the parameters of all external adapters at width d (each layer has min(d, D))."""
        if adapter_dim == 0:
            return 0
        return sum(self._of_one(size, min(adapter_dim, size)) for size in self.outputs.values())

    def _of_one(self, features: int, width: int) -> int:
        count = 2 * features * width + (width + features if self.bias else 0)
        if self.kind == "mona":
            # Norm and two scales; depthwise convolutions of 3, 5 and 7, and one of 1.
            count += 4 * features + (9 + 25 + 49) * width + width**2
            count += 4 * width if self.bias else 0
        return count


def solve_budget(
    *,
    budget: float,
    rho: float | None,
    adapter_dim: int | None,
    total: int,
    external: External,
    eligible: int,
) -> BudgetPlan:
    """Solve (beta, rho) or (beta, d) to the largest d and number of weights within the budget.

    Args:
        budget: beta, in (0, 1].
        rho: Share for the external adapters, in [0, 1]; None for the default.
        adapter_dim: d, instead of `rho`.
        total: Parameters of the backbone.
        external: The external adapters.
        eligible: Number of pretrained weights that may be selected.

    Raises:
        BudgetError: If not even the narrowest (or the asked) external adapters fit, or nothing
            at all does; the message names the smallest budget that works.
    """
    # A decimal fraction is taken as written: 0.3 of 10 is 3, whatever binary floats make of it.
    allowed = math.floor(Fraction(str(budget)) * total)
    if adapter_dim is not None:
        dim = _given_width(adapter_dim, external, budget, allowed, total)
    else:
        share = DEFAULT_RHO if rho is None and external.outputs else (rho or 0.0)
        dim = _widest(share, external, budget, total)
    cost = external.parameters(dim)
    wants_internal = rho != 1
    internal = min(allowed - cost, eligible) if wants_internal else 0
    if cost + internal < 1:
        raise BudgetError(
            f"budget={budget}: {budget} of {total} parameters is less than one weight. "
            f"{_smallest_budget(1, total)}."
        )
    widths = {name: min(dim, size) for name, size in external.outputs.items()} if dim else {}
    return BudgetPlan(total, allowed, dim, widths, cost, internal, eligible)


def with_selection(plan: BudgetPlan, count: int, budget: float) -> BudgetPlan:
    """Return a plan whose internal part is a selection of `count` weights that exists already.

    Raises:
        BudgetError: If it does not fit into the budget beside the external adapters.
    """
    needed = plan.external + count
    if needed > plan.allowed:
        raise BudgetError(
            f"budget={budget} of {plan.total} allows {plan.allowed} parameters, but the saved "
            f"selection has {count} weights and the external adapters (d={plan.adapter_dim}) have "
            f"{plan.external} parameters, together {needed}. "
            f"{_smallest_budget(needed, plan.total)}, if rho or adapter_dim give external adapters "
            "no more than now; or lower those."
        )
    return replace(plan, internal=count)


def _given_width(dim: int, external: External, budget: float, allowed: int, total: int) -> int:
    if not external.outputs:
        raise BudgetError(_no_place("adapter_dim", dim))
    cost = external.parameters(dim)
    if cost > allowed:
        raise BudgetError(
            f"adapter_dim={dim}: the external adapters alone have {cost} parameters, but "
            f"budget={budget} of {total} allows {allowed}. {_smallest_budget(cost, total)}; or "
            "lower adapter_dim."
        )
    return dim


def _widest(rho: float, external: External, budget: float, total: int) -> int:
    if rho == 0:
        return 0
    if not external.outputs:
        raise BudgetError(_no_place("rho", rho))
    allowed = math.floor(Fraction(str(rho)) * Fraction(str(budget)) * total)
    narrowest = external.parameters(1)
    if narrowest > allowed:
        needed = narrowest / Fraction(str(rho))
        raise BudgetError(
            f"budget={budget}, rho={rho}: external adapters of width 1 already have {narrowest} "
            f"parameters, but their share of {total} is {allowed}. "
            f"{_smallest_budget(needed, total)}; or use rho=0 for selected weights only."
        )
    low, high = 1, max(external.outputs.values())  # d beyond the widest layer changes nothing
    while low < high:
        middle = (low + high + 1) // 2
        if external.parameters(middle) <= allowed:
            low = middle
        else:
            high = middle - 1
    return low


def _no_place(name: str, value: float) -> str:
    return (
        f"{name}={value} asks for external adapters, but none of the targeted layers ends an "
        "attention or MLP sub-layer. Name the layers that get one in external_modules, or use "
        "rho=0."
    )


def _smallest_budget(parameters: int | Fraction, total: int) -> str:
    """Say which share, with six digits after the point, allows `parameters` of `total`."""
    millionths = math.ceil(parameters * 10**6 / Fraction(max(total, 1)))
    if millionths > 10**6:
        return "No budget up to 1 works here"
    return f"The smallest budget that works is {millionths / 10**6}"
