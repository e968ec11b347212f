# SPDX-License-Identifier: Apache-2.0
"""Command lines: one line for an error, a suggestion for a slip, options in groups."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

PROGRAM = "sfa-peft"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        group: Heading that it stands under in the help.
        usage: What follows its name, as the help shows it.
        help: What it does, a few words.
        add: Adds its arguments to a parser.
        run: Does it; returns what `--json` prints, and what people read.
        passes: Whether options that it does not know are handed on to it, in `args.others`.
    """

    group: str
    usage: str
    help: str
    add: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], tuple[Any, str]]
    passes: bool = False


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends with one line, and knows what may have been meant."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(
            f"{PROGRAM} {name}",
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(self)
        self.add_argument("--json", action="store_true", help="Print json, for programs.")

    def parse(self, argv: Sequence[str], *, passes: bool) -> argparse.Namespace:
        """Return the arguments; unknown ones are an error, or are in `others`."""
        args, unknown = self.parse_known_args(argv)
        args.others = unknown
        if unknown and not passes:
            names = [option for action in self._actions for option in action.option_strings]
            self.error("; ".join(f"unknown {_kind(u)}{did_you_mean(u, names)}" for u in unknown))
        return args

    def error(self, message: str) -> NoReturn:
        """End with one line and status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return a suggestion to put behind the name of something unknown; "" if nothing is close."""
    close = get_close_matches(text.split("=")[0], list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def overview(commands: dict[str, Command]) -> str:
    """Return the help of all commands, by group."""
    lines = [f"usage: {PROGRAM} COMMAND ...", ""]
    width = max(len(f"{name} {c.usage}") for name, c in commands.items()) + 2
    for group in dict.fromkeys(command.group for command in commands.values()):
        lines.append(group)
        lines += [
            f"  {f'{name} {c.usage}':<{width}}{c.help}"
            for name, c in commands.items()
            if c.group == group
        ]
        lines.append("")
    lines.append(f"`{PROGRAM} COMMAND --help` lists its options; every command has --json.")
    return "\n".join(lines)


def _kind(text: str) -> str:
    return f"{'option' if text.startswith('-') else 'argument'} {text}"
