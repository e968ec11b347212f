# SPDX-License-Identifier: Apache-2.0
"""`adapter_config.json`, and what it says of a saved adapter under `resolved`.

Sizes, layers, and tensors with digests of their pretrained values, so that an adapter notices when
it meets other ones. Whatever a file holds, it is read in bounded time and memory and ends in a
record that is whole, or in one `AdapterFileError`. Version 4 is written only for an adapter that
builds on earlier ones, which it lists; readers of version 3 must not ignore that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AdapterFileError
from .indices import MAX_SIZE

FORMAT_VERSION = 3
CHAIN_VERSION = 4
#: A packed selection takes less than this, whatever is selected; more is damage.
_LARGEST_BYTES_PER_WEIGHT = 16
_LARGEST_REST = 1 << 26
READABLE_VERSIONS = (FORMAT_VERSION, CHAIN_VERSION)

# More than any adapter's file has.
LARGEST_JSON = 1 << 22  # bytes
_LARGEST_BASE_CONFIG = 1 << 16  # characters
_MOST_CONTAINERS = 1 << 17  # lists and objects: each costs a hundred times its two bytes
_DEEPEST = 20  # lists and objects inside one another
_MOST_DIGITS = 20
_MOST_DIMENSIONS = 64
LONGEST_CHAIN = 256

#: Hexadecimal digits kept of a SHA-256: 64 bits, against mistakes and not against attackers.
_DIGITS = 16
#: Types that a float32 base is also likely to be loaded in.
_NARROW = (torch.bfloat16, torch.float16)
#: Digests by type of contents that this process has hashed: a base is hashed once, not per file.
_KNOWN: dict[tuple[Any, ...], dict[str, str]] = {}
_MOST_KNOWN = 1 << 14


@dataclass(frozen=True)
class Link:
    """An earlier adapter whose sparse change belongs to the base of a later one.

    Attributes:
        source: Its folder or Hub id, as it was given.
        digest: SHA-256 of its stored selection, hexadecimal.
    """

    source: str
    digest: str


@dataclass(frozen=True)
class SavedLayer:
    """A layer that an adapter changes.

    Attributes:
        width: Width of its external adapter, 0 for none.
        role: Role in a transformer block, None if unknown; with `block` and `index` it finds the
            layer again in a model whose modules have other names.
        block: Ordinal of the block.
        index: Ordinal among the block's layers of that role.
    """

    width: int = 0
    role: str | None = None
    block: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class SavedTensor:
    """A parameter whose entries an adapter may change.

    Attributes:
        name: Full name in the model.
        shape: Its shape.
        dtype: Type it had ("float32"), None before an adapter is saved.
        digests: By type, the digest of the pretrained values in it (see `digests`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "digests": dict(self.digests),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SavedTensor:
        """Return what `to_dict` was given (ValueError, TypeError or KeyError if it was not)."""
        dtype = data["dtype"]
        if dtype is not None and not isinstance(getattr(torch, _text(dtype), None), torch.dtype):
            raise ValueError(f"expected the name of a type, got {shown(dtype)}")
        digests = {_text(k): _text(v) for k, v in data["digests"].items()}
        return cls(_text(data["name"]), _shape(data["shape"]), dtype, digests)


@dataclass(frozen=True)
class Resolved:
    """What a budget was solved to, as a file records it.

    Attributes:
        total: Parameters of the backbone.
        allowed: Most parameters the budget allows.
        adapter_dim: Common width of external adapters.
        internal: Number of selected weights, assigned or not yet.
        layers: Adapted layers by path.
        tensors: Tensors that positions count, in their order.
        packed: Bytes of the packed selection; None where no weight is changed.
        backbone: `model_type` of the backbone, None if unknown.
        chain: Earlier adapters that the change is made on top of, the oldest first.
        base_config: Fields of the backbone's config that may change what it computes; None where a
            file does not say.
    """

    total: int
    allowed: int
    adapter_dim: int
    internal: int
    layers: Mapping[str, SavedLayer]
    tensors: tuple[SavedTensor, ...]
    packed: int | None = None
    backbone: str | None = None
    chain: tuple[Link, ...] = ()
    base_config: Mapping[str, Any] | None = None

    @property
    def num_weights(self) -> int:
        """Number of weights that positions count."""
        return sum(_product(t.shape) for t in self.tensors)

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the external adapters by layer."""
        return {name: layer.width for name, layer in self.layers.items() if layer.width}

    @property
    def parameters(self) -> dict[str, list[str]]:
        """Names of the parameters that may be selected from, by layer."""
        found: dict[str, list[str]] = {}
        for layer, _, parameter in (t.name.rpartition(".") for t in self.tensors):
            found.setdefault(layer, []).append(parameter)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        chain = [{"source": link.source, "digest": link.digest} for link in self.chain]
        return {
            "format": CHAIN_VERSION if chain else FORMAT_VERSION,
            **({"chain": chain} if chain else {}),
            "backbone": self.backbone,
            **({} if self.base_config is None else {"base_config": dict(self.base_config)}),
            "total": self.total,
            "allowed": self.allowed,
            "adapter_dim": self.adapter_dim,
            "internal": self.internal,
            "packed": self.packed,
            "layers": [  # a list, because PEFT sorts the keys of what it writes
                {"name": n, "width": a.width, "role": a.role, "block": a.block, "index": a.index}
                for n, a in self.layers.items()
            ],
            "tensors": [t.to_dict() for t in self.tensors],
        }


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the fields of an `adapter_config.json`.

    Raises:
        AdapterFileError: If it is no JSON object in UTF-8, or holds what no adapter's has.
    """
    try:
        with Path(path).open("rb") as file:
            fields = parse_json(file.read(LARGEST_JSON + 1))
        if not isinstance(fields, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: no config of an adapter ({error}); damaged? Copy or save the adapter again."
        ) from error
    return fields


def parse_json(data: bytes) -> Any:
    """Return what JSON that nobody vouches for holds (ValueError if it holds too much)."""
    if len(data) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
        raise ValueError(f"more than {_MOST_CONTAINERS} lists and objects")
    text = data.decode("utf-8-sig")  # some editors put a mark before it
    try:
        value = json.loads(text, parse_int=_integer, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("lists or objects nested too deep") from error
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError("lists or objects nested too deep")
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        depth += 1
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> float:
    raise ValueError(f"a number that is {name}")


def read_resolved(data: Any) -> Resolved:
    """Return what a file's `resolved` says.

    Raises:
        AdapterFileError: If the version is unknown, or a field is missing or of another kind.
    """
    version = data.get("format") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or version not in READABLE_VERSIONS:
        raise AdapterFileError(
            f"adapter_config.json: format {shown(version)} of `resolved` is not known; this "
            f"version reads {', '.join(map(str, READABLE_VERSIONS))}. Upgrade sfa-peft."
        )
    wanted = {"total", "allowed", "adapter_dim", "internal", "tensors", "layers", "packed"}
    wanted |= {"chain"} if version == CHAIN_VERSION else set()
    missing = wanted - set(data)
    if missing:
        raise AdapterFileError(
            f"adapter_config.json: `resolved` lacks {', '.join(sorted(missing))}; damaged or "
            "written by hand? Save the adapter again."
        )
    try:
        return _read(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterFileError(
            f"adapter_config.json: `resolved` is damaged ({type(error).__name__}: {error}). Save "
            "the adapter again."
        ) from error


def _read(data: Mapping[str, Any]) -> Resolved:
    tensors = [SavedTensor.from_dict(t) for t in data["tensors"]]
    layers = {_text(a["name"]): _layer(a) for a in data["layers"]}
    packed, backbone, chain = data["packed"], data.get("backbone"), data.get("chain", ())
    if len(chain) > LONGEST_CHAIN:
        raise ValueError(f"{len(chain)} earlier adapters")
    duplicates = len(tensors) - len({t.name for t in tensors})
    if duplicates:
        raise ValueError(f"{duplicates} tensors are listed twice")
    stray = {t.name.rpartition(".")[0] for t in tensors} - set(layers)
    if stray:
        raise ValueError(f"tensors of {shown(sorted(stray)[0])}, which is not among the layers")
    most = sum(_product(t.shape) for t in tensors)
    if _size(data["internal"]) > most:
        raise ValueError(f"internal {data['internal']} of {most} weights")
    if packed is not None and _size(packed) > _LARGEST_BYTES_PER_WEIGHT * most + _LARGEST_REST:
        raise ValueError(f"packed {packed} bytes for {most} weights")
    return Resolved(
        total=_size(data["total"]),
        allowed=_size(data["allowed"]),
        adapter_dim=_size(data["adapter_dim"]),
        internal=_size(data["internal"]),
        layers=layers,
        tensors=tuple(tensors),
        packed=None if packed is None else _size(packed),
        backbone=None if backbone is None else _text(backbone),
        base_config=_config(data.get("base_config")),
        chain=tuple(Link(_text(a["source"]), _text(a["digest"])) for a in chain),
    )


def _config(fields: Any) -> Mapping[str, Any] | None:
    if fields is not None and not isinstance(fields, Mapping):
        raise TypeError(f"expected the fields of a config, got {shown(fields)}")
    if len(json.dumps(fields)) > _LARGEST_BASE_CONFIG:
        raise ValueError(f"base_config of more than {_LARGEST_BASE_CONFIG} characters")
    return fields


def _layer(data: Mapping[str, Any]) -> SavedLayer:
    role, block, index = data["role"], data["block"], data["index"]
    return SavedLayer(
        _size(data["width"]),
        None if role is None else _text(role),
        None if block is None else _size(block),
        None if index is None else _size(index),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {shown(value)}")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a number of at least 0, got {shown(value)}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if len(value) > _MOST_DIMENSIONS or _product(value) >= MAX_SIZE:
        raise ValueError(f"no tensor has the shape {shown(value)}")
    return tuple(value)


def _product(shape: Sequence[Any]) -> int:
    product = 1
    for size in shape:
        product *= _size(size)
    return product


def check_tensors(
    saved: Sequence[tuple[str, Sequence[int]]], found: Mapping[str, Sequence[int]]
) -> None:
    """Check that every tensor of a saved adapter is in the model, with the shape it had.

    Args:
        saved: (full name, shape) of the tensors that stored positions refer to.
        found: Shapes of the model's parameters, by full name.

    Raises:
        AdapterFileError: Naming the first tensor that differs.
    """
    for name, shape in saved:
        if name not in found:
            raise AdapterFileError(
                f"Adapter of another model? It changes `{name}`, which this model does not have. "
                "Load it onto the model (and head) it was trained on; where that is this one, use "
                "the major version of transformers that it was saved with, since names changed."
            )
        if list(found[name]) != list(shape):
            raise AdapterFileError(
                f"Adapter of another model? `{name}` has shape {list(found[name])} here, the "
                f"adapter was trained on {list(shape)}. Load it onto the model it was trained on."
            )


def digests(tensor: Tensor) -> dict[str, str]:
    """Return digests by type: the tensor's own, and those it has after rounding to 16 bits."""
    types = [tensor.dtype, *(t for t in _NARROW if t.itemsize < tensor.dtype.itemsize)]
    known = _known_of(tensor)
    return {type_name(t): _digest_as(t, tensor, known) for t in types}


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
        return _digest_as(tensor.dtype, tensor, _known_of(tensor)) == saved[own]
    if dtype in saved and dtype is not None:
        kind = getattr(torch, dtype)
        return _digest_as(kind, tensor, _known_of(tensor)) == saved[dtype]
    return None


def _known_of(tensor: Tensor) -> dict[str, str]:
    """Return the digests by type that were taken of a tensor's content before, to be added to.

    By content, and not by what torch counts as a write: that misses writes through `.data`, numpy
    and kernels of others. The content is read each time, several times as fast as it is hashed.
    """
    if len(_KNOWN) > _MOST_KNOWN:
        _KNOWN.clear()
    return _KNOWN.setdefault((tensor.dtype, tensor.numel(), _sums(_bytes_of(tensor))), {})


def _digest_as(dtype: torch.dtype, tensor: Tensor, known: dict[str, str]) -> str:
    name = type_name(dtype)
    if name not in known:
        known[name] = _digest(tensor.detach().to(dtype))
    return known[name]


def _digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's bytes in C order (its shape and type are not part of it)."""
    return hashlib.sha256(_bytes_of(tensor).data).hexdigest()[:_DIGITS]


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _sums(data: NDArray[np.uint8]) -> bytes:
    """Return what tells contents apart in this process: 128 bits for each 256 KiB.

    Two sums of words and their upper halves, each times a random number of its own. Whatever two
    contents are, they have the same sums at most once in 2^60.
    """
    keys, rest = _keys(), data.size % 8
    words = data[: data.size - rest].view(np.uint64)
    found = []
    for first in range(0, words.size, keys.shape[1]):
        piece = words[first : first + keys.shape[1]]
        upper, own = piece >> 32, keys[:, : piece.size]
        for a, b in ((0, 1), (2, 3)):
            found += [np.einsum("i,i", piece, own[a]), np.einsum("i,i", upper, own[b])]
    sums = np.array(found, np.uint64).reshape(-1, 2)
    return sums.sum(1).tobytes() + data[data.size - rest :].tobytes()


@cache
def _keys() -> NDArray[np.uint64]:
    """Return random numbers for a piece of words that stays in the processor's cache."""
    return np.random.default_rng().integers(1 << 64, size=(4, 1 << 15), dtype=np.uint64)


def type_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
