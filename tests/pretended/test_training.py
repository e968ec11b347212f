# SPDX-License-Identifier: Apache-2.0
"""Training on the pretended device: the right selection, no waiting, few kernels, little memory."""

from itertools import pairwise

import pytest
import torch
from torch.amp import GradScaler

from sfa_peft import SelectionError, SFASelector
from tests.pretended.runs import ONE, ROUND, TOTAL, TWO, Run, Stack, adapt, assert_same, images

#: How often a pick waits at most, whatever the size of the model; 2 more for a further device.
AT_A_PICK = 4

OPTIONS = {
    "sums": {},
    "absolute": {"score": "absolute_gradient"},
    "movement": {"score": "movement"},
    "bfloat16 scores": {"score_dtype": "bfloat16"},
    "bfloat16 absolute": {"score": "absolute_gradient", "score_dtype": "bfloat16"},
    "by layer": {"ranking": "layer"},
    "rates": {"internal_lr_ratio": 0.5},
    "decay": {"weight_decay_on": "weight"},
}
OPTIMIZERS = {"foreach": {"foreach": True}, "fused": {"fused": True}}


def quiet_steps(found):
    """Return the reports of steps that neither pick nor follow a pick."""
    return [
        report for (before, _), (picked, report) in pairwise(found) if not picked and not before
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_only_picks_wait_for_the_device_and_few_times(device, name, optimizer):
    run = Run(adapt(Stack().to(ONE), **OPTIONS[name]), OPTIMIZERS[optimizer])
    run.steps(1)  # the first step finds out about the optimizer
    found = run.watched(device, TOTAL + 2)
    assert sum(picked for picked, _ in found) == TOTAL // ROUND - 1
    for picked, report in found:
        most = AT_A_PICK if picked else 0
        assert report.own_waits.total() <= most, report.own_waits
    twin = Run(adapt(Stack(), **OPTIONS[name]), OPTIMIZERS[optimizer]).steps(TOTAL + 3)
    assert_same(run, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaled_loss_or_16_bit_weights_change_nothing_about_it(device, dtype, optimizer):
    base = Stack().to(ONE, dtype)
    scaler = GradScaler("pretended", init_scale=64.0) if dtype == torch.float32 else None
    run = Run(adapt(base), OPTIMIZERS[optimizer], scaler)
    run.steps(1)
    for picked, report in run.watched(device, TOTAL + 2):
        # A fused optimizer under a scaler leaves to us what others ask anyway: was it skipped?
        skipped = scaler is not None and optimizer == "fused"
        most = AT_A_PICK if picked else 0
        assert report.own_waits.total() <= most + skipped, report.own_waits
    assert run.selector.selected_share == 1


def test_the_waits_of_a_pick_and_the_kernels_of_a_layer_do_not_depend_on_the_models_size(device):
    waits, kernels = {}, {}
    for depth in (2, 8):
        run = Run(adapt(Stack(depth).to(ONE)), {"fused": True})
        run.steps(1)
        found = run.watched(device, 2 * ROUND)
        waits[depth] = [report.own_waits.total() for picked, report in found if picked]
        kernels[depth] = quiet_steps(found)[0].own_kernels / depth
    assert waits[2] == waits[8]
    assert kernels[8] <= kernels[2]


def scored_kernels(device, **options):
    run = Run(adapt(Stack(width=512).to(ONE), rho=0, **options))
    run.steps(1)
    with device.watched() as report:
        run.step()
    places = {"selection/accumulators.py", "selection/topk.py"}
    return sum(n for (_, at), n in report.kernels.items() if at.partition(":")[0] in places)


def test_a_scored_step_starts_a_few_kernels_for_each_layer(device):
    plain = scored_kernels(device)
    assert plain <= 2 * 8
    assert scored_kernels(device, score_dtype="bfloat16") <= 2 * plain


def test_bfloat16_scores_save_two_bytes_for_each_weight(device):
    Run(adapt(Stack().to(ONE), score_dtype="bfloat16")).step()  # makes the noise that all share
    taken = {}
    for dtype in ("float32", "bfloat16"):
        model = adapt(Stack(8, 64).to(ONE), rho=0, score_dtype=dtype)
        before = device.in_use(0)
        run = Run(model)
        run.model(images(0, 64).to(ONE)).square().mean().backward()
        run.optimizer.zero_grad()
        taken[dtype] = device.in_use(0) - before
    assert taken["float32"] - taken["bfloat16"] >= 2 * run.pool.starts[-1]


def test_kernels_after_the_last_pick_grow_by_few_with_each_pick(device):
    counts = {}
    for rounds in (2, 6):
        model = adapt(Stack().to(ONE), rho=0, selection_steps=4)
        selector = SFASelector(model, total_steps=4 * rounds)
        run = Run(model, {"fused": True}, selector=selector)
        run.steps(4 * rounds + 1)
        with device.watched() as report:
            run.step()
        counts[rounds] = sum(
            n for (_, at), n in report.kernels.items() if at.startswith("sparse/optimizer.py")
        )
    assert counts[6] - counts[2] <= 4 * 6


def test_the_memory_of_a_pick_does_not_grow_with_what_is_selected(device):
    run = Run(adapt(Stack(4, 128).to(ONE), rho=0, budget=0.9))
    peaks = []
    for _ in range(TOTAL):
        before = run.pool.num_selected
        with device.peak(0) as peak:
            run.step()
        if run.pool.num_selected > before and before:
            peaks.append((before, peak[0]))
    (few, first), (many, last) = peaks[0], peaks[-1]
    assert last - first < 2 * (many - few), peaks


def split(base: Stack) -> Stack:
    base.layers[0].to(ONE)
    base.layers[1].to(TWO)
    base.head.to(TWO)
    return base


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_over_two_devices_trains_as_on_one(device, name, optimizer):
    run = Run(adapt(split(Stack()), **OPTIONS[name]), OPTIMIZERS[optimizer])
    run.steps(1)
    for picked, report in run.watched(device, TOTAL + 2):
        most = AT_A_PICK + 2 if picked else 0
        assert report.own_waits.total() <= most, report.own_waits
    assert_same(run, Run(adapt(Stack().to(ONE), **OPTIONS[name]), OPTIMIZERS[optimizer]).steps(18))


def test_each_device_keeps_originals_of_its_own_layers_only(device):
    kept = {}
    for base in (split(Stack()), Stack().to(ONE)):
        run = Run(adapt(base, rho=0)).steps(TOTAL)
        run.model(torch.zeros(1, 16).to(ONE))
        for (_, where), buffer in run.pool._buffers.items():
            kept.setdefault(len(kept) // 2, {})[str(where)] = buffer.numel()
        held = {where: b.numel() for (_, where), b in run.pool._buffers.items()}
        assert sum(held.values()) == run.pool.num_selected


# --- models that are moved -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_a_selector_may_be_made_before_the_model_is_moved(name):
    model = adapt(Stack(), **OPTIONS[name])
    selector = SFASelector(model, total_steps=TOTAL)
    run = Run(model.to(ONE), selector=selector).steps()
    assert_same(run, Run(adapt(Stack().to(ONE), **OPTIONS[name])).steps())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_may_be_moved_while_it_trains(name):
    run = Run(adapt(Stack().to(ONE), **OPTIONS[name]), kind=torch.optim.SGD)
    for where in (TWO, ONE, TWO):
        run.steps(4)
        run.model.to(where)
    run.steps(3)
    stays = Run(adapt(Stack().to(ONE), **OPTIONS[name]), kind=torch.optim.SGD).steps()
    assert_same(run, stays)


def test_moving_while_all_candidates_train_is_one_clear_error():
    model = adapt(Stack(), score="weight_difference")
    selector = SFASelector(model, total_steps=TOTAL)
    run = Run(model.to(ONE), selector=selector)
    with pytest.raises(SelectionError, match=r"on cpu.*moved to pretended:0.*after model\.to"):
        run.step()
