# SPDX-License-Identifier: Apache-2.0
"""The rates that a scheduler will set are known before the run, and decide when picks end."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.optim import lr_scheduler
from transformers import get_scheduler

from sfa_peft import ResumedRunWarning, SelectionError, SFACallback, SFAConfig, SFASelector
from sfa_peft.training.planned_rates import planned_rates
from tests.tiny import MLP, upernet
from tests.training.trainer_runs import make_trainer

TOTAL = 24


def sequence(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
        lr_scheduler.CosineAnnealingLR(optimizer, TOTAL - 5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [5])


KINDS = {
    "none": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0),
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [7, 15]),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=TOTAL + 1),
    "sequence": sequence,
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    **{
        name: lambda optimizer, name=name: get_scheduler(name, optimizer, 4, TOTAL)
        for name in ("linear", "cosine", "polynomial", "constant_with_warmup")
    },
}


def two_groups():
    values = torch.nn.Parameter(torch.zeros(3))
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5}, {"params": [values]}]
    return values, torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_the_rates_are_those_that_the_scheduler_then_sets_and_it_is_left_as_it_is(name):
    values, optimizer = two_groups()
    scheduler = KINDS[name](optimizer)
    before = copy.deepcopy((optimizer.state_dict(), scheduler.last_epoch))
    planned = planned_rates(scheduler, TOTAL, values)
    assert (optimizer.state_dict(), scheduler.last_epoch) == before
    seen = []
    for _ in range(TOTAL):
        seen.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        scheduler.step()
    assert planned == seen


def test_accelerates_scheduler_is_looked_into():
    values, optimizer = two_groups()
    scheduler = KINDS["linear"](optimizer)
    expected = planned_rates(scheduler, TOTAL, values)
    prepared = Accelerator(cpu=True).prepare(optimizer, scheduler)[1]
    assert type(prepared) is not type(scheduler)
    assert planned_rates(prepared, TOTAL, values) == expected


class Odd(lr_scheduler.LRScheduler):
    def get_lr(self):
        if self.last_epoch > 0:
            raise OSError("asks a server")
        return self.base_lrs


def test_rates_that_cannot_be_known_are_none():
    values, optimizer = two_groups()
    odd = Odd(two_groups()[1])
    for scheduler in (None, "linear", lr_scheduler.ReduceLROnPlateau(optimizer), odd):
        assert planned_rates(scheduler, TOTAL, values) is None


# --- what they decide -------------------------------------------------------------------------

CONFIG = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "selection_steps": 2}


def selector_of(total=TOTAL, scheduler=None, **options) -> SFASelector:
    model = get_peft_model(MLP(), SFAConfig(**(CONFIG | options)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    made = None if scheduler is None else get_scheduler(scheduler, optimizer, 0, total)
    return SFASelector(model, total_steps=total, lr_scheduler=made)


@pytest.mark.parametrize(
    ("options", "last_pick"),
    [
        ({}, 12),  # not known
        ({"scheduler": "linear"}, 12),
        ({"scheduler": "constant"}, 18),
        ({"scheduler": "cosine"}, 10),
        ({"scheduler": "cosine", "select_until": 1}, 22),
        ({"scheduler": "cosine", "select_until": 0.2}, 4),
        ({"scheduler": "cosine", "schedule": "cubic"}, 10),
        ({"scheduler": "cosine", "schedule": "one_shot"}, 2),
        ({"scheduler": "cosine", "schedule": "literal"}, 22),
        ({"scheduler": "cosine", "selection_steps": 12}, 12),  # one pick in any case
    ],
)
def test_the_last_pick_leaves_a_quarter_of_the_rates_unless_the_config_says_when(
    options, last_pick
):
    assert selector_of(**options).schedule.last_pick == last_pick


def test_a_resumed_run_keeps_what_the_first_one_decided():
    state = selector_of(scheduler="constant").state_dict()
    assert state["settings"]["select_until"] == 0.75
    again = selector_of(scheduler="cosine")
    again.load_state_dict(state)
    assert again.schedule.last_pick == 18
    assert again.state_dict()["settings"] == state["settings"]
    asked = selector_of(scheduler="cosine", select_until=0.5)
    with pytest.raises(SelectionError, match=r"started with select_until=0\.75, now 0\.5"):
        asked.load_state_dict(state)
    old = state | {"settings": state["settings"] | {"select_until": None}}
    again.load_state_dict(old)  # of a version without a default
    assert again.schedule.last_pick == 22
    longer = selector_of(48, scheduler="linear")
    with pytest.warns(ResumedRunWarning, match="total_steps=24, now 48"):
        longer.load_state_dict(state)
    assert longer.schedule.last_pick == 18


@pytest.mark.parametrize(("kind", "last"), [("linear", 6), ("constant", 9), ("cosine", 3)], ids=str)
def test_the_trainers_scheduler_decides(tmp_path, kind, last):
    callback = SFACallback()
    config = SFAConfig(budget=0.2, selection_steps=3, modules_to_save=["decode_head"])
    model = get_peft_model(upernet(), config)
    trainer = make_trainer(tmp_path, [callback], model=model, lr_scheduler_type=kind)
    trainer.train()
    assert callback.selector.schedule.last_pick == last
    assert callback.selector.selected_share == 1
