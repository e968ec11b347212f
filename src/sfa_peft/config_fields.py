# SPDX-License-Identifier: Apache-2.0
"""Fields of a config that say beside their help text what they may hold, and are checked by it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Check:
    """What a field may hold.

    Attributes:
        accepts: Whether a value is allowed.
        expected: What is, for the error.
        advice: What to do instead, for the error; `{value!r}` stands for what was given.
    """

    accepts: Callable[[Any], bool]
    expected: str
    advice: str = ""


def option(
    default: Any, text: str, *checks: Check, convert: Callable[[Any], Any] | None = None
) -> Any:
    """Return a dataclass field with a help text and its checks.

    Args:
        default: Its default; a default of None is allowed whatever the checks say.
        text: What it means, in a line.
        checks: What a value must pass, in this order.
        convert: Applied to a value that has passed.
    """
    return field(default=default, metadata={"help": text, "checks": checks, "convert": convert})


def choice(default: str, choices: Collection[str], text: str) -> Any:
    """Return the field of a choice."""
    allowed, listed = tuple(choices), ", ".join(choices)
    return option(default, f"{text}: {listed}.", Check(allowed.__contains__, f"one of {listed}"))


def patterns(text: str) -> Any:
    """Return the field of names that end in one of some words, or match a regular expression."""
    expected = "a list of names, one regular expression or None"
    check = Check(lambda v: isinstance(v, str) or _is_names(v), expected)
    return option(None, text, check, convert=_as_set)


def names(text: str, word: str) -> Any:
    """Return the field of names without regular expressions, or of one word, kept as `[word]`."""
    expected = f'a list of names, "{word}" or None'
    no_text = Check(lambda v: not isinstance(v, str) or v == word, expected, "Write [{value!r}].")
    are_names = Check(lambda v: v == word or _is_names(v), expected)
    return option(None, text, no_text, are_names, convert=_as_list)


def saved(text: str) -> Any:
    """Return the field of a saved adapter."""
    expected = "a saved adapter's folder or Hub id, or None"
    check = Check(lambda v: isinstance(v, (str, os.PathLike)), expected)
    return option(None, text, check, convert=os.fspath)


def steps(text: str) -> Any:
    """Return the field of a number of update steps."""
    advice = "None lets the run decide."
    return option(None, text, whole("a number of update steps of at least 1", 1, advice))


def check_fields(config: Any) -> None:
    """Check all fields of a dataclass made of options, and convert them.

    Raises:
        ConfigError: Naming the first field whose value is refused.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None and f.default is None:
            continue
        _check(config, f, value)
        convert = f.metadata.get("convert")
        if convert is not None:
            setattr(config, f.name, convert(value))


def _check(config: Any, f: Field, value: Any) -> None:
    for check in f.metadata.get("checks", ()):
        if not check.accepts(value):
            text = f"expected {check.expected}, got {value!r}. {check.advice.format(value=value)}"
            raise ConfigError(f"{type(config).__name__}.{f.name}: {text.rstrip()}")


def number(expected: str, accepts: Callable[[float], bool], advice: str = "") -> Check:
    """Return the check of a finite number."""
    return Check(lambda v: _is_number(v) and accepts(v), expected, advice)


def whole(expected: str, least: float = -math.inf, advice: str = "") -> Check:
    """Return the check of an integer."""
    return Check(lambda v: isinstance(v, int) and _is_number(v) and v >= least, expected, advice)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    is_list = isinstance(value, (list, tuple, set, frozenset))
    return is_list and all(isinstance(name, str) for name in value)


def _as_set(value: Any) -> Any:
    return value if isinstance(value, str) else set(value)


def _as_list(value: Collection[str]) -> list[str]:
    if isinstance(value, str):
        return [value]
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
