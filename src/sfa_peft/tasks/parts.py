# SPDX-License-Identifier: Apache-2.0
"""The adapters that are combined: read from folders, or taken from a model that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import SFAError
from ..files.record import Resolved
from ..sparse.delta import Deltas
from ..tuner.layer import find_adapter
from ..tuner.reading import SavedAdapter, read_saved

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Part:
    """One of the adapters.

    Attributes:
        source: Its folder, Hub id or name.
        config: Its config.
        resolved: Its layers and tensors, by the names of the model.
        selection: Its selected entries.
        others: Its external adapters and head, by key as `set_peft_model_state_dict` takes them.
    """

    source: str
    config: SFAConfig
    resolved: Resolved
    selection: Deltas
    others: Mapping[str, Tensor]

    @property
    def external(self) -> int:
        """Number of parameters of the external adapters."""
        parts = (".sfa_down.", ".sfa_up.")
        return sum(t.numel() for k, t in self.others.items() if any(p in k for p in parts))


def read_parts(model: nn.Module, sources: Sequence[str]) -> list[Part]:
    """Return the adapters; the model stays as it is.

    Args:
        model: A plain model or a `PeftModel`.
        sources: Names of adapters of the `PeftModel`, folders or Hub ids.

    Raises:
        SFAError: If one is not an SFA adapter.
        AdapterFileError: If a folder's is damaged or of another model or base.
    """
    peft_model = model if isinstance(model, PeftModel) else None
    inner = model if peft_model is None else peft_model.get_base_model()
    parts = []
    for source in sources:
        if peft_model is not None and source in peft_model.peft_config:
            parts.append(_loaded(peft_model, source))
        else:
            parts.append(_saved(read_saved(inner, source)))
    return parts


def _loaded(model: PeftModel, name: str) -> Part:
    config = model.peft_config[name]
    adapter = find_adapter(model, name)
    if not isinstance(config, SFAConfig) or adapter is None:
        raise SFAError(f"combine: `{name}` is not an SFA adapter. Give SFA adapters.")
    state = cast(dict[str, Tensor], get_peft_model_state_dict(model, adapter_name=name))
    others = {k: t.detach().clone() for k, t in state.items() if not _is_selection(k)}
    deltas = adapter.pool.deltas() if adapter.pool else {}
    return Part(name, config, adapter.record, deltas, others)


def _saved(saved: SavedAdapter) -> Part:
    others = {
        _renamed(k, saved.plan.renamed): t for k, t in saved.state.items() if not _is_selection(k)
    }
    return Part(saved.source, saved.config, saved.plan.record, saved.deltas, others)


def _is_selection(key: str) -> bool:
    return key.endswith((".sfa_packed", ".sfa_slots", ".sfa_pool"))


def _renamed(key: str, renamed: Mapping[str, str]) -> str:
    path, dot, rest = key.removeprefix(_PREFIX).partition(".sfa_")
    return f"{_PREFIX}{renamed.get(path, path)}{dot}{rest}" if dot else key
