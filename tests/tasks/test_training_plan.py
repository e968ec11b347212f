# SPDX-License-Identifier: Apache-2.0
"""Memory as planned, against the tensors that are alive at once in a real step."""

import gc
import json

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoBackbone, AutoConfig, Swinv2Config

import sfa_peft
from sfa_peft import BudgetError, SFAConfig, SFAError, SFASelector
from sfa_peft.tasks import plan_training
from tests.tiny import swinv2_config

SIZE, BATCH = 128, 2


class PeakOfTensors(TorchDispatchMode):
    """Bytes of the storages that are alive, at their largest, since it was entered."""

    def __init__(self, held):
        super().__init__()
        self.live = {}
        self.peak = 0
        for tensor in held:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.live = {k: (r, n) for k, (r, n) in self.live.items() if not r.expired()}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return found


@pytest.fixture
def source(tmp_path) -> str:
    changes = {"image_size": SIZE, "embed_dim": 48, "depths": [1, 1, 2, 1], "window_size": 4}
    config: Swinv2Config = swinv2_config(**changes)
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def all_tensors():
    gc.collect()
    return [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]


def measured(source, config, optimizer, phase):
    """The peak of the third step of a real training."""
    others = {tensor.untyped_storage()._cdata for tensor in all_tensors()}
    torch.manual_seed(0)
    base = AutoBackbone.from_config(AutoConfig.from_pretrained(source))
    model = get_peft_model(base, config).train()
    selector = SFASelector(model, total_steps=20)
    trained = [p for p in model.parameters() if p.requires_grad]
    step = {
        "adamw": lambda: torch.optim.AdamW(trained, foreach=False),
        "sgd": lambda: torch.optim.SGD(trained, 1e-3, foreach=False),
    }[optimizer]()
    pixels = torch.randn(BATCH, 3, SIZE, SIZE)

    def train():
        outputs = model(pixel_values=pixels)
        sum(m.square().mean() for m in outputs.feature_maps).backward()
        step.step()

    for _ in range(19 if phase == "after" else 2):
        train()
        selector.step(step)
        step.zero_grad(set_to_none=False)
    held = [t for t in all_tensors() if t.untyped_storage()._cdata not in others]
    with PeakOfTensors(held) as peak:
        train()
    return peak.peak


@pytest.mark.parametrize(
    ("options", "optimizer", "phase"),
    [
        ({"rho": 0}, "adamw", "scoring"),
        ({"rho": 0}, "sgd", "scoring"),
        ({"rho": 0}, "adamw", "after"),
        ({}, "adamw", "scoring"),
        ({"rho": 1}, "adamw", "after"),
    ],
)
def test_planned_memory_is_that_of_a_step_within_a_tenth(options, optimizer, phase, source):
    config = SFAConfig(budget=0.1, select_until=0.5, **options)
    plan = plan_training(
        source, config, image_size=(SIZE, SIZE), batch_size=BATCH, optimizer=optimizer
    )
    wanted = measured(source, config, optimizer, phase)
    assert getattr(plan, phase) == pytest.approx(wanted, rel=0.1)


def test_the_budget_is_that_of_a_model_with_weights(source):
    config = SFAConfig(budget=0.1)
    plan = plan_training(source, config)
    base = AutoBackbone.from_config(AutoConfig.from_pretrained(source))
    assert plan.budget == sfa_peft.budget_report(get_peft_model(base, config))
    fields = json.loads(json.dumps(plan.to_dict()))
    assert fields["scoring"] == plan.scoring
    assert "peak while selecting" in str(plan)


def test_half_the_width_is_half_the_weights_and_scores_as_said(source):
    wide, narrow = (
        plan_training(source, SFAConfig(budget=0.1), dtype=d) for d in ("float32", "bfloat16")
    )
    assert narrow.weights == pytest.approx(wide.weights / 2, rel=0.1)
    halved = plan_training(source, SFAConfig(budget=0.1, score_dtype="bfloat16"))
    assert halved.scores == wide.scores / 2
    assert plan_training(source, SFAConfig(budget=0.1, score="random")).scores == 0


def test_what_is_not_known_is_refused(source):
    with pytest.raises(SFAError, match="optimizer one of adamw"):
        plan_training(source, SFAConfig(), optimizer="adam8bit")
    with pytest.raises(SFAError, match="no config of a model"):
        plan_training(f"{source}/none", SFAConfig())
    with pytest.raises(BudgetError, match="smallest budget"):
        plan_training(source, SFAConfig(budget=1e-5))
