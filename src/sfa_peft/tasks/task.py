# SPDX-License-Identifier: Apache-2.0
"""What a bank hands out: its tasks, and blocks in which one of them stays active."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

if TYPE_CHECKING:
    from .bank import TaskBank


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a bank: calling it runs its model, as `TaskBank.run` does.

    Attributes:
        name: Its name, which is its adapter's too.
        model: Its model with the adapter. A forward of it activates the task by itself.
    """

    name: str
    model: PeftModel
    _bank: TaskBank = field(repr=False)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return the model's output."""
        return self._bank.run(self.name, *args, **inputs)


class Activation:
    """What `TaskBank.activate` returns: a context manager that keeps a task active."""

    def __init__(self, bank: TaskBank, name: str | None, wait: bool | float) -> None:
        self._bank, self._name, self._wait = bank, name, wait
        self._open: list[Any] = []  # a with statement may be nested in itself

    def __enter__(self) -> Task | nn.Module:
        """Activate the task until the end of the block; return it (the backbone for None)."""
        block = self._bank._use(self._name, self._wait)
        block.__enter__()
        self._open.append(block)
        return self._bank.backbone if self._name is None else self._bank[self._name]

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)
