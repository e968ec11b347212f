# SPDX-License-Identifier: Apache-2.0
"""The PEFT face: importing this package registers SFA."""

from ..config import SFAConfig
from ..sparse import optimizer
from .layer import SFALayer as SFALayer
from .model import SFAModel as SFAModel
from .upstream.peft_type import register
from .upstream.save_and_load import install

register(SFAConfig, SFAModel)
install()
optimizer.install()
