# SPDX-License-Identifier: Apache-2.0
"""Recipes: a command line in a file."""

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from sfa_peft import SFAError


def read_recipes(paths: Iterable[str | Path], known: set[str]) -> list[str]:
    """Return the options of several files as one command line: of two equal ones the last holds."""
    return [text for path in paths for text in read_recipe(path, known)]


def read_recipe(path: str | Path, known: set[str]) -> list[str]:
    """Return the options of a recipe file as a command line.

    Args:
        path: A yaml or json file that maps names of options to values; null leaves what
            holds without it.
        known: Names of options.

    Raises:
        SFAError: If the file cannot be read, holds something else, or names an unknown option.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # json is yaml
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SFAError(f"--recipe {path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SFAError(f"--recipe {path}: expected `option: value` lines, got {content!r:.60}")
    if unknown := {str(name) for name in content} - known:
        raise SFAError(
            f"--recipe {path}: unknown options {sorted(unknown)}; known are {sorted(known)}"
        )
    options: list[str] = []
    for name, value in content.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            texts = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
            options += [f"--{name}", *texts]
    return options
