# SPDX-License-Identifier: Apache-2.0
"""SFA's section in model cards that transformers writes over those of adapters.

`Trainer.create_model_card` (also at the end of `Trainer.push_to_hub`) and `model.push_to_hub` put
cards of their own in the place of what `save_pretrained` wrote. Neither has a hook, so what makes
the one and what uploads the other get functions around them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel

from ...config import SFAConfig
from ...model_card import with_section, write_section


def summary_with_section(
    original: Callable[..., Any], cls: Any, trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Go around `TrainingSummary.from_trainer`: the card that is made of it has the section."""
    summary = original(cls, trainer, *args, **kwargs)
    section = _section_of(trainer.model)
    if section is None:
        return summary
    make_card = summary.to_model_card
    summary.to_model_card = wraps(make_card)(lambda: with_section(make_card(), section))
    return summary


def upload_with_section(
    original: Callable[..., Any], owner: Any, folder: Any, *args: Any, **kwargs: Any
) -> Any:
    """Go around `PushToHubMixin._upload_modified_files`: put the section into the card first."""
    section = _section_of(owner)
    if section is not None:
        write_section(Path(folder), section)
    return original(owner, folder, *args, **kwargs)


def _section_of(owner: Any) -> str | None:
    """Return the section about the adapter in a model's folder, not in folders inside it."""
    if isinstance(owner, SFAConfig):
        return owner.card_section()
    configs = getattr(owner, "peft_config", None)
    name, base = "default", owner
    if isinstance(owner, PeftModel):
        base = owner.get_base_model()
    else:
        with suppress(ValueError, AttributeError):  # no adapter, or no model of transformers
            name = next(iter(owner.active_adapters()), name)
    config = configs.get(name) if isinstance(configs, dict) else None
    if not isinstance(config, SFAConfig):
        return None
    known = type(base).__module__.startswith("transformers.")
    name_or_path = getattr(base, "name_or_path", None)
    return config.card_section(type(base).__name__ if known else None, name_or_path)
