# SPDX-License-Identifier: Apache-2.0
"""Put a task into the base's ONNX file: plain numpy and onnx, nothing of this library.

It shows how little a runtime in a browser or in C++ needs: read a header of json, copy numbers to
positions of initialisers; the graph stays::

    sfa-peft export out/depth --overwrites depth.safetensors --base_onnx base.onnx
    python examples/onnx_overwrites.py base.onnx depth.safetensors depth.onnx
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return arrays by name, and the metadata: a length, a header of json, then bytes."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata, arrays = header.pop("__metadata__", {}), {}
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(data[start + first : start + last], kinds[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays, metadata


def digest(model: onnx.ModelProto) -> str:
    """Return what tells one base from another: SHA-256 over the initialisers by name."""
    found = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        found.update(tensor.name.encode())
        found.update(np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes())
    return found.hexdigest()


def overwrite(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> int:
    """Write values to positions of initialisers, in place; return how many numbers."""
    count = 0
    for tensor in model.graph.initializer:
        if f"{tensor.name}.positions" in arrays:
            numbers = numpy_helper.to_array(tensor).copy()
            positions = arrays[f"{tensor.name}.positions"]
            numbers.reshape(-1)[positions] = arrays[f"{tensor.name}.values"]
            tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
            count += len(positions)
    return count


def main(base: str, task: str, out: str) -> None:
    model, (arrays, metadata) = onnx.load(base), read_safetensors(task)
    if metadata["base_sha256"] != digest(model):
        raise SystemExit(f"{task}: made for another base than {base}")
    count = overwrite(model, arrays)
    onnx.save(model, out)
    print(f"{out}: {count:,} numbers overwritten")


if __name__ == "__main__":
    main(*sys.argv[1:])
