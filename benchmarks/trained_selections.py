# SPDX-License-Identifier: Apache-2.0
"""Measure where trained selections lie, for `cost.py` and `switching.py`.

Trains the small SwinV2 of the examples on rendered scenes, with selected weights only and with both
parts, and writes how the selected entries are spread over the rows and columns of each matrix::

    python benchmarks/trained_selections.py --output benchmarks/trained_selections.json

The table shows what share of cache lines a selection touches: the trained one, one drawn anew from
the file for the same model, and as many entries at random with each matrix' own density.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from selections import Measured, draw, lines_touched, places_of, spread_of
from trained_size import train

from sfa_peft.sparse.pool import Pool
from sfa_peft.tuner.adapted_layers import find_pool

#: Budget and share of it that goes to external adapters.
CASES = ((0.05, 0.0), (0.05, 0.5), (0.2, 0.5))


def measure(pool: Pool) -> list[Measured]:
    """Return a line for each matrix."""
    found = []
    for ordinal, place in enumerate(places_of(pool.names)):
        mask = torch.zeros(pool.weights[ordinal].tensor.shape, dtype=torch.bool)
        mask.view(-1)[pool.indices(ordinal)] = True
        spreads = spread_of(mask.sum(1)), spread_of(mask.sum(0))
        found.append(Measured(*place, mask.float().mean().item(), *spreads))
    return found


def at_random(pool: Pool) -> torch.Tensor:
    """Return as many positions in each matrix, at random."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(pool.sizes[i], pool.count(i)) for i in range(len(pool.weights))]
    parts = [torch.randperm(size, generator=generator)[:count] for size, count in sizes]
    return torch.cat([part + start for part, start in zip(parts, pool.starts, strict=False)])


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


def to_json(case: dict[str, Any], measured: list[Measured]) -> dict[str, Any]:
    """Return a case as it is written: three digits are enough."""
    tensors = [
        {
            "place": [m.stage, rounded(m.height), m.kind],
            "density": rounded(m.density),
            "rows": [rounded(n) for n in (m.rows.used, *m.rows.bands)],
            "columns": [rounded(n) for n in (m.columns.used, *m.columns.bands)],
        }
        for m in measured
    ]
    return case | {"tensors": tensors}


def summary(pool: Pool, measured: list[Measured]) -> dict[str, float]:
    """Return what the table shows of a case."""
    eligible, chosen = pool.starts[-1], pool.slots[: pool.num_assigned].long()
    sizes = [tuple(weight.tensor.shape) for weight in pool.weights]
    rows, columns = sum(r for r, _ in sizes), sum(c for _, c in sizes)
    pairs = list(zip(measured, sizes, strict=True))
    return {
        "selected": len(chosen) / eligible,
        "rows": sum(m.rows.used * r for m, (r, _) in pairs) / rows,
        "columns": sum(m.columns.used * c for m, (_, c) in pairs) / columns,
        "block": sum(m.rows.used * r * m.columns.used * c for m, (r, c) in pairs) / eligible,
        "lines": lines_touched(chosen, eligible),
        "lines drawn": lines_touched(draw(pool, len(chosen), measured), eligible),
        "lines at random": lines_touched(at_random(pool), eligible),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="update steps (default: 200)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, required=True, help="where the file goes")
    return parser.parse_args()


def main() -> None:
    args = parse()
    cases, table = [], []
    for budget, rho in CASES:
        pool = find_pool(train(budget, args, rho=rho), "default")
        measured = measure(pool)
        cases.append(to_json({"budget": budget, "rho": rho}, measured))
        table.append((budget, rho, summary(pool, measured)))
    command = shlex.join(["python", "benchmarks/trained_selections.py", *sys.argv[1:]])
    text = json.dumps({"command": command, "cases": cases})
    args.output.write_text(text.replace('{"place"', '\n{"place"') + "\n")
    print(f"$ {command}")
    print(f"{'budget':>6} {'rho':>4}", *(f"{head:>16}" for head in table[0][2]))
    for budget, rho, shares in table:
        print(f"{budget:6.0%} {rho:4}", *(f"{share:16.1%}" for share in shares.values()))


if __name__ == "__main__":
    main()
