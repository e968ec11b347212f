# SPDX-License-Identifier: Apache-2.0
"""What `adapter_config.json` says of a saved adapter under `resolved`: sizes, layers, tensors.

Version 1 listed layers of which only the weight could be changed, version 2 tensors; both kept
values and positions as plain tensors. Version 3 packs them (see `packing`) and adds the digest of
every tensor's pretrained values, and roles beside the paths. Version 4 is written only for an
adapter that builds on earlier ones, which it lists; readers of version 3 must not ignore that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdapterFileError

FORMAT_VERSION = 3
CHAIN_VERSION = 4
#: A packed selection takes less than this, whatever is selected; more is damage.
_LARGEST_BYTES_PER_WEIGHT = 16
_LARGEST_REST = 1 << 26
_LARGEST_CONFIG = 1 << 16
READABLE_VERSIONS = (1, 2, 3, 4)


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
        dtype: Type it had ("float32"), None where an old file does not say.
        digests: By type, the digest of the pretrained values in it (see `fingerprint`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


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
        packed: Bytes of the packed selection; None where values and positions are plain tensors.
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
            "tensors": [tensor_to_dict(t) for t in self.tensors],
        }


def read_resolved(data: Any) -> Resolved:
    """Return what a file's `resolved` says.

    Raises:
        AdapterFileError: If the version is unknown, or a field is missing or of another kind.
    """
    version = data.get("format") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or version not in READABLE_VERSIONS:
        raise AdapterFileError(
            f"adapter_config.json: format {version!r} of `resolved` is not known; this version "
            f"reads {', '.join(map(str, READABLE_VERSIONS))}. Upgrade sfa-peft."
        )
    wanted = {"total", "allowed", "adapter_dim", "internal"}
    wanted |= {1: {"layers", "external"}, 2: {"tensors", "external"}}.get(
        version, {"tensors", "layers", "packed"}
    )
    wanted |= {"chain"} if version == CHAIN_VERSION else set()
    missing = wanted - set(data)
    if missing:
        raise AdapterFileError(
            f"adapter_config.json: `resolved` lacks {', '.join(sorted(missing))}; damaged or "
            "written by hand? Save the adapter again."
        )
    try:
        return _read(data, version)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterFileError(
            f"adapter_config.json: `resolved` is damaged ({type(error).__name__}: {error}). Save "
            "the adapter again."
        ) from error


def _read(data: Mapping[str, Any], version: int) -> Resolved:
    if version == 1:
        tensors = [SavedTensor(f"{n}.weight", _shape(s)) for n, s in data["layers"]]
    elif version == 2:
        tensors = [SavedTensor(str(n), _shape(s)) for n, s in data["tensors"]]
    else:
        tensors = [tensor_from_dict(t) for t in data["tensors"]]
    if version < FORMAT_VERSION:
        names = dict.fromkeys([t.name.rpartition(".")[0] for t in tensors] + list(data["external"]))
        layers = {n: SavedLayer(_size(data["external"].get(n, 0))) for n in names}
    else:
        layers = {str(a["name"]): _layer(a) for a in data["layers"]}
    packed = data.get("packed")
    duplicates = len(tensors) - len({t.name for t in tensors})
    if duplicates:
        raise ValueError(f"{duplicates} tensors are listed twice")
    stray = {t.name.rpartition(".")[0] for t in tensors} - set(layers)
    if stray:
        raise ValueError(f"tensors of {sorted(stray)[0]}, which is not among the layers")
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
        backbone=data.get("backbone"),
        base_config=_config(data.get("base_config")),
        chain=tuple(Link(str(a["source"]), str(a["digest"])) for a in data.get("chain", ())),
    )


def _config(fields: Any) -> Mapping[str, Any] | None:
    if fields is not None and not isinstance(fields, Mapping):
        raise TypeError(f"expected the fields of a config, got {fields!r:.100}")
    if len(json.dumps(fields)) > _LARGEST_CONFIG:
        raise ValueError(f"base_config of more than {_LARGEST_CONFIG} characters")
    return fields


def _layer(data: Mapping[str, Any]) -> SavedLayer:
    return SavedLayer(_size(data["width"]), data["role"], data["block"], data["index"])


def tensor_to_dict(tensor: SavedTensor) -> dict[str, Any]:
    """Return a tensor's record as JSON can hold it."""
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "digests": dict(tensor.digests),
    }


def tensor_from_dict(data: Mapping[str, Any]) -> SavedTensor:
    """Return a tensor's record (ValueError, TypeError or KeyError if it is none)."""
    dtype = data["dtype"]
    if dtype is not None and not isinstance(dtype, str):
        raise TypeError(f"expected the name of a type, got {dtype!r}")
    digests = {str(k): str(v) for k, v in data["digests"].items()}
    return SavedTensor(str(data["name"]), _shape(data["shape"]), dtype, digests)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a number of at least 0, got {value!r}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_size(n) for n in value)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
