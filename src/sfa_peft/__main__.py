# SPDX-License-Identifier: Apache-2.0
"""Run a program with SFA registered: `python -m sfa_peft program.py` or `... -m module`.

For programs that load adapters and cannot be edited to say `import sfa_peft`.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import zipfile
from pathlib import Path

_USAGE = """usage: python -m sfa_peft program.py [arguments]
       python -m sfa_peft -m module [arguments]

Runs a Python program as `python` does, after `import sfa_peft`: PEFT then knows the adapters. It
may be a folder or a zip file with a __main__.py. Processes that it spawns do not know them."""


def main(arguments: list[str]) -> None:
    """Run the program or module that the arguments name.

    Raises:
        SystemExit: With the usage, if they name none.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"{_USAGE}\n")
        return
    if not arguments or arguments == ["-m"]:
        sys.exit(_USAGE)
    if arguments[0] == "-m":
        _run_module(arguments[1:])
        return
    program = Path(arguments[0])
    if not program.exists():
        sys.exit(f"python -m sfa_peft: there is no program {str(program)!r}.\n\n{_USAGE}")
    holds_main = program.is_dir() or zipfile.is_zipfile(program)
    if program.is_dir() and not (program / "__main__.py").is_file():
        sys.exit(f"python -m sfa_peft: there is no __main__.py in {str(program)!r}.")
    sys.argv = arguments
    # As `python program` has it.
    sys.path[0] = str(program.resolve() if holds_main else program.resolve().parent)
    runpy.run_path(str(program), run_name="__main__")


def _run_module(arguments: list[str]) -> None:
    name = arguments[0]
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:  # a package
            found = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:  # raised for what is around it, such as `a` of a.b
        sys.exit(f"python -m sfa_peft: module {name!r} cannot be run: {error}")
    if found is None:
        sys.exit(f"python -m sfa_peft: there is no module {name!r}, or it has no __main__.")
    sys.argv = arguments
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
