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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_C: Any = torch._C  # without types
#: Neighbours that are written as one where all entries come in such blocks.
BLOCK = 16  # a cache line of float32
#: One lock for all weights: they are written rarely, and a lock of its own cannot be copied.
_LOCK = threading.RLock()
#: Layers with fewer weights than this together are not worth a second thread.
_WORTH_THREADS = 1 << 20
#: More threads than this share memory that is no faster.
_MOST_THREADS = 8

_Action = Callable[[], None]
_T = TypeVar("_T")


class _OfThread(threading.local):
    deferred: dict[object, tuple[int, _Action]] | None = None
    is_helper = False  # the thread that waits for this one holds the lock
    known: dict[object, Any] | None = None  # what was asked once, while many layers are written


_STATE = _OfThread()
_NOTHING = nullcontext()


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
        if traced is None:  # inside an operator it could not even be set to that
            yield
            return
        _C._set_tracing_state(None)
        try:
            yield
        finally:
            _C._set_tracing_state(traced)


def writable(weight: Tensor) -> AbstractContextManager[Any]:
    """Return in what to write a weight, as autograd wants it: of many in a row nothing new."""
    inference = weight.is_inference()
    if _STATE.is_helper and inference == torch.is_inference_mode_enabled():
        return _NOTHING
    context = ExitStack()
    context.enter_context(exclusively())
    context.enter_context(torch.inference_mode(inference))
    context.enter_context(torch.no_grad())
    return context


def is_helper() -> bool:
    """Whether this thread writes many layers together."""
    return _STATE.is_helper


def is_exporting() -> bool:
    """Whether torch.export records a forward; torch.compile does not."""
    # Up to torch 2.12 a graph of torch.compile holds True for the function of this name.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace records a forward."""
    return is_exporting() or torch.jit.is_tracing()  # pyright: ignore


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


def asked_once(about: object, ask: Callable[[], _T]) -> _T:
    """Return what is asked about something that stays as it is while `together` writes layers."""
    known = _STATE.known
    if known is None:
        return ask()
    if about not in known:
        known[about] = ask()
    return known[about]


def _do(jobs: list[tuple[int, _Action]]) -> None:
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if sum(size for size, _ in jobs) < _WORTH_THREADS:
        threads = 1
    # Large ones first, so that nobody waits long for the last one.
    rest = deque(action for _, action in sorted(jobs, key=lambda job: -job[0]))
    known: dict[object, Any] = {}
    with exclusively(), ThreadPoolExecutor(max(threads - 1, 1)) as helpers:
        running = [helpers.submit(_work, rest, known) for _ in range(threads - 1)]
        _work(rest, known)
        for helper in running:
            helper.result()


def _work(rest: deque[_Action], known: dict[object, Any]) -> None:
    """Do what is left, in a thread that holds the lock or that one waits for which does."""
    before = _STATE.is_helper
    _STATE.known, _STATE.is_helper = known, True
    try:
        with torch.no_grad():
            while rest:
                try:
                    action = rest.popleft()
                except IndexError:  # another thread was faster
                    return
                action()
    finally:
        _STATE.known, _STATE.is_helper = None, before


# --- entries -----------------------------------------------------------------------------------


def blocks_of(indices: Tensor, size: int) -> Tensor | None:
    """Return the numbers of the blocks that flat positions are, None where they are other ones.

    Args:
        indices: Flat positions in a weight, in any order.
        size: Number of its entries.
    """
    if not indices.numel() or indices.numel() % BLOCK or size % BLOCK:
        return None
    first = indices[::BLOCK]
    whole = first[:, None] + torch.arange(BLOCK, dtype=first.dtype, device=first.device)
    if bool((first % BLOCK).any()) or not torch.equal(indices.view(-1, BLOCK), whole):
        return None
    return first // BLOCK


def rows(weight: Tensor, entries: Tensor) -> Tensor:
    """Return a weight flat, or cut into blocks where entries are."""
    return weight.detach().view(-1, *entries.shape[1:])


def put(weight: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Overwrite entries of a weight at flat positions, or blocks at their numbers."""
    if not indices.numel():
        return
    if entries.ndim > 1:
        rows(weight, entries).index_copy_(0, indices.long(), entries)
    else:  # scatter_ is faster than index_copy_
        weight.detach().view(-1).scatter_(0, indices.long(), entries)
