# SPDX-License-Identifier: Apache-2.0
"""A task as ONNX: the whole adapted model, or what it overwrites in the base's file.

A sparse change needs no other graph: it is new numbers at a few positions of initialisers, which a
runtime can overwrite before it opens a session, or between two runs. What is overwritten is found
by comparing the two files, so it does not matter how an exporter names or transposes weights.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from ..errors import SFAError
from ..files.folder import replacing
from .task_folder import load_base, load_saved

POSITIONS, VALUES = ".positions", ".values"
#: Key of the metadata: SHA-256 over the base's initialisers, see `base_digest`.
BASE_DIGEST = "base_sha256"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked.

    Attributes:
        path: The file.
        nbytes: Its bytes.
        outputs: Names of the model's outputs.
        difference: Largest difference from the model in PyTorch, over the largest absolute value
            of the output.
        overwritten: Of overwrites: numbers that are replaced.
        initialisers: Of overwrites: initialisers that have some.
    """

    path: str
    nbytes: int
    outputs: tuple[str, ...]
    difference: float
    overwritten: int = 0
    initialisers: int = 0

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.nbytes:,} bytes, outputs {', '.join(self.outputs)}"]
        if self.initialisers:
            lines.append(f"{self.overwritten:,} numbers of {self.initialisers} initialisers")
        lines.append(
            f"onnxruntime and PyTorch differ by {self.difference:.1e} of the largest value"
        )
        return "\n".join(lines)


def export_onnx(
    folder: str | PathLike[str],
    path: str | PathLike[str],
    *,
    size: tuple[int, int],
    batch_size: int = 1,
    base: str | None = None,
) -> ExportReport:
    """Write an adapted model as ONNX, and compare it in onnxruntime with PyTorch.

    Args:
        folder: The adapter's folder or Hub id.
        path: The file to write.
        size: Height and width of the images that it takes.
        batch_size: Images that it takes.
        base: As for `load_base`.

    Raises:
        SFAError: If onnx, onnxruntime or onnxscript is missing, the model cannot be exported, or
            its outputs differ.
    """
    _need_packages()
    model = load_saved(folder, base).merge_and_unload()
    images = _images(batch_size, size)
    names = _write_model(model, images, Path(path))
    return _checked(model, images, Path(path).read_bytes(), Path(path), names)


def export_overwrites(
    folder: str | PathLike[str],
    base_onnx: str | PathLike[str],
    path: str | PathLike[str],
    *,
    size: tuple[int, int],
    batch_size: int = 1,
    base: str | None = None,
) -> ExportReport:
    """Write what a task overwrites in the initialisers of the base's ONNX file.

    The file is of safetensors: for each initialiser that differs `NAME.positions`, int64, flat in C
    order, and `NAME.values`, of the initialiser's type. Its metadata has `base_sha256`, see
    `base_digest`.

    Args:
        folder: The adapter's folder or Hub id, without external adapters (`rho=0`).
        base_onnx: The base's file; written if there is none, else it must be the same graph.
        path: The file of overwrites.
        size: Height and width of the images.
        batch_size: Images.
        base: As for `load_base`.

    Raises:
        SFAError: As `export_onnx`; or if the adapter has external adapters, or the graphs differ.
    """
    onnx = _need_packages()
    adapter = load_saved(folder, base)
    if any("sfa_down" in name for name, _ in adapter.named_parameters()):
        raise SFAError(
            f"{folder}: has external adapters, which are layers that the base's graph lacks. Only "
            "adapters that were trained with rho=0 are overwrites; export the whole model instead"
        )
    images, base_path = _images(batch_size, size), Path(base_onnx)
    if not base_path.is_file():
        _write_model(load_base(folder, base), images, base_path)
    model, wanted = adapter.merge_and_unload(), Path(path)
    own = wanted.with_suffix(".onnx.tmp")
    try:
        names = _write_model(model, images, own)
        before, after = onnx.load(str(base_path)), onnx.load(str(own))
    finally:
        own.unlink(missing_ok=True)
    overwrites = find_overwrites(before, after, where=str(base_path))
    _save(overwrites, wanted, base_digest(initialisers_of(before)))
    apply_overwrites(before, read_overwrites(wanted, before))
    report = _checked(model, images, before.SerializeToString(), wanted, names)
    count = sum(positions.size for positions, _ in overwrites.values())
    return ExportReport(
        report.path, report.nbytes, report.outputs, report.difference, count, len(overwrites)
    )


Overwrites = Mapping[str, tuple[NDArray[np.int64], NDArray[Any]]]


def find_overwrites(before: Any, after: Any, *, where: str) -> Overwrites:
    """Return by initialiser the positions at which two models differ, and the second's numbers.

    Args:
        before: The base, a `ModelProto`.
        after: The adapted model, one of the same graph.
        where: Names the base in messages.

    Raises:
        SFAError: If the graphs, or shapes or types of initialisers, differ.
    """
    ones, twos = initialisers_of(before), initialisers_of(after)
    kinds = [{n: (a.shape, a.dtype) for n, a in arrays.items()} for arrays in (ones, twos)]
    if kinds[0] != kinds[1] or _nodes(before) != _nodes(after):
        raise SFAError(
            f"{where}: another graph than that of the adapted model. Export both with the same "
            "versions, size of images and number of classes: delete the file to have it made anew"
        )
    found = {}
    for name, array in ones.items():
        # As bytes, so that -0 and 0, and numbers that are none, count as they are stored.
        old, new = _bits(array), _bits(twos[name])
        positions = np.flatnonzero(old != new)
        if positions.size:
            found[name] = positions, twos[name].reshape(-1)[positions]
    return found


def read_overwrites(path: str | PathLike[str], base: Any) -> Overwrites:
    """Read a file of overwrites, and check that it is of a base.

    Raises:
        SFAError: If the base's initialisers hold other values than those it was made for.
    """
    with safe_open(fspath(path), framework="np") as file:
        digest = (file.metadata() or {}).get(BASE_DIGEST)
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    if digest != base_digest(initialisers_of(base)):
        raise SFAError(f"{path}: made for another base, or for one with another task in it")
    names = [key.removesuffix(POSITIONS) for key in arrays if key.endswith(POSITIONS)]
    return {name: (arrays[name + POSITIONS], arrays[name + VALUES]) for name in names}


def apply_overwrites(model: Any, overwrites: Overwrites) -> None:
    """Put overwrites into the initialisers of a `ModelProto`, in place."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name in overwrites:
            positions, values = overwrites[tensor.name]
            array = numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[positions] = values
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def initialisers_of(model: Any) -> dict[str, NDArray[Any]]:
    """Return the initialisers of a `ModelProto` by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def base_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return SHA-256 over initialisers in the order of their names: each name, then its bytes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


def _need_packages() -> Any:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SFAError(
            f"ONNX needs {', '.join(missing)}, which is not installed: pip install 'sfa-peft[onnx]'"
        )
    return importlib.import_module("onnx")


def _images(batch_size: int, size: tuple[int, int]) -> Tensor:
    if batch_size < 1 or min(size) < 1:
        raise SFAError(f"expected sizes of 1 or more, got batch_size={batch_size}, size={size}")
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0))


class _Plain(nn.Module):
    """A model that takes images and returns a tuple of its named outputs that are tensors."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            outputs = dict(model(pixel_values=images))
        self.names = [name for name, value in outputs.items() if isinstance(value, Tensor)]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values=pixel_values)
        return tuple(outputs[name] for name in self.names)


def _write_model(model: nn.Module, images: Tensor, path: Path) -> tuple[str, ...]:
    """Write a model and return the names of its outputs."""
    plain = _Plain(model.eval(), images)
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it remarks on packages that are not needed
    with replacing(path) as partial:
        try:
            torch.onnx.export(
                plain,
                (images,),
                str(partial),
                input_names=["pixel_values"],
                output_names=plain.names,
                dynamo=True,
                # As it is: folding and sharing of constants depend on the numbers in them.
                optimize=False,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # whatever an operator's translation raises
            text = str(error).strip().splitlines()
            raise SFAError(
                f"{type(model).__name__} cannot be exported by torch {torch.__version__} "
                f"({type(error).__name__}: {text[0] if text else ''})"
            ) from error
        finally:
            logger.setLevel(level)
    return tuple(plain.names)


def _checked(
    model: nn.Module, images: Tensor, data: bytes, path: Path, names: tuple[str, ...]
) -> ExportReport:
    """Compare a serialised model in onnxruntime with PyTorch.

    Raises:
        SFAError: If an output differs by more than rounding.
    """
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        outputs = dict(model(pixel_values=images))
    worst = 0.0
    for name, array in zip(names, found, strict=True):
        wanted = outputs[name].numpy()
        difference = float(np.abs(array - wanted).max() / max(float(np.abs(wanted).max()), 1e-12))
        worst = max(worst, difference)
        if not difference < 1e-3:
            raise SFAError(
                f"{path}: output `{name}` of onnxruntime differs from PyTorch by {difference:.1e} "
                "of its largest value"
            )
    return ExportReport(str(path), path.stat().st_size, names, worst)


def _save(overwrites: Overwrites, path: Path, digest: str) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, (positions, values) in overwrites.items():
        arrays[name + POSITIONS], arrays[name + VALUES] = positions, np.ascontiguousarray(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(arrays, partial, {BASE_DIGEST: digest})


def _nodes(model: Any) -> list[bytes]:
    """Return the nodes as bytes, without what only describes them."""
    nodes = []
    for node in model.graph.node:
        bare = type(node)()
        bare.CopyFrom(node)
        bare.ClearField("metadata_props")
        bare.ClearField("doc_string")
        nodes.append(bare.SerializeToString(deterministic=True))
    return nodes


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    flat = np.ascontiguousarray(array).reshape(-1)
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return flat.view(kinds[flat.dtype.itemsize])
