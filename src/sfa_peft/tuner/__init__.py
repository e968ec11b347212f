# SPDX-License-Identifier: Apache-2.0
"""The PEFT face: importing this package registers SFA."""

from ..config import SFAConfig
from .heads import install as install_heads
from .layer import SFALayer as SFALayer
from .model import SFAModel as SFAModel
from .registration import register

register(SFAConfig, SFAModel)
install_heads()
