# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from sfa_peft import ConfigError, SFAConfig
from sfa_peft.config_fields import (
    check_fields,
    choice,
    names,
    number,
    option,
    patterns,
    saved,
    steps,
    whole,
)

LENGTH = "a number of update steps of at least 1"


@dataclass
class Knobs:
    share: float = option(0.5, "A share.", number("a share, 0 to 1", lambda v: 0 <= v <= 1, "Try."))
    count: int = option(1, "A count.", whole("a count of at least 1", 1))
    colour: str = choice("red", ("red", "blue"), "What it looks like")
    where: object = patterns("Where.")
    what: object = names("What.", "all")
    source: object = saved("Whence.")
    length: object = steps("How long.")
    free: object = option("anything", "Not checked.")

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("share", -0.1, "a share, 0 to 1, got -0.1. Try."),
        ("share", float("nan"), "a share, 0 to 1, got nan. Try."),
        ("share", True, "a share, 0 to 1, got True. Try."),
        ("share", None, "a share, 0 to 1, got None. Try."),
        ("share", 10**400, f"a share, 0 to 1, got {10**400}. Try."),
        ("count", 0, "a count of at least 1, got 0."),
        ("count", 1.0, "a count of at least 1, got 1.0."),
        ("colour", ["red"], "one of red, blue, got ['red']."),
        ("where", 3, "a list of names, one regular expression or None, got 3."),
        ("where", ["a", 3], "a list of names, one regular expression or None, got ['a', 3]."),
        ("what", "head", "a list of names, \"all\" or None, got 'head'. Write ['head']."),
        ("what", 3, 'a list of names, "all" or None, got 3.'),
        ("source", 3, "a saved adapter's folder or Hub id, or None, got 3."),
        ("length", 0, f"{LENGTH}, got 0. None lets the run decide."),
    ],
)
def test_a_refused_value_is_told_with_its_field_and_what_is_expected(field, value, expected):
    with pytest.raises(ConfigError) as error:
        Knobs(**{field: value})
    assert str(error.value) == f"Knobs.{field}: expected {expected}"


def test_values_that_pass_are_converted():
    knobs = Knobs(
        share=1, where=("b", "a"), what={"z", "y"}, source=Path("out") / "x", length=3, free=None
    )
    assert knobs.where == {"a", "b"}
    assert knobs.what == ["y", "z"]
    assert knobs.source == str(Path("out") / "x")
    assert (knobs.share, knobs.length, knobs.free) == (1, 3, None)
    assert Knobs(where="a|b", what=None).where == "a|b"
    assert Knobs(what="all").what == ["all"]
    given = ["b", "a"]
    assert Knobs(what=given).what == given
    assert Knobs(what=given).what is not given  # PEFT appends to it


def test_every_field_of_the_config_has_a_help_text():
    own = [f for f in fields(SFAConfig) if f.name in SFAConfig.__annotations__]
    assert len(own) > 20
    for f in own:
        assert f.metadata["help"].endswith((".", "]."))


def test_the_default_of_every_field_passes_its_own_checks():
    for f in fields(SFAConfig):
        for check in f.metadata.get("checks", ()):
            assert f.default is None or check.accepts(f.default)
