# SPDX-License-Identifier: Apache-2.0
"""Make PEFT know SFA: the only file that touches PEFT's tables."""

from __future__ import annotations

from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from ...errors import SFAError

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
        SFAError: If something else has taken the name; PEFT's tables are as before then.
    """
    name: Any = NAME  # members of the enum hash and compare as their text
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(name) or PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if known is None:
        extend_peft_types()
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="sfa_"
        )
    elif known is not model_cls:
        raise SFAError(_taken(known, model_cls))


def _taken(known: type, own: type) -> str:
    """Say who has the name, and what to do about it."""
    package = known.__module__.partition(".")[0]
    who = f"{known.__module__}.{known.__qualname__}"
    if package == "peft":
        return (
            f"PEFT {peft.__version__} has its own method named {NAME} ({who}), so sfa_peft cannot "
            "register. To load adapters of sfa_peft, install an older PEFT or a newer sfa_peft; to "
            "use PEFT's method, do not import sfa_peft."
        )
    if package == own.__module__.partition(".")[0]:
        return (
            f"PEFT holds another copy of {package} ({who}): it was imported, removed from "
            "sys.modules and imported again, or there are two installations. Models of the two "
            "copies do not know each other. Start Python anew, and keep one installation."
        )
    return (
        f"PEFT already has a method named {NAME}, from the package `{package}` ({who}), so "
        "sfa_peft cannot register. Import only one of the two in a process."
    )
