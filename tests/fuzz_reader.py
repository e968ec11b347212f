# SPDX-License-Identifier: Apache-2.0
"""Feed damaged and forged files to the readers of adapters, for as long as you like.

    python tests/fuzz_reader.py --seconds 600

Each input must end in `AdapterFileError` or in something whole: positions increasing and in range,
values finite, memory in proportion. Forged inputs have a right checksum, so that what lies behind
it is reached. Whatever fails is printed as hex and belongs into `tests/files`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from sfa_peft.errors import AdapterFileError
from sfa_peft.files.container import SelectedEntries, decode_entries, encode_entries, read_blob
from sfa_peft.files.record import Resolved, SavedLayer, SavedTensor, read_resolved
from sfa_peft.files.values import ValueMode, check_finite

SIZES = [300, 1, 64, 5000]
MEMORY_LIMIT = 8 << 20  # bytes: many times what the sizes above take


def make_blobs() -> list[tuple[bytes, list[np.ndarray]]]:
    """Return a valid blob of every mode, with the base entries it was written against."""
    rng = np.random.default_rng(0)
    blobs = []
    for mode in ValueMode:
        tensors, bases = [], []
        for size in SIZES:
            indices = np.flatnonzero(rng.random(size) < 0.2)
            values, base = (rng.normal(size=indices.size).astype(np.float32) for _ in range(2))
            if mode.dtype == np.uint16:
                values, base = ((v.view(np.uint32) >> 18).astype(np.uint16) for v in (values, base))
            tensors.append(SelectedEntries(size, indices, values, base))
            bases.append(base)
        blobs.append((encode_entries(tensors, mode), bases))
    return blobs


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage bytes in one to four places; repair the checksum half of the time."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place:place] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del out[place : place + rng.randint(1, 9)]
        elif kind == 3:
            out[place : place + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, b"\x01" + b"\x00" * 7])
        else:
            out[place : place + 4] = rng.randbytes(4)
    if rng.random() < 0.5 and len(out) > 4:
        out[32:40] = len(out).to_bytes(8, "little")
        out[-4:] = zlib.crc32(out[:-4]).to_bytes(4, "little")
    return bytes(out)


def check_blob(data: bytes, bases: list[np.ndarray]) -> bool:
    """Decode; return whether it was accepted, after checking that the result is whole."""
    try:
        blob = read_blob(data)
        found = decode_entries(blob, SIZES, base_entries=lambda i, p: np.resize(bases[i], p.shape))
    except AdapterFileError:
        return False
    for size, entries in zip(SIZES, found, strict=True):
        indices = entries.indices
        if indices.size and (indices[0] < 0 or indices[-1] >= size or np.any(np.diff(indices) < 1)):
            raise RuntimeError("positions out of order or range")
        if entries.values.shape != indices.shape:
            raise RuntimeError("values of another length")
        check_finite(entries.values, blob.mode)
    return True


RESOLVED = Resolved(
    total=100,
    allowed=20,
    adapter_dim=2,
    internal=5,
    layers={"a": SavedLayer(2, "mlp_out", 0, 0)},
    tensors=(SavedTensor("a.weight", (3, 4), "float32", {"float32": "ab"}),),
    packed=9,
).to_dict()


def check_json(data: bytes) -> bool:
    """Read a damaged `resolved`."""
    try:
        value = json.loads(data)
    except ValueError:
        return False
    try:
        read_resolved(value)
    except AdapterFileError:
        return False
    return True


def main() -> int:
    """Run until the time is over; return 1 if an input broke a reader."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    args = parser.parse_args()
    rng, blobs = random.Random(args.seed), make_blobs()
    text = json.dumps(RESOLVED).encode()
    end, count, accepted = time.monotonic() + args.seconds, 0, 0
    tracemalloc.start()
    while time.monotonic() < end:
        blob, bases = rng.choice(blobs)
        data = mutate(text if count % 4 == 0 else blob, rng)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            accepted += check_json(data) if count % 4 == 0 else check_blob(data, bases)
            if tracemalloc.get_traced_memory()[1] - before > MEMORY_LIMIT:
                raise RuntimeError("too much memory")
        except Exception as error:
            print(f"{type(error).__name__}: {error}\n{data.hex()}")
            return 1
        count += 1
    print(f"{count:,} inputs, {accepted:,} of them accepted as whole, none broke a reader")
    return 0


if __name__ == "__main__":
    sys.exit(main())
