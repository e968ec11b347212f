# SPDX-License-Identifier: Apache-2.0
"""When weights may be written, and that those of many layers are written together.

Under one lock and on all cores: writing selected entries waits for memory, and torch writes
scattered entries on one core. And never where the write would become part of a recording.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_C: Any = torch._C  # without types
#: One lock for all weights: they are written rarely, and a lock of its own cannot be copied.
_LOCK = threading.RLock()
#: Layers with fewer weights than this together are not worth a second thread.
_WORTH_THREADS = 1 << 20
#: More threads than this share memory that is no faster.
_MOST_THREADS = 8

_Action = Callable[[], None]
_Layer = TypeVar("_Layer")


class _OfThread(threading.local):
    deferred: dict[object, tuple[int, _Action]] | None = None
    is_helper = False  # the thread that waits for this one holds the lock


_STATE = _OfThread()


@contextmanager
def exclusively() -> Iterator[None]:
    """Let no other thread write weights meanwhile, but for those that help with one switch.

    What is written meanwhile does not become a part of what torch.jit.trace records.
    """
    traced = _C._get_tracing_state()
    if _STATE.is_helper:
        yield
        return
    with _LOCK:
        _C._set_tracing_state(None)
        try:
            yield
        finally:
            _C._set_tracing_state(traced)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor stands for the real one in a recording or a transform of a function.

    As under torch.export and torch.func, which put such tensors in the place of parameters.
    """
    return _C._functorch.is_functorch_wrapped_tensor(tensor) or is_fake(tensor)


def now_or_together(layer: object, size: int, action: _Action) -> None:
    """Do what a layer wants done to its weights, at the end of `together` where that is on.

    Args:
        layer: The layer; there, its last action counts.
        size: Number of its weights, 0 where other threads would not help.
        action: What to do.
    """
    if _STATE.deferred is None:
        action()
    else:
        _STATE.deferred[layer] = (size, action)


@contextmanager
def together() -> Iterator[None]:
    """Put off what layers want done to their weights, and do all of it at the end."""
    if _STATE.deferred is not None:
        yield
        return
    _STATE.deferred = {}
    try:
        yield
    finally:  # what was asked for before an error is done as without `together`
        jobs, _STATE.deferred = list(_STATE.deferred.values()), None
        _do(jobs)


def _do(jobs: list[tuple[int, _Action]]) -> None:
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if sum(size for size, _ in jobs) < _WORTH_THREADS:
        threads = 1
    # Large ones first, so that nobody waits long for the last one.
    rest = deque(action for _, action in sorted(jobs, key=lambda job: -job[0]))
    if threads == 1:
        _work(rest)
        return
    with _LOCK, ThreadPoolExecutor(threads - 1, initializer=_be_helper) as helpers:
        running = [helpers.submit(_work, rest) for _ in range(threads - 1)]
        _work(rest)
        for helper in running:
            helper.result()


def _be_helper() -> None:
    _STATE.is_helper = True


def _work(rest: deque[_Action]) -> None:
    while rest:
        try:
            action = rest.popleft()
        except IndexError:  # another thread was faster
            return
        action()
