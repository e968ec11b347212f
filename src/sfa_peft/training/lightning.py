# SPDX-License-Identifier: Apache-2.0
"""`SFALightningCallback`: the selector as a callback of Lightning's Trainer.

Not imported with the package. Either of `lightning` and `pytorch-lightning` will do.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import SelectionError
from .selector import SFASelector

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    try:
        from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]
    except ImportError:
        Callback = None

_Base: Any = object if Callback is None else Callback


class SFALightningCallback(_Base):
    """Drive the selection of an adapter inside a LightningModule.

    ::

        trainer = lightning.Trainer(max_epochs=10, callbacks=[SFALightningCallback()])
        trainer.fit(module, loader)                                   # module.model has the adapter

    It counts update steps, not batches, also with `accumulate_grad_batches`, several optimizers and
    manual optimization; a step that a gradient scaler skips counts in no score. The length of the
    run is `trainer.estimated_stepping_batches`. Checkpoints carry the selector's state, so that
    `trainer.fit(ckpt_path=...)` goes on to the bit. After each pick `SFASelector.metrics` are
    logged.

    Args:
        adapter_name: The adapter; None for the active one.
        total_steps: Update steps of the run, where Lightning does not know them.

    Raises:
        SelectionError: If Lightning is not installed.
    """

    def __init__(self, adapter_name: str | None = None, total_steps: int | None = None) -> None:
        if Callback is None:
            raise SelectionError("SFALightningCallback needs Lightning: pip install lightning")
        super().__init__()
        self.adapter_name = adapter_name
        self.total_steps = total_steps
        self.selector: SFASelector | None = None
        self._loaded: dict[str, Any] = {}
        self._hook: Any = None
        self._due: Any = None  # the optimizer whose step is to come
        self._logged = 0  # round

    @property
    def state_key(self) -> str:
        """Name in a checkpoint: one for each adapter."""
        return f"{type(self).__qualname__}{{{self.adapter_name or 'active'}}}"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Plan the rounds of the run; on resuming take up its state.

        Raises:
            SelectionError: If the length of the run is not known, no pick fits into it, or the
                checkpoint is of another run.
        """
        self.selector = SFASelector(
            pl_module,
            total_steps=self._length(trainer),
            adapter_name=self.adapter_name,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            lr_scheduler=_scheduler(trainer),
        )
        self.selector.load_state_dict(self._loaded)
        self._loaded, self._logged = {}, self.selector.round
        self._leave()
        # A hook of all optimizers: those of one come before the library's own, which sees steps.
        self._hook = register_optimizer_step_post_hook(self._after_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Remember that a step is due, which a gradient scaler may skip."""
        if self._trains(optimizer):
            self._due = optimizer

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drop the gradients of a step that was skipped; log how the selection stands."""
        if self.selector is None:
            return
        if self._due is not None:
            self._step(self._due)
        if self._logged != self.selector.round:
            self._logged = self.selector.round
            pl_module.log_dict(self.selector.metrics())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the scores, also of a run that was stopped early."""
        self._leave()
        if self.selector is not None:
            self.selector.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Watch no more steps."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return the selector's state, for a checkpoint; all ranks add their sums."""
        return self._loaded if self.selector is None else self.selector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training begins."""
        self._loaded = state_dict

    def _length(self, trainer: Any) -> int:
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not math.isfinite(steps) or steps < 0:
            raise SelectionError(
                "SFALightningCallback: Lightning does not know how many update steps the run has, "
                "and the selection grows over them. Give Trainer max_steps or max_epochs, or this "
                "callback total_steps."
            )
        return int(steps)

    def _trains(self, optimizer: Any) -> bool:
        pool = None if self.selector is None else self.selector.pool
        return pool is not None and pool.is_trained_by(optimizer)

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._trains(optimizer):
            self._step(optimizer)

    def _step(self, optimizer: Any) -> None:
        """Count a step while gradients and learning rate are still its own."""
        self._due = None
        if self.selector is not None:
            self.selector.step(optimizer)

    def _leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._due = None


def _scheduler(trainer: Any) -> Any:
    """Return the scheduler of the rates if it makes one step after each update step."""
    found = [c for c in trainer.lr_scheduler_configs if c.interval == "step" and c.frequency == 1]
    is_only = len(found) == len(trainer.lr_scheduler_configs) == 1
    return found[0].scheduler if is_only else None
