# SPDX-License-Identifier: Apache-2.0
"""What a training run needs: the selector, its Trainer callback, and late entries under Adam."""

from .callback import SFACallback as SFACallback
from .selector import SFASelector as SFASelector
