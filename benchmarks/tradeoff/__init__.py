# SPDX-License-Identifier: Apache-2.0
"""Every method on every task set within every budget, equally tuned (see `README.md`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
