# SPDX-License-Identifier: Apache-2.0
"""The PEFT face: importing this package registers SFA."""

from ..config import SFAConfig
from .layer import SFALayer as SFALayer
from .model import SFAModel as SFAModel
from .peft_files import install
from .registration import register

register(SFAConfig, SFAModel)
install()
