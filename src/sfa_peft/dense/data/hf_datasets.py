# SPDX-License-Identifier: Apache-2.0
"""Rows of the ``datasets`` library, from the Hub or a folder, by split and undecoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfa_peft.errors import SFAError

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def library_rows(
    name_or_dir: str | Path, config_name: str | None, cache_dir: str | Path | None
) -> dict[str, Any]:
    """Load a dataset by the ``datasets`` library, by split, nothing decoded.

    Args:
        name_or_dir: Folder with parquet files or ``<split>/metadata.*``, or a Hub dataset's name.
        config_name: Configuration of a Hub dataset.
        cache_dir: Where ``datasets`` keeps its Arrow files.

    Returns:
        A ``datasets.Dataset`` by split; ``train``, ``validation`` and ``test`` are called so.
    """
    from datasets import load_dataset

    folder, cache = Path(name_or_dir), None if cache_dir is None else str(cache_dir)
    if not folder.is_dir():
        loaded = load_dataset(str(name_or_dir), config_name, cache_dir=cache)
    elif any(folder.rglob("*.parquet")):
        loaded = load_dataset("parquet", data_files=_parquet_files(folder), cache_dir=cache)
    elif any(folder.rglob("metadata.*")):
        loaded = load_dataset("imagefolder", data_dir=str(folder), cache_dir=cache)
    else:
        raise SFAError(
            f"`{folder}`: no known layout; expected <split>/ beside <split>annot/, parquet files, "
            "or <split>/metadata.jsonl"
        )
    return {split_of(str(name)) or str(name): rows for name, rows in loaded.items()}


def undecoded(rows: Any, *columns: str) -> Any:
    """Return a dataset whose image columns are left to us to decode."""
    from datasets import Image as ImageFeature

    # Decoding is ours: the library's errors do not name the file.
    for column in columns:
        rows = rows.cast_column(column, ImageFeature(decode=False))
    return rows


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        # The folder's own name says nothing: only what lies in it.
        within = path.relative_to(folder)
        split = next(filter(None, (split_of(part) for part in reversed(within.parts))), None)
        if split is None:
            raise SFAError(f"`{path}`: neither the file nor its folder is named after a split")
        files.setdefault(split, []).append(str(path))
    return files


def pick_column(there: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    """Return the wanted column, or the first of the usual ones; raises SFAError if not there."""
    for name in usual if wanted is None else (wanted,):
        if name in there:
            return name
    looked_for = usual if wanted is None else wanted
    raise SFAError(f"no column {looked_for} among {sorted(there)}; pass {what}=")


def split_of(name: str) -> str | None:
    """Return which of train, validation and test a file or folder is named after, if any."""
    # "train-00000-of-00002", "train_1", "val" and "validation" all begin with the word looked for.
    word = re.match(r"[a-z]*", name.lower())
    return _SPLIT_WORDS.get(word.group()) if word else None
