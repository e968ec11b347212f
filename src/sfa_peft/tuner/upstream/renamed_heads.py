# SPDX-License-Identifier: Apache-2.0
"""Tensors of task heads under the names that this release of Transformers gives them.

Transformers renames a head's tensors while it reads a model's checkpoint, but nothing renames them
in an adapter's file, where a head that was trained whole lies beside the adapter. PEFT looks these
tensors up before it asks the tuner, so `peft_files` calls this first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# What Transformers 5 calls otherwise, with the name in 4. Only names that one release has and the
# other lacks are compared, so that a pattern that fits too much does no harm.
_FORMER_NAMES = (
    (r"\.linear_projections\.", ".linear_c."),  # SegFormer
    (r"\.aifi\.", ".encoder."),  # RT-DETR, D-FINE
    (r"(_attn)\.o_proj\.", r"\1.out_proj."),  # DETR and what holds its decoder
    (r"(layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"(layers\.\d+)\.mlp\.layers\.0\.", r"\1.fc1."),  # D-FINE
    (r"(layers\.\d+)\.mlp\.layers\.1\.", r"\1.fc2."),
)


def former_name(name: str) -> str:
    """Return the name that a head's tensor had in Transformers 4 (the same for such a name)."""
    for pattern, former in _FORMER_NAMES:
        name = re.sub(pattern, former, name)
    return name


def names_here(wanted: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """Pair the tensors that a model lacks in a file with those that it has no place for.

    Args:
        wanted: Names of the model's tensors.
        found: Names of the file's tensors.

    Returns:
        By name in the file the name in the model, where they differ by release only.
    """
    wanted, found = set(wanted), set(found)
    spare = {former_name(name): name for name in found - wanted}
    missing = {former_name(name): name for name in wanted - found}
    return {spare[former]: name for former, name in missing.items() if former in spare}


def heads_as_here(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an adapter's tensors with those of its heads named as in a model.

    Args:
        model: The model with the adapter and its `modules_to_save`.
        adapter_name: The adapter.
        state: Tensors by key as in the file, without adapter names.
    """
    wrappers: list[tuple[str, Any]] = [
        (n, m) for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)
    ]
    wanted = [f"{n}.{k}" for n, m in wrappers for k in m.adapter_state_dict_load_map(adapter_name)]
    here = names_here(wanted, (key for key in state if ".sfa_" not in key))
    return {here.get(key, key): tensor for key, tensor in state.items()}
