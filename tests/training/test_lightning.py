# SPDX-License-Identifier: Apache-2.0
"""The callback of Lightning's Trainer, against the selector in a plain loop."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SelectionError, SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

lightning = pytest.importorskip("lightning.pytorch")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
from sfa_peft.training.lightning import SFALightningCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's, of torch
    pytest.mark.filterwarnings("default::UserWarning:lightning"),
]
UPDATES, BATCHES = 8, 8
OPTIONS = {"budget": 0.3, "target_modules": ["first", "second"], "selection_steps": 2, "rho": 0}


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(MLP(), SFAConfig(**OPTIONS | {"modules_to_save": ["head"]} | changes))


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def batches(count: int = BATCHES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 12, generator=generator) for _ in range(count)]


def loader(data: list[torch.Tensor]) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=None)


def with_rates(model: Any, length: int = UPDATES) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=length)
    return optimizer, scheduler


class Module(lightning.LightningModule):
    """A user's module with an adapted model."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.model = make(**changes)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = with_rates(self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        return loss_of(self.model, batch)

    def validation_step(self, batch: torch.Tensor, _index: int) -> None:
        self.log("val_loss", loss_of(self.model, batch))


class ByStep(Module):
    """Its data goes on where it was: resuming inside an epoch, Lightning begins the data anew."""

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        return loss_of(self.model, batches()[self.trainer.global_step])


class Manual(Module):
    """The same with an own optimization, of two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[Any]:  # type: ignore[override]
        other = torch.nn.Parameter(torch.ones(1))
        self.other = other
        return [torch.optim.SGD([other], lr=0.1), with_rates(self.model)[0]]

    def training_step(self, batch: torch.Tensor, _index: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        self.manual_backward(loss_of(self.model, batch) + self.other.square().sum())
        for optimizer in (first, second):
            optimizer.step()
        for optimizer in (first, second):
            optimizer.zero_grad()


def trainer(tmp_path: Path, callback: Any, *more: Any, **options: Any) -> Any:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[callback, *more],
        **options,
    )


def plain(
    data: list[torch.Tensor], accumulate: int = 1, *, has_rates: bool = True, **changes: Any
) -> Any:
    """The same run in a plain loop."""
    model = make(**changes)
    optimizer, scheduler = with_rates(model)
    selector = SFASelector(
        model,
        total_steps=len(data) // accumulate,
        lr_scheduler=scheduler if has_rates else None,
    )
    for number, batch in enumerate(data, start=1):
        (loss_of(model, batch) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            selector.step(optimizer)
            if has_rates:
                scheduler.step()
            optimizer.zero_grad()
    selector.close()
    return model


def same(a: Any, b: Any) -> bool:
    pools = [find_pool(model, "default") for model in (a, b)]
    assert pools[0].num_selected > 0
    tensors = [dict(model.named_parameters()) for model in (a, b)]
    return torch.equal(pools[0].slots, pools[1].slots) and all(
        torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1]
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_that_of_a_plain_loop_to_the_bit(accumulate: int, tmp_path: Path) -> None:
    data = batches(UPDATES * accumulate)
    module, callback = Module(), SFALightningCallback()

    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(module, loader(data))

    assert callback.selector.update_steps == UPDATES
    assert callback.selector.selected_share == 1
    is_same = same(module.model, plain(data, accumulate))
    assert is_same


def test_own_optimization_with_two_optimizers_counts_each_update_once(tmp_path: Path) -> None:
    module, callback = Manual(), SFALightningCallback(total_steps=UPDATES)

    trainer(tmp_path, callback).fit(module, loader(batches()))

    assert callback.selector.update_steps == UPDATES
    assert same(module.model, plain(batches(), has_rates=False))


class StoppedError(Exception):
    """As if the process had ended."""


class Stop(lightning.Callback):
    """Ends a run after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
            raise StoppedError


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_resumed_run_ends_with_the_same_bits(step: int, tmp_path: Path) -> None:
    options = {"val_check_interval": 2, "accumulate_grad_batches": 1}
    whole, module = ByStep(), ByStep()
    trainer(tmp_path, SFALightningCallback(), **options).fit(
        whole, loader(batches()), loader(batches(2))
    )
    first = trainer(tmp_path, SFALightningCallback(), Stop(step), **options)
    with pytest.raises(StoppedError):
        first.fit(module, loader(batches()), loader(batches(2)))
    resumed, callback = ByStep(), SFALightningCallback()

    again = trainer(tmp_path, callback, **options)
    again.fit(
        resumed,
        loader(batches()),
        loader(batches(2)),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=True,
    )

    assert callback.selector.update_steps == UPDATES
    is_same = same(resumed.model, whole.model)
    assert is_same


def test_checkpoints_of_lightnings_own_callback_carry_the_state(tmp_path: Path) -> None:
    keeper = callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    module, callback = Module(), SFALightningCallback()

    trainer(tmp_path, callback, keeper, enable_checkpointing=True).fit(module, loader(batches()))

    paths = sorted(tmp_path.glob("*.ckpt"))
    states = [torch.load(path, weights_only=True)["callbacks"] for path in paths]
    steps = [state[callback.state_key]["update_steps"] for state in states]
    assert steps == [3, 6]


def test_bfloat16_trains_and_selects(tmp_path: Path) -> None:
    module, callback = Module(), SFALightningCallback()

    trainer(tmp_path, callback, precision="bf16-mixed").fit(module, loader(batches()))

    assert callback.selector.selected_share == 1


def test_a_step_that_a_scaler_skips_counts_in_no_score(tmp_path: Path) -> None:
    plugin = lightning.plugins.MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    )
    data = batches(UPDATES + 1)
    data[2] = torch.full_like(data[2], 1e5)  # too large for float16
    module, callback = Module(select_until=1), SFALightningCallback(total_steps=UPDATES)

    trainer(tmp_path, callback, plugins=[plugin]).fit(module, loader(data))

    assert callback.selector.update_steps == UPDATES
    other = Module(select_until=1)
    rest = SFALightningCallback(total_steps=UPDATES)
    plugin = lightning.plugins.MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    )
    trainer(tmp_path, rest, plugins=[plugin]).fit(other, loader(data[:2] + data[3:]))
    slots = [find_pool(m.model, "default").slots for m in (module, other)]
    assert torch.equal(slots[0][: slots[0].numel() // 2], slots[1][: slots[1].numel() // 2])


def test_how_the_selection_stands_is_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, SFALightningCallback())

    run.fit(Module(), loader(batches()))

    assert {"sfa_round", "sfa_selected"} <= run.callback_metrics.keys()
    assert run.callback_metrics["sfa_selected"] == 1


def test_a_run_without_end_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, SFALightningCallback(), max_epochs=-1)

    with pytest.raises(SelectionError, match="Give Trainer max_steps or max_epochs, or this"):
        run.fit(Module(), loader(batches()))


def test_no_step_is_watched_after_a_run(tmp_path: Path) -> None:
    module, callback = Module(), SFALightningCallback()
    trainer(tmp_path, callback).fit(module, loader(batches()))

    optimizer, _ = with_rates(module.model)
    loss_of(module.model, batches()[0]).backward()
    optimizer.step()

    assert callback.selector.update_steps == UPDATES


def test_without_lightning_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    known = sys.modules["sfa_peft.training.lightning"]
    spec = importlib.util.spec_from_file_location("sfa_peft.training.absent", known.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    with pytest.raises(SelectionError, match="needs Lightning: pip install lightning"):
        module.SFALightningCallback()
