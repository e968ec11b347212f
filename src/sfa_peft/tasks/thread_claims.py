# SPDX-License-Identifier: Apache-2.0
"""Who uses which task now: threads share one backbone, which can hold one task at a time.

Invariant: as soon as two threads hold claims, all claims of all threads name the same task. So
whoever makes a claim on another one is alone, and may switch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import SFAError


@dataclass(frozen=True)
class Claim:
    """One use of the backbone.

    Attributes:
        key: Claims of different threads can stand together where their keys are equal.
        doing: What the thread does, for messages: "using `depth`".
    """

    key: Any
    doing: str


class Claims:
    """The claims of all threads on one backbone.

    Args:
        switch: Called with the key of a claim whenever the backbone has to be brought to it, while
            no thread can make or end a claim.
    """

    def __init__(self, switch: Callable[[Any], None]) -> None:
        self._switch = switch
        self._changed = threading.Condition()
        self._held: dict[int, list[Claim]] = {}  # by thread, the innermost last
        self._names: dict[int, str] = {}  # of the threads, for messages
        self._queue: deque[object] = deque()  # waiting threads, first come first served

    @contextmanager
    def hold(self, claim: Claim, *, wait: bool | float = False) -> Iterator[None]:
        """Hold a claim for the calling thread; an outer claim is taken up again at the end.

        Args:
            claim: What to claim.
            wait: Whether to wait while other threads use something else; a number: for at most so
                many seconds.

        Raises:
            SFAError: If another thread uses something else (for too long).
        """
        me = threading.get_ident()
        with self._changed:
            self._wait_for_turn(me, claim, wait)
            stack = self._held.setdefault(me, [])
            is_there = bool(stack) and stack[-1].key == claim.key
            stack.append(claim)
            self._names[me] = threading.current_thread().name
            try:
                if not is_there:
                    self._bring(me, claim)
            except BaseException:
                self._drop(me, claim)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._drop(me, claim)

    @property
    def is_held_here(self) -> bool:
        """Whether the calling thread holds a claim."""
        return threading.get_ident() in self._held

    def _bring(self, me: int, claim: Claim) -> None:
        if not any(thread != me for thread in self._held):
            self._switch(claim.key)

    def _drop(self, me: int, claim: Claim) -> None:
        stack = self._held[me]
        if stack[-1] is not claim:  # coroutines of one thread that take turns in their blocks
            stack[:] = [c for c in stack if c is not claim]
            if not stack:
                self._forget(me)
            self._changed.notify_all()
            raise SFAError(
                f"{claim.doing}: activations of one thread must end in the reverse order. Do not "
                "await inside `with bank.activate(...)`; use bank.run in a worker thread."
            )
        stack.pop()
        if stack:
            if stack[-1].key != claim.key:
                self._bring(me, stack[-1])
        else:
            self._forget(me)
        self._changed.notify_all()

    def _forget(self, me: int) -> None:
        del self._held[me], self._names[me]

    def _find_conflict(self, me: int, key: Any) -> tuple[int, Claim] | None:
        """Return a claim of another thread that a key cannot stand beside."""
        others = ((t, c) for t, stack in self._held.items() if t != me for c in stack)
        return next(((t, c) for t, c in others if c.key != key), None)

    def _wait_for_turn(self, me: int, claim: Claim, wait: bool | float) -> None:
        waits = wait is not False and me not in self._held
        if waits and (self._queue or self._find_conflict(me, claim.key)):
            ticket = object()
            self._queue.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._queue[0] is ticket and not self._find_conflict(me, claim.key),
                    None if wait is True else wait,
                )
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        conflict = self._find_conflict(me, claim.key)
        if conflict is None:
            return
        thread, other = conflict
        if me in self._held:
            advice = (
                f"This thread is {self._held[me][-1].doing} itself, so it cannot wait: end that "
                "first."
            )
        elif waits:
            advice = f"Waited {wait} s."
        else:
            advice = "Try again, or pass wait=True."
        raise SFAError(
            f"{claim.doing}: thread `{self._names[thread]}` is {other.doing}, and a backbone can "
            f"hold one task at a time. {advice}"
        )
