# SPDX-License-Identifier: Apache-2.0
"""Digests of pretrained weights, so that an adapter notices when it meets other ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

#: Hexadecimal digits kept of a SHA-256: 64 bits, against mistakes and not against attackers.
_DIGITS = 16
#: Types that a float32 base is also likely to be loaded in.
_NARROW = (torch.bfloat16, torch.float16)


def digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's bytes in C order (its shape and type are not part of it)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()[:_DIGITS]


def digests(tensor: Tensor) -> dict[str, str]:
    """Return digests by type: the tensor's own, and those it has after rounding to 16 bits."""
    types = [tensor.dtype, *(t for t in _NARROW if t.itemsize < tensor.dtype.itemsize)]
    return {type_name(t): digest(tensor.to(t)) for t in types}


def is_same_base(tensor: Tensor, saved: Mapping[str, str], dtype: str | None) -> bool | None:
    """Whether a tensor holds the values that digests were taken of, as far as its type can tell.

    Args:
        tensor: A weight of the present base.
        saved: Digests by type.
        dtype: Type of the base they were taken of.

    Returns:
        None where the two types have no digest in common.
    """
    own = type_name(tensor.dtype)
    if own in saved:
        return digest(tensor) == saved[own]
    if dtype in saved and dtype is not None:
        return digest(tensor.to(getattr(torch, dtype))) == saved[dtype]
    return None


def type_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
