# SPDX-License-Identifier: Apache-2.0
"""Run a program with SFA registered: `python -m sfa_peft program.py` or `... -m module`.

For programs that load adapters and cannot be edited to say `import sfa_peft`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_USAGE = """usage: python -m sfa_peft program.py [arguments]
       python -m sfa_peft -m module [arguments]

Runs a Python program as `python` does, after `import sfa_peft`: PEFT then knows the adapters."""


def main(arguments: list[str]) -> None:
    """Run the program or module that the arguments name.

    Raises:
        SystemExit: With the usage, if they name none.
    """
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(_USAGE)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    program = Path(arguments[0])
    if not program.is_file():
        sys.exit(f"python -m sfa_peft: there is no program {str(program)!r}.\n\n{_USAGE}")
    sys.argv = arguments
    sys.path[0] = str(program.resolve().parent)  # as `python program.py` has it
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
