# SPDX-License-Identifier: Apache-2.0
"""`TaskBank`: one backbone in memory, many tasks on it, switched exactly and never in a race."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields
from os import PathLike
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..errors import SFAError
from ..model_card import html_table
from ..sparse.write_lock import together
from ..tuner.adapter import check_name
from ..tuner.layer import SFALayer
from .memory import TaskMemory, count_bytes, measure, tensors_of
from .shared_backbone import (
    adapted_layers,
    find_shareable,
    guard_forward,
    load_frozen,
    put_back,
    read_config,
    remove_adapter,
    share,
)
from .thread_claims import Claim, Claims


class TaskBank:
    """Several task models on one backbone, each with its own head and SFA adapter.

    All task models hold the very same backbone module; what belongs to a task is only its adapter
    and what it has outside the backbone. Outputs equal, to the bit, those of the task loaded alone.

    A task is used by a forward of its model, for as long as that takes, or in a block
    ``with bank.activate(name):``. Threads may use the same task at the same time. A thread that
    wants another one gets an `SFAError`, or waits if it asked to.

    The bank is for inference: adapters are loaded frozen and models are in eval mode. Its backbone
    must not be called, trained, moved or switched by `set_adapter` while a thread uses a task.

    Args:
        model: The backbone, or a task model that holds it. It gets wrappers as tasks are added and
            loses them when the last task is removed.

    Raises:
        SFAError: If an adapter has wrapped its layers already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.backbone = find_shareable(model)
        self._layers: list[SFALayer] = []  # wrapped layers of the backbone
        self._tasks: dict[str, Task] = {}
        self._claims = Claims(self._switch)
        self._active: str | None = None
        self._switches = 0

    # --- tasks ---------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        adapter: str | PathLike[str],
        model: nn.Module,
        *,
        check_weights: bool = True,
        wait: bool | float = False,
    ) -> Task:
        """Load a task; which one is active does not change.

        Args:
            name: Name for the task.
            adapter: Folder that `save_pretrained` wrote, or a Hub name.
            model: The plain task model that the adapter was trained on, on the backbone's device.
                It gets the bank's backbone in the place of its own, and then belongs to the bank.
            check_weights: Whether its own backbone must have the bank's weights; not needed of a
                model that was built without pretrained weights.
            wait: As in `activate`; nobody may use a task meanwhile.

        Raises:
            SFAError: If the name is taken or cannot be one, there is no SFA adapter, or the model's
                backbone is another one. The bank is unchanged then.
            AdapterFileError: If the adapter is damaged or does not fit the model. The bank is
                unchanged then, too.
        """
        check_name(name)
        self._check_free(name, model)
        config = read_config(adapter)
        with self._change(f"adding `{name}`", wait):
            self._check_free(name, model)  # another thread may have been faster
            replaced = share(self.backbone, model, check_weights=check_weights)
            try:
                peft_model = load_frozen(name, adapter, config, model, self.backbone)
            except BaseException:
                remove_adapter(model, name)
                put_back(model, replaced)
                raise
            finally:
                self._layers = adapted_layers(self.backbone)
                self._bring(self._active)
            guard_forward(model, lambda: self._use(name, wait=False))
            self._tasks[name] = Task(name, peft_model, self)
        return self._tasks[name]

    def remove(self, name: str, *, wait: bool | float = False) -> None:
        """Remove a task; its model is of no further use.

        Args:
            name: The task.
            wait: As in `activate`; nobody may use a task meanwhile.

        Raises:
            SFAError: If there is no such task, or one is in use.
        """
        self._find(name)
        with self._change(f"removing `{name}`", wait):
            model = self._find(name).model.get_base_model()
            if self._active == name:
                self._active = None
            self._bring(self._active)
            remove_adapter(model, name)
            self._layers = adapted_layers(self.backbone)
            model.__dict__.pop("forward")  # the guard
            del self._tasks[name]

    def __getitem__(self, name: str) -> Task:
        return self._find(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._tasks))

    def __len__(self) -> int:
        return len(self._tasks)

    # --- use -----------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The task that the backbone holds now, None for no task."""
        return self._active

    @property
    def switches(self) -> int:
        """How often the backbone was brought from one task to another so far."""
        return self._switches

    def activate(self, name: str | None, *, wait: bool | float = False) -> Activation:
        """Bring the backbone to a task, and keep it there for the length of a `with` block.

        As a plain call it switches and lets go: the next thread that asks may switch again, and a
        forward of a task model brings its task back by itself. In a `with` block the task stays,
        and at its end the one of the block around it comes back. Blocks belong to the thread: do
        not await inside one.

        Args:
            name: The task, None for the plain backbone.
            wait: Whether to wait while other threads use another task; a number: for at most so
                many seconds. Who waits comes in order.

        Raises:
            SFAError: If there is no such task, or another thread uses another one (for too long).
        """
        with self._use(name, wait):
            return Activation(self, name, wait)

    def run(self, name: str, *args: Any, wait: bool | float = False, **inputs: Any) -> Any:
        """Return the output of a task's model, without gradients.

        Args:
            name: The task.
            *args: For the model.
            wait: As in `activate`.
            **inputs: For the model, ``pixel_values=...`` usually.

        Raises:
            SFAError: As `activate`.
        """
        with self._use(name, wait), torch.no_grad():
            return self._find(name).model(*args, **inputs)

    def map(
        self, requests: Iterable[tuple[str, Mapping[str, Any]]], *, wait: bool | float = False
    ) -> Sequence[Any]:
        """Run requests for several tasks, switching to each task once.

        Args:
            requests: Task and inputs of each; the active task's are run first.
            wait: As in `activate`, before each switch.

        Returns:
            The outputs, in the order of the requests.

        Raises:
            SFAError: As `activate`; nothing is run if a task is unknown.
        """
        groups: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        for index, (name, inputs) in enumerate(requests):
            self._find(name)
            groups.setdefault(name, []).append((index, inputs))
        outputs: dict[int, Any] = {}
        for name in sorted(groups, key=lambda name: name != self._active):
            with self._use(name, wait):
                for index, inputs in groups[name]:
                    outputs[index] = self.run(name, **inputs)
        return [outputs[index] for index in range(len(outputs))]

    # --- reports -------------------------------------------------------------------------------

    def list(self) -> Sequence[str]:
        """Return the names of the tasks, in the order they were added."""
        return [*self._tasks]

    def memory(self) -> dict[str, TaskMemory]:
        """Return what each task costs beside the backbone, in bytes."""
        tasks = list(self._tasks.values())
        return {t.name: measure(t.model, t.name, self.backbone) for t in tasks}

    def _repr_html_(self) -> str:
        rows = [
            (f"{name}{', active' if name == self.active else ''}", *astuple(m), m.total)
            for name, m in self.memory().items()
        ]
        names = [part.name for part in fields(TaskMemory)]
        backbone = ("backbone, once", *[""] * len(names), self.backbone_bytes)
        return html_table(("bytes", *names, "total"), [backbone, *rows])

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the backbone without any task."""
        adapters = [
            tensor
            for layer in self._layers
            for part in (layer.sfa_pool, layer.sfa_slots, layer.sfa_down, layer.sfa_up)
            for tensor in tensors_of(part)
        ]
        return count_bytes(tensors_of(self.backbone)) - count_bytes(adapters)

    # --- inside --------------------------------------------------------------------------------

    def _find(self, name: str) -> Task:
        task = self._tasks.get(name)
        if task is None:
            known = ", ".join(f"`{n}`" for n in self._tasks) or "none"
            raise SFAError(f"no task `{name}` in the bank; it has: {known}.")
        return task

    def _check_free(self, name: str, model: nn.Module) -> None:
        if name in self._tasks:
            raise SFAError(f"a task `{name}` is in the bank already; remove it first.")
        owner = next((t for t in self._tasks.values() if t.model.get_base_model() is model), None)
        if owner is not None:
            raise SFAError(
                f"adding `{name}`: the model belongs to task `{owner.name}`. Give each task a "
                "model of its own, which costs no more than its head."
            )

    @contextmanager
    def _use(self, name: str | None, wait: bool | float) -> Iterator[None]:
        if name is not None:
            self._find(name)
        words = "using the plain backbone" if name is None else f"using `{name}`"
        with self._claims.hold(Claim(name, words), wait=wait):
            yield

    @contextmanager
    def _change(self, doing: str, wait: bool | float) -> Iterator[None]:
        if self._claims.is_held_here:
            raise SFAError(f"{doing}: end this thread's `with bank.activate(...)` first.")
        with self._claims.hold(Claim(_CHANGE, doing), wait=wait):
            yield

    def _switch(self, name: Any) -> None:
        """Bring the backbone to a task; no other thread uses it."""
        if name is _CHANGE:
            return
        if name is not None:
            self._find(name)  # it may have been removed while this thread waited
        self._bring(name)
        if name != self._active:
            self._active = name
            self._switches += 1

    def _bring(self, name: str | None) -> None:
        wanted = [] if name is None else [name]
        merged = next((layer.name for layer in self._layers if layer.merged), None)
        if merged is not None:
            raise SFAError(
                f"`{merged}`: an adapter of the bank's backbone is merged, so no task can be "
                "activated. Call unmerge_adapter() on that model."
            )
        # Now and not in the next forward, in which other threads may take part; and for every
        # layer, since somebody may have called set_adapter.
        with together():
            for layer in self._layers:
                layer.act_at_once(wanted)


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


class _Change:
    """Key of claims of those who add or remove tasks: equal to no other thread's."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


_CHANGE = _Change()
