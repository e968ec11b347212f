# SPDX-License-Identifier: Apache-2.0
"""Bytes per changed weight of adapters that were really trained.

Trains the small SwinV2 of the examples on rendered scenes, selected weights only, once for each
share of them, saves the adapter and looks into its file. The 16-bit rows store the same changes on
the same backbone rounded to bfloat16::

    python benchmarks/trained_size.py

Entropy is that of positions drawn at random with the tensors' own densities: what an index costs
at least if training had no favourites inside a tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from math import log2
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from peft import PeftModel, get_peft_model
from semantic_segmentation import Arguments, build_model
from torch.utils.data import DataLoader

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.dense import CLASS_NAMES, SceneDataset
from sfa_peft.files.container import read_blob
from sfa_peft.files.packing import Entries, pack
from sfa_peft.sparse.pool import Pool
from sfa_peft.tuner.adapted_layers import find_pool

#: Bars at a share of selected weights from: bytes per changed weight, by type of the base.
BARS = {"bfloat16": ((0.05, 0.85), (0.0, 1.7)), "float32": ((0.0, 3.1),)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2])
    parser.add_argument("--steps", type=int, default=200, help="update steps (default: 200)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output", default="out/trained_size.json", help="where the figures go")
    return parser.parse_args()


def train(share: float, args: argparse.Namespace, *, rho: float = 0.0) -> PeftModel:
    """Return a model that trained this share of the backbone, `rho` of it external adapters."""
    base = build_model(Arguments(seed=0), len(CLASS_NAMES))
    config = SFAConfig(budget=share, rho=rho, modules_to_save=["decode_head"])
    model = get_peft_model(base, config).train()
    selector = SFASelector(model, total_steps=args.steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    scenes = SceneDataset(args.steps * args.batch_size, seed=1)
    for step, batch in enumerate(DataLoader(scenes, args.batch_size)):
        model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        rates.step()
        optimizer.zero_grad()
        print(f"\rshare {share:.1%}: step {step + 1}/{args.steps}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return model.eval()


def entropy(pool: Pool) -> float:
    """Return bits per index of random positions at each tensor's own density."""
    bits = 0.0
    for ordinal in range(len(pool.weights)):
        size, count = pool.weights[ordinal].tensor.numel(), pool.count(ordinal)
        for part in (count, size - count):
            bits -= part * log2(part / size) if part else 0.0
    return bits / pool.num_assigned


def packed_as(pool: Pool, dtype: torch.dtype) -> bytes:
    """Return the packed selection on the backbone in a type."""
    entries = []
    for ordinal, spans in enumerate(pool.layout()):
        weight = pool.weights[ordinal].pretrained().to(dtype)
        columns = weight.shape[-1] if weight.ndim == 2 else 0
        weight = weight.reshape(-1)
        indices, order = pool.indices(ordinal).sort()
        parts = [pool.values.detach()[a:b] for a, b in spans]
        change = torch.cat(parts)[order] if parts else pool.values.detach()[:0]
        entries.append(Entries(weight.numel(), indices, change, weight[indices], columns))
    return pack(entries).numpy().tobytes()


def rows_of(share: float, model: PeftModel) -> list[dict[str, Any]]:
    """Return a row for each type of the base."""
    pool = find_pool(model, "default")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        total = (Path(folder) / "adapter_model.safetensors").stat().st_size
    rows = []
    for name in ("float32", "bfloat16"):
        blob = packed_as(pool, getattr(torch, name))
        index = 8 * read_blob(blob).index_nbytes / pool.num_assigned
        size = len(blob) / pool.num_assigned
        bar = next(b for least, b in BARS[name] if share >= least)
        rows.append(
            {
                "share": share,
                "base": name,
                "changed": pool.num_assigned,
                "index_bits": index,
                "entropy_bits": entropy(pool),
                "value_bits": 8 * size - index,
                "bytes": size,
                "bar": bar,
                "file": total if name == "float32" else None,
            }
        )
    return rows


def main() -> None:
    args = parse()
    rows = [row for share in args.shares for row in rows_of(share, train(share, args))]
    print(f"$ python {' '.join(['benchmarks/trained_size.py', *sys.argv[1:]])}")
    print(
        "share   base      changed  index bits  entropy  value bits  bytes/weight  bar  file bytes"
    )
    for r in rows:
        verdict = "ok" if r["bytes"] <= r["bar"] else "FAIL"
        print(
            f"{r['share']:6.1%}  {r['base']:<8} {r['changed']:>9,}  {r['index_bits']:10.2f}  "
            f"{r['entropy_bits']:7.2f}  {r['value_bits']:10.2f}  {r['bytes']:12.3f}  "
            f"{r['bar']} {verdict:<5} {r['file'] or ''}"
        )
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
