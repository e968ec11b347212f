# SPDX-License-Identifier: Apache-2.0
"""Many tasks on one backbone."""

from .bank import TaskBank as TaskBank
from .memory import TaskMemory as TaskMemory
