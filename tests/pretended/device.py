# SPDX-License-Identifier: Apache-2.0
"""The pretended device: built once, loaded into this process, and its reports by line of ours.

`device.cpp` says what it is. A process that has it is not like others (torch takes it for the
machine's accelerator), so its tests run in one of their own: `make pretended`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

import sfa_peft

NAME = "pretended"
SOURCE = Path(__file__).with_name("device.cpp")
BUILDS = Path(__file__).resolve().parents[2] / "out" / "pretended"
OURS = str(Path(sfa_peft.__file__).parent) + os.sep
FLAGS = ("-std=c++20", "-O0", "-g0", "-w", "-fPIC", "-shared", "-DAT_PER_OPERATOR_HEADERS")


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> Path:
    """Compile `device.cpp`, unless it is; return the library."""
    text = SOURCE.read_bytes() + f"{torch.__version__} {FLAGS} {compiler()}".encode()
    library = BUILDS / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{path}" for path in cpp_extension.include_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        linked = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        command = [str(compiler()), *FLAGS, abi, *headers, str(SOURCE), *linked, "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(library)
    return library


@dataclass
class Report:
    """What happened on the devices.

    Attributes:
        waits: How often the host waited, by (what for, line of ours; "" where it is none of ours).
        kernels: How many kernels were started, by the same.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)

    def own(self, found: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
        """Those for which a line of ours asked."""
        return Counter({key: count for key, count in found.items() if key[1]})

    @property
    def own_waits(self) -> Counter[tuple[str, str]]:
        """Waits for which a line of ours asked."""
        return self.own(self.waits)

    @property
    def own_kernels(self) -> int:
        """Number of kernels that a line of ours started."""
        return self.own(self.kernels).total()


def _asking() -> str:
    """Return the innermost line of ours that led here, "" if there is none."""
    frame: Any = sys._getframe(1).f_back  # none above it in a thread of autograd
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{name[len(OURS) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Device:
    """The loaded library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("in_use", "most"):
            getattr(self._library, f"pretended_{name}").restype = ctypes.c_int64
        self._kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
        self._library.pretended_start()
        self._register()

    def _register(self) -> None:
        """Make torch know the device by its name."""
        torch.utils.rename_privateuse1_backend(NAME)
        module: Any = types.ModuleType(f"torch.{NAME}")
        module.is_available = module.is_initialized = lambda: True
        module.device_count = lambda: 2
        module.current_device = self._library.pretended_current
        module.set_device = lambda device: self._library.pretended_set_current(_index(device))
        module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
        module._is_in_bad_fork = lambda: False
        module._lazy_init = lambda: None
        module.manual_seed = module.manual_seed_all = lambda seed: None
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: None
        module.synchronize = lambda device=None: None
        torch._register_device_module(NAME, module)
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

    @contextmanager
    def watched(self) -> Iterator[Report]:
        """Report what happens meanwhile."""
        report = Report()
        counters = {"wait": report.waits, "kernel": report.kernels}

        def listen(kind: bytes, what: bytes) -> None:
            counters[kind.decode()][what.decode(), _asking()] += 1

        kept = self._kind(listen)
        self._library.pretended_listen(kept)
        try:
            yield report
        finally:
            self._library.pretended_listen(None)

    def in_use(self, index: int) -> int:
        """Return the bytes that tensors have on a device."""
        return self._library.pretended_in_use(index)

    @contextmanager
    def peak(self, index: int) -> Iterator[list[int]]:
        """Measure by how many bytes a device's memory rises meanwhile: the list's one number."""
        found: list[int] = []
        before = self.in_use(index)
        self._library.pretended_reset_most(index)
        yield found
        found.append(self._library.pretended_most(index) - before)


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0
