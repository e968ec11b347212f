# SPDX-License-Identifier: Apache-2.0
"""Errors of the library name options of the scripts."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields

import pytest

from sfa_peft.dense import load_dense

# Arguments of `load_dense` that the scripts give by themselves, so no error of theirs names one.
OWN = {"task", "name_or_dir", "holdout", "config_name", "cache_dir"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no class names; pass classes= or add", "no class names; pass --classes or add"),
        ("it looks like dataset_format='coco'", "it looks like --dataset_format coco"),
        ("on_error='skip' leaves them out", "--on_error skip leaves them out"),
        ("not labelled (ignore_index=), and", "not labelled (--ignore_index), and"),
        ("no column a; pass label_column=", "no column a; pass --label_column_name"),
        ("num_shifts=3: expected 2", "--test_shifts 3: expected 2"),
        ("or pass keep_unlabelled=True", "or pass --on_error skip"),
        ("split='test': there is none", "--split test: there is none"),
        ("size=3 and subsplit='x' stay", "size=3 and subsplit='x' stay"),
    ],
)
def test_arguments_become_options(message: str, expected: str) -> None:
    assert importlib.import_module("common.wording").as_typed(message) == expected


def test_every_argument_of_the_loader_has_its_option() -> None:
    wording = importlib.import_module("common.wording")
    arguments = importlib.import_module("common.arguments")
    depth = importlib.import_module("depth_estimation")
    options = {
        f"--{f.name}" for kind in (arguments.SharedArguments, depth.Arguments) for f in fields(kind)
    }

    assert set(inspect.signature(load_dense).parameters) - OWN <= set(wording.OPTIONS)
    assert {option.split()[0] for option in wording.OPTIONS.values()} <= options
