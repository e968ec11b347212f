# SPDX-License-Identifier: Apache-2.0
"""Bytes per changed weight in a saved selection, against the entropy and other formats.

Deltas made up for the purpose: positions at random, weights of standard deviation 0.02, changes
with a Laplace distribution. Under a minute on one core, numpy only::

    python benchmarks/file_size.py
    python benchmarks/file_size.py --densities 0.025 --change 1e-4 5e-4 2e-3

Index bits are to be held against H(p)/p, the entropy of random positions per position. The last
lines are what other formats take for a position and a 16-bit value, lossless.
"""

import argparse
import time
from math import log2

import numpy as np

from sfa_peft.files.container import SelectedEntries, decode_entries, encode_entries, read_blob
from sfa_peft.files.values import ValueMode, round_to_bfloat16

OTHERS = {
    "PEFT SHiRA: int64 position and fp32 value": 12,
    "int32 position and fp32 value": 8,
    "int32 position and bf16 value": 6,
    "16-bit column, row starts and bf16 value": 4,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[0.001, 0.01, 0.025, 0.05, 0.1, 0.2]
    )
    parser.add_argument("--change", type=float, nargs="+", default=[5e-4], help="Laplace scale.")
    parser.add_argument("--entries", type=int, default=1_000_000, help="Changed weights.")
    parser.add_argument("--tensors", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_delta(density: float, scale: float, args: argparse.Namespace):
    """Return (size, positions, base, change) of each tensor."""
    rng = np.random.default_rng(args.seed)
    size = round(args.entries / args.tensors / density)
    for _ in range(args.tensors):
        gaps = rng.geometric(density, int(2 * size * density) + 100)
        indices = np.cumsum(gaps) - 1
        indices = indices[indices < size]
        base = rng.normal(0, 0.02, indices.size).astype(np.float32)
        yield size, indices, base, rng.laplace(0, scale, indices.size).astype(np.float32)


def as_mode(delta, mode: ValueMode) -> list[SelectedEntries]:
    """Return the delta as entries of a mode: changes, or adapted weights against their base."""
    tensors = []
    for size, indices, base, change in delta:
        if mode is ValueMode.ULPS_BFLOAT16:
            start = round_to_bfloat16(base)
            adapted = round_to_bfloat16((start.astype(np.uint32) << 16).view(np.float32) + change)
            tensors.append(SelectedEntries(size, indices, adapted, start))
        else:
            tensors.append(SelectedEntries(size, indices, change))
    return tensors


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    args = parse()
    modes = [
        ValueMode.ULPS_BFLOAT16,
        ValueMode.FLOAT32,
        ValueMode.BFLOAT16,
        ValueMode.INT8,
    ]
    print(
        "| density | change | mode | index bits (entropy) | value bits | B/weight | enc, dec ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for density, scale in ((d, s) for d in args.densities for s in args.change):
        delta = list(make_delta(density, scale, args))
        for mode in modes:
            tensors = as_mode(delta, mode)
            bases, sizes = [t.base for t in tensors], [t.size for t in tensors]
            entries = sum(t.indices.size for t in tensors)
            p = entries / sum(sizes)
            entropy = (-p * log2(p) - (1 - p) * log2(1 - p)) / p
            blob = encode_entries(tensors, mode)
            read = read_blob(blob)
            index_bits = 8 * read.index_nbytes / entries
            value_bits = 8 * sum(read.section_nbytes) / entries - index_bits
            encode = seconds(lambda t=tensors, m=mode: encode_entries(t, m))
            decode = seconds(
                lambda b=blob, s=sizes, o=bases: decode_entries(
                    read_blob(b), s, base_entries=lambda ordinal, _: o[ordinal]
                )
            )
            print(
                f"| {density:.2%} | {scale:g} | {mode.name} | {index_bits:.2f} ({entropy:.2f}) "
                f"| {value_bits:.2f} | {len(blob) / entries:.2f} "
                f"| {1e3 * encode:.0f}, {1e3 * decode:.0f} |"
            )
    for name, nbytes in OTHERS.items():
        print(f"{nbytes:5.2f} B/weight  {name}")


if __name__ == "__main__":
    main()
