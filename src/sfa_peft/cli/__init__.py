# SPDX-License-Identifier: Apache-2.0
"""The command `sfa-peft`. It holds no logic: each command calls the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.utils import logging

from ..errors import SFAError
from .commands import COMMANDS
from .parser import PROGRAM, Parser, did_you_mean, overview


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    0: done. 1: an error of files, models or data, one line on stderr. 2: a command line that
    cannot be read.

    Args:
        argv: Words of the command line; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview(COMMANDS) + "\n")
        return 0
    name, rest = words[0], words[1:]
    command = COMMANDS.get(name)
    if command is None:
        known = did_you_mean(name, COMMANDS)
        sys.stderr.write(
            f"{PROGRAM}: error: unknown command {name}{known} (see {PROGRAM} --help)\n"
        )
        return 2
    try:
        args = Parser(name, command).parse(rest, passes=command.passes)
        with _quiet():
            content, text = command.run(args)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except SFAError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"{PROGRAM} {name}: error: {line}\n")
        return 1
    shown = json.dumps(content, indent=2, default=str) if args.json else text
    if shown:
        sys.stdout.write(f"{shown}\n")
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars of weights that are loaded, and from remarks."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
