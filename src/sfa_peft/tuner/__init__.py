# SPDX-License-Identifier: Apache-2.0
"""The PEFT face: importing this package registers SFA."""

from ..config import SFAConfig
from ..sparse import optimizer
from .layer import SFALayer as SFALayer
from .model import SFAModel as SFAModel
from .upstream.files import install
from .upstream.peft_type import register

register(SFAConfig, SFAModel)
install()
optimizer.install()
