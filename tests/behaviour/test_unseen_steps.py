# SPDX-License-Identifier: Apache-2.0
"""Optimizers on copies of the parameters (DeepSpeed ZeRO, Apex, Megatron) train as others do.

They write `param.data`, which neither torch's optimizer hooks nor version counters tell.
"""

import pytest
import torch
from peft import get_peft_model

from sfa_peft import OptimizerWarning, SelectionError, SFAConfig, SFAError, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.distributed_runs import MasterCopies
from tests.tiny import MLP

STEPS, LR = 12, 1e-2


def adapted(**options):
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "selection_steps": 3}
    config |= {"select_until": 1, "late_bias_correction": False, "modules_to_save": ["head"]}
    return get_peft_model(MLP(), SFAConfig(**(config | options)))


def losses(model, optimizer, *, selects=True, told=False, micro=1, steps=STEPS):
    """Train; return the loss of each forward, which shows the weights that it used."""
    selector = SFASelector(model, total_steps=STEPS) if selects else None
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(steps):
        for _ in range(micro):
            loss = (model(torch.randn(8, 12, generator=generator)) - 1).square().mean() / micro
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        if selector is not None:
            selector.step(*([optimizer] if told else []))
        optimizer.zero_grad()
    return found


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("options", [{}, {"score": "magnitude"}], ids=["selects", "selected"])
def test_forwards_use_the_values_of_an_optimizer_on_copies(options, micro, told):
    expected_model, model = adapted(**options), adapted(**options)
    selects = {"selects": not options, "micro": micro}
    plain = torch.optim.AdamW(trained(expected_model), lr=LR)
    expected = losses(expected_model, plain, **selects)
    found = losses(model, MasterCopies(trained(model), lr=LR), told=told, **selects)
    pools = [find_pool(m, "default") for m in (expected_model, model)]
    assert torch.equal(pools[0].slots, pools[1].slots)
    assert torch.equal(pools[0].values, pools[1].values)
    assert found == expected


def test_an_optimizer_on_copies_after_one_of_torchs_is_noticed_too():
    runs = []
    for second in (torch.optim.AdamW, MasterCopies):
        model = adapted(score="magnitude")
        first = losses(model, torch.optim.AdamW(trained(model), lr=LR), selects=False, micro=2)
        runs.append(first + losses(model, second(trained(model), lr=LR), selects=False, micro=2))
    # It may take as many forwards as a step had before.
    assert runs[1][-STEPS:] == pytest.approx(runs[0][-STEPS:], rel=1e-6)


def test_micro_batches_are_not_looked_at_once_steps_were_seen(monkeypatch):
    looks = []
    monkeypatch.setattr("sfa_peft.tuner.adapter.notice", looks.append)
    model = adapted(score="magnitude")
    losses(model, torch.optim.AdamW(trained(model), lr=LR), selects=False, micro=3)
    assert len(looks) == 3  # the micro-batches of the first step


def test_late_entries_without_their_correction_are_reported_once():
    model = adapted(late_bias_correction=True)
    with pytest.warns(OptimizerWarning, match="no torch optimizer on the model's own") as found:
        losses(model, MasterCopies(trained(model), lr=LR))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"internal_lr_ratio": 2.0}, "internal_lr_ratio"),
        ({"weight_decay_on": "weight"}, "weight"),
    ],
)
@pytest.mark.parametrize("selects", [True, False])
def test_options_that_need_torchs_hooks_are_refused_at_the_first_step(options, named, selects):
    model = adapted(score="accumulated_gradient" if selects else "magnitude", **options)
    with pytest.raises(SFAError, match=rf"SFAConfig\.{named}.*needs torch's optimizer hooks"):
        losses(model, MasterCopies(trained(model), lr=LR), selects=selects, steps=2)


def test_a_torch_optimizer_that_holds_copies_only_is_refused_with_what_works():
    model = adapted()
    copies = MasterCopies(trained(model), lr=LR)
    with pytest.raises(SelectionError, match=r"call SFASelector\.step\(\) without it"):
        losses(model, copies.inner, told=True)


def test_a_loss_scale_of_the_optimizers_own_is_refused():
    model = adapted()
    with pytest.raises(SelectionError, match=r"scaled by MasterCopies, 1024.0 times.*bf16"):
        losses(model, MasterCopies(trained(model), loss_scale=1024.0, lr=LR), told=True)
