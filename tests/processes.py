# SPDX-License-Identifier: Apache-2.0
"""Processes of their own for tests, forked from one that has imported PEFT and nothing of ours.

PEFT, with torch and transformers, takes seconds to import: as long as most of what is then tested.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from tests.house import lines

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["peft", "accelerate"])
Ended = subprocess.CompletedProcess[str]


def start(
    work: Callable[..., object],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a function of a module in a process of its own.

    Args:
        work: The function; it and its arguments are pickled.
        *arguments: Its arguments.
        environment: Variables beside those of this process.
    """
    variables = os.environ | (environment or {})
    process = _FORKED.Process(target=_work, args=(variables, pickle.dumps((work, arguments))))
    process.start()
    return process


def run_ranks(
    work: Callable[..., object], *arguments: Any, world: int = 2, seconds: float = 600
) -> None:
    """Call a function with the rank before its arguments in as many processes, and wait for them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: One of them failed.
        TimeoutError: They did not end in time.
    """
    ranks = start_processes(
        _work_as_rank,
        (dict(os.environ), pickle.dumps((work, arguments))),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    until = time.monotonic() + seconds
    while not ranks.join(timeout=5):
        if time.monotonic() > until:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} did not end in {seconds} s on {world} ranks")


def run_code(code: str, *arguments: object, cwd: Path | None = None) -> Ended:
    """Do what `python -c CODE ARGUMENTS` does; return its exit code, output and errors."""
    (ended,) = _run([{}], _execute, code, arguments, cwd)
    return ended


def run_module(name: str, *arguments: object, cwd: Path | None = None) -> Ended:
    """Do what `python -m NAME ARGUMENTS` does; return its exit code, output and errors."""
    (ended,) = _run([{}], _execute_module, name, arguments, cwd)
    return ended


def run_script_on_ranks(
    path: Path, *arguments: object, world: int = 2, cwd: Path | None = None
) -> list[Ended]:
    """Do what `torchrun --nproc_per_node WORLD PATH ARGUMENTS` does, but for its launcher."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return _run(places, _execute_script, str(path), arguments, cwd)


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(
    environments: list[dict[str, str]],
    execute: Callable[[str, list[str]], None],
    what: str,
    arguments: tuple[object, ...],
    cwd: Path | None,
) -> list[Ended]:
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            (Path(folder, f"{i}.out"), Path(folder, f"{i}.err")) for i in range(len(environments))
        ]
        processes = [
            start(_program, execute, what, words, cwd, pair, environment=environment)
            for pair, environment in zip(pairs, environments, strict=True)
        ]
        codes = [_exit_code(process) for process in processes]
        texts = [[file.read_text("utf-8", errors="replace") for file in pair] for pair in pairs]
    return [
        subprocess.CompletedProcess([what, *words], code, *text)
        for code, text in zip(codes, texts, strict=True)
    ]


def _exit_code(process: BaseProcess, seconds: float = 300) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a program did not end in {seconds} s")
    return process.exitcode


def _work(environment: dict[str, str], pickled: bytes, *first: object) -> None:
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    lines.begin()
    work, arguments = pickle.loads(pickled)  # not before: it may import the package
    try:
        work(*first, *arguments)
    finally:
        lines.write()


def _work_as_rank(rank: int, environment: dict[str, str], pickled: bytes) -> None:
    _work(environment, pickled, rank)


def _program(execute, what: str, words: list[str], cwd: Path | None, files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), number)
    if cwd is not None:
        os.chdir(cwd)
    execute(what, words)


def _execute(code: str, words: list[str]) -> None:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["-c", *words]
    sys.path.insert(0, "")
    exec(compile(code, "<string>", "exec"), main.__dict__)


def _execute_module(name: str, words: list[str]) -> None:
    sys.argv = ["-m", *words]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _execute_script(path: str, words: list[str]) -> None:
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
