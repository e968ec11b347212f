# SPDX-License-Identifier: Apache-2.0
"""Every method on every task set within every budget, equally tuned (see `README.md`)."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "examples"), str(_ROOT / "benchmarks")]
