# SPDX-License-Identifier: Apache-2.0
"""Averages of weights by the packages that make them; `make versions` has them installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sfa_peft import SFASelector
from tests.behaviour.test_averages import DECAY, DenseAverage, make, outputs, train


def teacher_of(student, make_average):
    """Train with an average beside; return it and the average of dense changes."""
    average, update, copies_first = make_average(student)
    wanted = DenseAverage(student, copies_first=copies_first)

    def after_step(step):
        update()
        wanted.update(student)

    train(student, after_step)
    return average, wanted


def timm(name):
    def make_average(student):
        found = importlib.util.find_spec("timm")
        if found is None:
            pytest.skip("no timm")
        # The one file: all of timm asks for torchvision.
        path = Path(found.origin).parent / "utils" / "model_ema.py"
        spec = importlib.util.spec_from_file_location("model_ema", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        average = getattr(module, name)(student, decay=DECAY)
        return average.module, lambda: average.update(student), False

    return make_average


def ema_pytorch(student):
    kind = pytest.importorskip("ema_pytorch").EMA
    average = kind(student, beta=DECAY, min_value=DECAY, update_after_step=-1, update_every=1)
    return average.ema_model, average.update, True


@pytest.mark.parametrize(
    "make_average",
    [timm("ModelEmaV2"), timm("ModelEmaV3"), ema_pytorch],
    ids=["ModelEmaV2", "ModelEmaV3", "ema_pytorch"],
)
def test_a_teacher_of_a_package_computes_with_the_average(make_average):
    teacher, wanted = teacher_of(make(), make_average)
    wanted.check(outputs(teacher))


def torch_ema(model, parameters):
    kind = pytest.importorskip("torch_ema").ExponentialMovingAverage
    average = kind(parameters, decay=DECAY, use_num_updates=False)
    return average.update, average.store, average.copy_to, average.restore, False


def diffusers(model, parameters):
    kind = pytest.importorskip("diffusers.training_utils").EMAModel
    average = kind(parameters, decay=DECAY, min_decay=DECAY)
    methods = (average.step, average.store, average.copy_to, average.restore)
    return *((lambda method=method: method(parameters)) for method in methods), True


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("make_average", [torch_ema, diffusers])
def test_a_package_that_visits_the_model_leaves_no_bit(make_average, of_all):
    model = make()
    parameters = [p for p in model.parameters() if of_all or p.requires_grad]
    update, store, copy_to, restore, copies_first = make_average(model, parameters)
    wanted = DenseAverage(model, copies_first=copies_first)

    def after_step(step):
        update()
        wanted.update(model)
        before = outputs(model)
        store()
        copy_to()
        wanted.check(outputs(model))
        restore()
        assert torch.equal(outputs(model), before)

    train(model, after_step)
    assert torch.equal(outputs(model), outputs(train(make())))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, of torch
def test_lightnings_callback_validates_and_ends_with_the_average(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    model = make()
    checked = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        def training_step(self, batch, _index):
            return model(batch[0]).square().mean()

        def on_train_batch_end(self, *_args):
            self.selector.step(self.trainer.optimizers[0])

        def validation_step(self, _batch, _index):
            if self.wanted is not None:
                self.wanted.check(outputs(model))
                checked.append(True)

    module = Module()
    module.selector, module.wanted = SFASelector(model, total_steps=8), None

    class Reference(lightning.Callback):
        def on_train_batch_end(self, *_args):
            if module.wanted is None:
                module.wanted = DenseAverage(model)
            else:
                module.wanted.update(model)

    batches = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches), batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Reference(), callbacks.EMAWeightAveraging(decay=DECAY)],
    )
    trainer.fit(module, loader, loader)
    assert len(checked) == 4 * len(batches)
    module.wanted.check(outputs(model))
