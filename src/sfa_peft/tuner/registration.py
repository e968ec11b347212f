# SPDX-License-Identifier: Apache-2.0
"""Make PEFT know SFA: the only file that touches PEFT's tables."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from ..errors import SFAError

NAME = "SFA"


def extend_peft_types() -> None:
    """Add a true member `PeftType.SFA`; do nothing if there is one.

    PEFT has no extension point for types, and a plain string lacks the `.value` that it and
    transformers read. The class attribute comes first: an enum refuses to set a known name.
    """
    if NAME in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    setattr(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def register(config_cls: Any, model_cls: Any) -> None:
    """Register the method with PEFT; safe to call again.

    Raises:
        SFAError: If something else has taken the name.
    """
    extend_peft_types()
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(NAME))
    if known is None:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="sfa_"
        )
    elif known is not model_cls:
        raise SFAError(
            f"PEFT already has a method named {NAME} ({known.__module__}.{known.__qualname__}), so "
            "sfa_peft cannot register. Import only one of the two."
        )
