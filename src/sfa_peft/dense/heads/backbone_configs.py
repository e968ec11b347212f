# SPDX-License-Identifier: Apache-2.0
"""The config of the backbone inside a head's config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from sfa_peft.errors import SFAError


def read_backbone_config(
    given: PretrainedConfig | dict[str, Any] | None, where: str, stages: Sequence[str]
) -> PretrainedConfig:
    """Return a backbone's config.

    Args:
        given: The config, its dict (as in a saved file), or None for a SwinV2.
        where: Name of the head's config, for errors.
        stages: ``out_features`` of that SwinV2.

    Raises:
        SFAError: If it is neither, or the dict does not say of which model.
    """
    if given is None:
        return AutoConfig.for_model("swinv2", out_features=list(stages))
    if isinstance(given, dict):
        options = dict(given)
        if "model_type" not in options:
            raise SFAError(f"{where}.backbone_config: the dict has no `model_type`")
        return AutoConfig.for_model(options.pop("model_type"), **options)
    if not isinstance(given, PretrainedConfig):
        raise SFAError(
            f"{where}.backbone_config: expected a config of transformers or its dict, got "
            f"{type(given).__name__}"
        )
    return given
