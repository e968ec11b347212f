# SPDX-License-Identifier: Apache-2.0
"""Warnings: one type for each kind, and the line of the user's code that led to it."""

import inspect
import warnings

import pytest

import sfa_peft
from sfa_peft import MergeWarning, SFAWarning, errors
from sfa_peft.errors import warn

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, Warning) and kind is not SFAWarning
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_warning_is_public_and_can_be_filtered_alone(kind):
    assert getattr(sfa_peft, kind.__name__) is kind
    assert issubclass(kind, SFAWarning)
    assert kind.__doc__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", kind)
        for other in KINDS:
            warn("anything", other)
    assert {w.category for w in caught} == {k for k in KINDS if not issubclass(k, kind)}


@pytest.mark.parametrize("module", ["sfa_peft.tuner.model", "peft.mapping", "torch.nn", "__main__"])
def test_a_warning_names_the_first_line_outside_the_packages_in_between(module):
    place = {"__name__": module, "warn": warn, "kind": MergeWarning}
    exec(compile("def call():\n    warn('said', kind)", "between.py", "exec"), place)
    with pytest.warns(MergeWarning, match="said") as caught:
        place["call"]()
    (found,) = caught
    assert found.filename == ("between.py" if module == "__main__" else __file__)


def test_a_warning_comes_once_from_one_line_by_default():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("once", MergeWarning)
    assert len(caught) == 1
