# SPDX-License-Identifier: Apache-2.0
"""Feed damaged and forged files to what reads adapters and checkpoints, for as long as you like.

    python tests/fuzz_reader.py --seconds 600

Packed selections, tensors' files, `adapter_config.json` and the selector's state. Each input must
end in the reader's one error or in something whole, in 2 seconds of processor time and 200 MB (a
packed selection in 8). Forged inputs have right checksums, so that what lies behind is reached.
Whatever fails is printed as hex and belongs into the tests.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # a forged config names anything as its parent
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sfa_peft import AdapterFileError, SelectionError, SFAConfig, SFASelector
from sfa_peft.errors import SFAError
from sfa_peft.files.container import (
    SelectedEntries,
    assemble,
    decode_entries,
    encode_entries,
    read_blob,
)
from sfa_peft.files.entropy import expand, squeeze
from sfa_peft.files.folder import WEIGHTS_NAME, read_adapter
from sfa_peft.files.indices import pack_indices
from sfa_peft.files.values import ValueMode, check_finite
from sfa_peft.training.state_files import STATE_NAME, read_state, write_state
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

SECONDS = 2.0  # of processor time for one input
MEMORY = 200 << 20  # bytes for one input
SIZES = [300, 1, 64, 20_000]
COLUMNS = [0, 0, 8, 100]  # of a row; the last tensor is selected in some rows and columns
BLOB_MEMORY = 8 << 20  # bytes: many times what the sizes above take

#: What a forged field holds.
HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**60, 10**30, 0.5, 1e308, float("nan"), "", "x", "first",
    "(a|a)*$", "(", "../../etc", "\ud800", "x" * 5000, [], {}, [[[]]], [2**60] * 3000, ["first"],
    {"a": {"b": [1]}}, [None], [{}], "random", "float32", ["(.*)*$"] * 50,
]  # fmt: skip


class Target(NamedTuple):
    """A reader, and inputs for it."""

    make: Callable[[random.Random], bytes]
    check: Callable[[bytes], Any]  # raises RuntimeError if what it accepts is not whole
    error: type[Exception]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage bytes in one to four places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place:place] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del out[place : place + rng.randint(1, 9)]
        elif kind == 3:
            out[place : place + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, b"\x01" + b"\x00" * 7])
        elif kind == 4 and rng.random() < 0.2:
            del out[place:]
        else:
            out[place : place + 4] = rng.randbytes(4)
    return bytes(out)


def forge(value: Any, rng: random.Random) -> Any:
    """Return a tree of lists and dicts with one node replaced, doubled or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        if rng.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: forge(value[key], rng)}
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.95:
        place = rng.randrange(len(value))
        if rng.random() < 0.1:
            return [*value, value[place]]
        return [*value[:place], forge(value[place], rng), *value[place + 1 :]]
    return forge_tensor(value, rng) if isinstance(value, torch.Tensor) else rng.choice(HOSTILE)


def forge_tensor(tensor: torch.Tensor, rng: random.Random) -> Any:
    """Return another tensor, or none."""
    flat = tensor.clone().reshape(-1)
    if flat.numel():
        flat[rng.randrange(flat.numel())] = rng.choice([0, -1, 3, 100])
    return rng.choice(
        [
            flat.reshape(tensor.shape),
            flat.flip(0).reshape(tensor.shape),
            flat[:-1],
            flat[:1].expand(1 << 50),
            tensor.double() * float("nan"),
            tensor.float(),
            tensor.int(),
            tensor.unsqueeze(0),
            rng.choice(HOSTILE),
        ]
    )


# --- packed selections ------------------------------------------------------------------------


def blobs() -> Target:
    """Return the reader of packed selections, with valid ones of every mode and version."""
    generator, valid, bases_of = np.random.default_rng(0), [], {}
    for mode in ValueMode:
        tensors = [
            selected(size, columns, mode, generator)
            for size, columns in zip(SIZES, COLUMNS, strict=True)
        ]
        blob = read_blob(encode_entries(tensors, mode))
        if not len(blob.sections[1].data):
            raise RuntimeError("no tensor has a grid")
        lists = pack_indices([t.indices for t in tensors], SIZES)
        old = [*(squeeze(parts) for parts in lists), *blob.sections[-mode.num_planes :]]
        valid += [blob, replace(blob, version=1, sections=old)]
        bases_of[mode] = [t.base for t in tensors]

    def make(rng: random.Random) -> bytes:
        blob = rng.choice(valid)
        if rng.random() < 0.5:  # what is inside of the entropy stage
            sections, place = [*blob.sections], rng.randrange(len(blob.sections) - 1)
            raw = expand(sections[place], "part").tobytes()
            sections[place] = squeeze([mutate(raw, rng)])
            return assemble(replace(blob, sections=sections))
        out = bytearray(mutate(assemble(blob), rng))
        if rng.random() < 0.5 and len(out) > 44:
            out[32:40] = struct.pack("<Q", len(out))
            out[-4:] = struct.pack("<I", zlib.crc32(out[:-4]))
        return bytes(out)

    def check(data: bytes) -> None:
        tracemalloc.start()
        try:
            blob = read_blob(data)
            bases = bases_of[blob.mode]
            found = decode_entries(
                blob, SIZES, base_entries=lambda i, p: np.resize(bases[i], p.shape)
            )
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            if peak > BLOB_MEMORY:
                raise RuntimeError(f"{peak} bytes")
        check_whole(found, blob.mode)

    return Target(make, check, AdapterFileError)


def selected(
    size: int, columns: int, mode: ValueMode, generator: np.random.Generator
) -> SelectedEntries:
    """Return entries of a tensor, in some rows and columns of it where it has many."""
    chosen = generator.random(size) < 0.2
    if size == SIZES[-1]:
        row, column = np.divmod(np.arange(size), columns)
        chosen = (row % 13 < 3) & (column % 7 < 2) & (generator.random(size) < 0.8)
    indices = np.flatnonzero(chosen)
    values, base = (generator.normal(size=indices.size).astype("f4") for _ in range(2))
    if mode.dtype == np.uint16:
        values, base = ((v.view(np.uint32) >> 18).astype(np.uint16) for v in (values, base))
    return SelectedEntries(size, indices, values, base, columns)


def check_whole(found: list[SelectedEntries], mode: ValueMode) -> None:
    """Check what was decoded (RuntimeError)."""
    for size, entries in zip(SIZES, found, strict=True):
        if (np.diff(entries.indices, prepend=-1, append=size) < 1).any():
            raise RuntimeError("positions out of order or range")
        if entries.values.shape != entries.indices.shape:
            raise RuntimeError("values of another length")
        check_finite(entries.values, mode)


# --- an adapter's folder ----------------------------------------------------------------------


def saved_adapter(folder: Path) -> None:
    """Save a small adapter with both parts and a head."""
    options = {"budget": 0.5, "score": "random", "external_modules": ["second"]}
    config = SFAConfig(**options, target_modules=["first", "second"], modules_to_save=["head"])
    get_peft_model(MLP(), config).save_pretrained(folder)


def files(folder: Path) -> Target:
    """Return the reader of tensors' files."""
    saved_adapter(folder)
    path = folder / WEIGHTS_NAME
    sealed, tensors = path.read_bytes(), load_file(path)
    key = next(key for key in tensors if key.endswith("sfa_packed"))
    packed = tensors[key].numpy().tobytes()
    length = int.from_bytes(packed[32:40], "little")
    listed = json.loads(zlib.decompress(packed[length + 4 :]))

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate(sealed, rng)
        manifest = zlib.compress(json.dumps(forge(listed, rng)).encode())
        if rng.random() < 0.2:
            manifest = zlib.compress(b"[" + b"{}," * rng.choice([1, 10**6, 10**7]) + b"{}]")
        data = packed[:length] + zlib.crc32(manifest).to_bytes(4, "little") + manifest
        forged = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        save_file(tensors | {key: forged}, path)
        return mutate(path.read_bytes(), rng) if rng.random() < 0.3 else path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = read_adapter(path)
        if found.selection is None and any("sfa_packed" in key for key in found.tensors):
            raise RuntimeError("a selection that was not looked at")

    return Target(make, check, AdapterFileError)


def configs(folder: Path) -> Target:
    """Return the loader of adapters, fed with configs."""
    saved_adapter(folder)
    path = folder / "adapter_config.json"
    valid = path.read_bytes()

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate(valid, rng)
        fields = forge(json.loads(valid), rng)
        return json.dumps(forge(fields, rng) if rng.random() < 0.3 else fields).encode()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        model = PeftModel.from_pretrained(MLP(), folder)
        if not bool(torch.isfinite(model(torch.ones(1, 12))).all()):
            raise RuntimeError("outputs that are not finite")

    return Target(make, check, SFAError)


# --- checkpoints ------------------------------------------------------------------------------


def states(folder: Path) -> Target:
    """Return the reader of the selector's state, in the middle of a run."""
    config = SFAConfig(
        budget=0.3, rho=0, target_modules=["first"], selection_steps=2, select_until=1
    )
    model = get_peft_model(MLP(), config)
    selector = SFASelector(model, total_steps=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(5):
        model(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
    state, path = selector.state_dict(), folder / "checkpoint-5" / STATE_NAME
    path.parent.mkdir(parents=True)

    def written(content: Any) -> bytes:
        write_state(content, folder, 5)
        return (folder / "sfa_selector-5.pt").read_bytes()

    valid = written(state)

    def make(rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.6:
            return written(forge(state, rng))
        data = mutate(valid, rng)
        if kind < 0.9:  # with a right checksum
            body = mutate(valid[:-12], rng)
            data = body + b"SFASTATE" + zlib.crc32(body).to_bytes(4, "little")
        return data

    def check(data: bytes) -> None:
        path.write_bytes(data)
        selector.load_state_dict(read_state(path.parent, 5))
        pool = find_pool(model, "default")
        found = selector.state_dict()
        if not all(bool(torch.isfinite(t).all()) for t in (*found["sums"].values(), pool.values)):
            raise RuntimeError("sums or values that are not finite")
        if pool.slots[pool.slots >= 0].unique().numel() != pool.num_assigned:
            raise RuntimeError("positions that repeat")

    return Target(make, check, SelectionError)


# --- the loop ---------------------------------------------------------------------------------


def _late(*_args: Any) -> None:
    raise TimeoutError(f"more than {SECONDS:g} s")


def _peak() -> int:
    """Return the highest number of bytes that the process had in memory (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def is_accepted(target: Target, data: bytes) -> bool:
    """Feed one input to a reader.

    Returns:
        Whether it was taken for whole; False if it ended in the reader's error.

    Raises:
        Exception: Whatever else it ended in; TimeoutError and MemoryError past the limits.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the highest use so far is forgotten
    before = _peak()
    signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.check(data)
        accepted = True
    except target.error:
        accepted = False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if _peak() - before > MEMORY:
        raise MemoryError(f"{_peak() - before} bytes more")
    return accepted


def fuzz(targets: dict[str, Target], seconds: float, seed: int) -> int:
    """Feed inputs until the time is over or a reader breaks; return 1 if one did."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    counts = dict.fromkeys(targets, 0)
    accepted = dict.fromkeys(targets, 0)
    while time.monotonic() < end:
        name = rng.choice(list(targets))
        data = targets[name].make(rng)
        try:
            accepted[name] += is_accepted(targets[name], data)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}\n{data.hex()}")
            return 1
        counts[name] += 1
    for name, count in counts.items():
        print(f"{name}: {count:,} inputs, {accepted[name]:,} of them accepted as whole")
    print("none broke a reader")
    return 0


def main() -> int:
    """Run until the time is over; return 1 if an input broke a reader."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets = {
            "selections": blobs(),
            "files": files(folder / "files"),
            "configs": configs(folder / "configs"),
            "states": states(folder / "states"),
        }
        return fuzz(targets, args.seconds, args.seed)


if __name__ == "__main__":
    sys.exit(main())
