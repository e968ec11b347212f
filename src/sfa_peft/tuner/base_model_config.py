# SPDX-License-Identifier: Apache-2.0
"""What a backbone computes beside its weights, by its config: recorded when an adapter is saved.

A model with the same weights and another config computes other things: SwinV2 limits windows and
shifts by `image_size` when it is built.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..backbones import Backbone
from ..errors import AdapterFileError, OtherBaseWarning, warn
from ..files.adapter_config import Resolved

#: Fields that say nothing about what is computed outside training.
_SILENT = frozenset(
    {
        *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "torch_dtype"),
        *("id2label", "label2id", "num_labels", "problem_type", "transformers_version"),
        *("output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
        *("attention_dropout", "attention_probs_dropout_prob", "drop_path_rate", "dropout"),
        *("classifier_dropout_prob", "hidden_dropout_prob", "initializer_factor"),
        *("layer_scale_init_value", "layerscale_value", "norm_pix_loss", "use_cache"),
    }
)
#: Fields that say which features come out: the layers inside do the same.
OUTPUTS = frozenset({"out_features", "out_indices", "stage_names", "reshape_hidden_states"})
#: Fields by which layers compute other things with the same weights.
_FUNCTION = frozenset(
    {
        *("depths", "num_hidden_layers", "num_heads", "num_attention_heads", "patch_size"),
        *("window_size", "pretrained_window_sizes", "window_block_indices", "global_attn_indexes"),
        *("hidden_act", "layer_norm_eps", "rope_theta", "rope_parameters", "strides"),
        *("masked_unit_size", "num_query_pool", "query_stride", "reshape_last_stage"),
        *("normalize_modulator", "use_post_layernorm", "mask_ratio"),
    }
)
#: By `model_type`, further ones of that kind.
_FUNCTION_OF = {"swinv2": frozenset({"image_size"})}
_LONGEST = 1000  # characters of a value; longer ones are left out of the record


def recorded_fields(backbone: Backbone | None) -> dict[str, Any] | None:
    """Return the fields of a backbone's config that may change what it computes, as JSON has them.

    Values that would be long in a file are left out; None for a model without a known backbone.
    """
    return None if backbone is None else config_fields(backbone.module)


def config_fields(module: nn.Module) -> dict[str, Any]:
    """Return the same of any module; one without a config of Transformers has none."""
    config = getattr(module, "config", None)
    fields = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    texts = {
        name: json.dumps(fields[name], default=str) for name in sorted(fields.keys() - _SILENT)
    }
    return {name: json.loads(text) for name, text in texts.items() if len(text) <= _LONGEST}


def check_base_config(
    adapter_name: str, saved: Resolved | None, backbone: Backbone | None, *, strict: bool
) -> None:
    """Check that a backbone computes what it did when an adapter was trained.

    A field that one config lacks is of another release of Transformers, which then does as before.

    Args:
        adapter_name: The adapter.
        saved: What its file says.
        backbone: The backbone here.
        strict: Whether to refuse another function of its layers, and not only to warn of it.

    Raises:
        AdapterFileError: Naming the fields, if `strict`.
    """
    if saved is None or saved.base_config is None or backbone is None:
        return
    if saved.backbone != backbone.model_type:
        return
    before, here = saved.base_config, config_fields(backbone.module)
    names = sorted(n for n in before.keys() & here.keys() if _plain(before[n]) != _plain(here[n]))
    function = _FUNCTION | _FUNCTION_OF.get(backbone.model_type, frozenset())
    others = [name for name in names if name in function] if strict else []
    wanted, found = (
        ", ".join(f"{n}={fields[n]!r}" for n in others or names) for fields in (before, here)
    )
    message = f"Adapter `{adapter_name}` was trained on a backbone with {wanted}; here it has "
    if others:
        raise AdapterFileError(
            f"{message}{found}. Its layers compute other things with the same weights. Build the "
            "model with the adapter's values; or, to load it all the same, read its config with "
            "SFAConfig.from_pretrained, set check_base=False and pass config=config (or set "
            "SFA_CHECK_BASE=0)."
        )
    if names:
        warn(f"{message}{found}.", OtherBaseWarning)


def _plain(value: Any) -> Any:
    """Return a size as one number where it is the same in all directions."""
    same = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if same else value
