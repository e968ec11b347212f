# SPDX-License-Identifier: Apache-2.0
"""Averages of weights, made the ways that others make them, against averages of dense changes.

The loops are those of torch, timm, ema_pytorch, torch_ema, diffusers and Lightning in few lines;
`test_average_packages.py` runs the packages themselves where they are installed.
"""

import copy
from itertools import chain

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sfa_peft import SFAConfig, SFAError, SFASelector
from sfa_peft.tuner import adapter as adapter_module
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of
from tests.tiny import MLP

DECAY, STEPS = 0.9, 8
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))


def make(**options):
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "selection_steps": 2}
    return get_peft_model(MLP(), SFAConfig(**config | {"modules_to_save": ["head"]} | options))


def train(model, after_step=lambda step: None):
    """Train with three picks, and do something after each step."""
    selector = SFASelector(model, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        model.train()
        batch = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
        after_step(step)
    return model


@torch.no_grad()
def outputs(model, *, training=False):
    return model.train(training)(X)


def same_but_for_rounding(loaded, averaged):
    """Compare outputs; frozen biases and norms are no part of an adapter and may be averages."""
    torch.testing.assert_close(outputs(loaded), outputs(averaged), rtol=0, atol=1e-6)


class DenseAverage:
    """The average of a model's dense changes and of its head, whatever slots changes lie in."""

    def __init__(self, model, *, copies_first=False):
        self.copies_first = copies_first
        self.average = self._dense(model)

    @staticmethod
    def _dense(model):
        head = model.get_base_model().head.modules_to_save["default"].state_dict()
        head = {f"head.{name}": tensor.clone() for name, tensor in head.items()}
        return deltas_of(find_pool(model, "default")) | head

    def update(self, model):
        weight = 1.0 if self.copies_first else 1 - DECAY
        for name, tensor in self._dense(model).items():
            self.average[name].lerp_(tensor, weight)
        self.copies_first = False

    def check(self, found):
        model = MLP()
        with torch.no_grad():
            for name, tensor in self.average.items():
                weight = model.get_parameter(name)
                weight.copy_(tensor if name.startswith("head") else weight + tensor)
            torch.testing.assert_close(found, model(X), rtol=0, atol=2e-6)


# --- teachers: a second model ------------------------------------------------------------------


@torch.no_grad()
def over_parameters(teacher, student):
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        own.mul_(DECAY).add_(other, alpha=1 - DECAY)


@torch.no_grad()
def over_data(teacher, student):
    """As ema_pytorch: floating-point tensors, where version counters do not see it."""
    tensors = [chain(m.parameters(), m.buffers()) for m in (teacher, student)]
    for own, other in zip(*tensors, strict=True):
        if own.is_floating_point():
            own.data.lerp_(other.data, 1 - DECAY)


@torch.no_grad()
def over_state_dicts(teacher, student):
    """As timm's ModelEmaV2, positions included."""
    states = [m.state_dict().values() for m in (teacher, student)]
    for own, other in zip(*states, strict=True):
        own.copy_(DECAY * own + (1 - DECAY) * other)


def averaged(student, **options):
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)


def frozen_copy(student):
    return copy.deepcopy(student).requires_grad_(False)


TEACHERS = {
    "parameters": (copy.deepcopy, over_parameters),
    "parameters of a frozen copy": (frozen_copy, over_parameters),
    "data": (frozen_copy, over_data),
    "state dicts": (copy.deepcopy, over_state_dicts),
    "AveragedModel": (averaged, AveragedModel.update_parameters),
    "AveragedModel with buffers": (
        lambda student: averaged(student, use_buffers=True),
        AveragedModel.update_parameters,
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_computes_with_the_average_at_every_step(name, training):
    build, update = TEACHERS[name]
    student = make()
    teacher = build(student)
    wanted = DenseAverage(student, copies_first=name.startswith("AveragedModel"))

    def after_step(step):
        update(teacher, student)
        wanted.update(student)
        if step % 3 != 1:  # not always, so that picks come with and without a forward between
            wanted.check(outputs(teacher, training=training))

    train(student, after_step)
    wanted.check(outputs(teacher))
    alone = find_pool(train(make()), "default")
    assert torch.equal(find_pool(student, "default").values, alone.values)
    assert torch.equal(find_pool(student, "default").slots, alone.slots)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_saved_with_its_positions_on_the_base_it_was_copied_with(name, tmp_path):
    build, update = TEACHERS[name]
    student = make()
    teacher = build(student)
    train(student, lambda step: update(teacher, student))
    saved = teacher.module if isinstance(teacher, AveragedModel) else teacher
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path)
    same_but_for_rounding(loaded, teacher)


def test_a_teacher_updated_between_forward_and_step_keeps_its_own_base(tmp_path):
    student = make()
    teacher = copy.deepcopy(student)

    def after_step(step):
        outputs(student)  # parameters() hold adapted values now
        over_parameters(teacher, student)
        outputs(teacher)

    train(student, after_step)
    teacher.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path)
    same_but_for_rounding(loaded, teacher)


def test_a_teacher_that_is_no_copy_takes_positions_with_the_buffers():
    student, teacher = make(), make()
    teacher.load_state_dict(student.state_dict())
    wanted = DenseAverage(student)

    def after_step(step):
        over_parameters(teacher, student)
        for own, other in zip(teacher.buffers(), student.buffers(), strict=True):
            own.copy_(other)
        wanted.update(student)
        wanted.check(outputs(teacher))

    train(student, after_step)


def test_a_teacher_without_positions_is_one_clear_error():
    student, teacher = make(), make()
    teacher.load_state_dict(student.state_dict())
    outputs(teacher)
    train(student, lambda step: over_parameters(teacher, student))
    for _ in range(2):
        with pytest.raises(SFAError, match=r"positions are not.*Copy buffers too"):
            outputs(teacher)
    with pytest.raises(SFAError, match="positions are not"):
        teacher.state_dict()
    for own, other in zip(teacher.buffers(), student.buffers(), strict=True):
        own.copy_(other)
    outputs(teacher)


def test_a_teacher_that_is_no_copy_and_has_averaged_positions_is_one_clear_error():
    student, teacher = make(), make()
    teacher.load_state_dict(student.state_dict())
    outputs(teacher)
    with pytest.raises(SFAError, match="positions are not"):
        train(student, lambda step: over_state_dicts(teacher, student))


def test_a_copy_that_trains_on_by_itself_follows_nobody():
    student = train(make())
    other = copy.deepcopy(make())
    train(other)
    assert torch.equal(outputs(other), outputs(student))
    slots = find_pool(other, "default").slots.clone()
    find_pool(other, "default").slots.data.div_(2, rounding_mode="floor")
    assert torch.equal(outputs(other), outputs(student))
    assert torch.equal(find_pool(other, "default").slots, slots)


# --- averages that visit the model itself ------------------------------------------------------


class Shadow:
    """As torch_ema and diffusers' EMAModel: a list, copied into the model and back by `.data`."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        for own, parameter in zip(self.shadow, self.parameters, strict=True):
            own.sub_((own - parameter) * (1 - DECAY))

    def store(self):
        self.stored = [p.detach().clone() for p in self.parameters]

    def copy_to(self, tensors=None):
        for own, parameter in zip(tensors or self.shadow, self.parameters, strict=True):
            parameter.data.copy_(own)

    def restore(self):
        self.copy_to(self.stored)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("forward_first", [False, True])
def test_an_average_visits_the_model_and_leaves_no_bit(of_all, forward_first, compiled):
    model = make()
    call = torch.compile(model, backend="eager") if compiled else model
    shadow = Shadow(p for p in model.parameters() if of_all or p.requires_grad)
    wanted = DenseAverage(model)

    def after_step(step):
        shadow.update()
        wanted.update(model)
        before = outputs(call) if forward_first else None
        shadow.store()
        shadow.copy_to()
        wanted.check(outputs(call))
        shadow.restore()
        if step % 2:
            after = outputs(call)
            assert before is None or torch.equal(after, before)

    train(model, after_step)
    alone = train(make())
    assert torch.equal(outputs(model), outputs(alone))
    base = {n: t for n, t in model.unload().state_dict().items() if not n.startswith("head")}
    assert all(torch.equal(tensor, MLP().state_dict()[name]) for name, tensor in base.items())


@pytest.mark.parametrize("buffers", [False, True])
def test_models_that_swap_all_their_tensors_for_a_validation_swap_them_back(buffers):
    """As Lightning's EMAWeightAveraging, whose default is to average buffers too."""
    model = make()
    teacher = averaged(model, use_buffers=buffers)
    wanted = DenseAverage(model, copies_first=True)

    def swap():
        tensors = [chain(m.parameters(), m.buffers()) for m in (teacher.module, model)]
        for one, other in zip(*tensors, strict=True):
            kept = one.data.clone()
            one.data.copy_(other.data)
            other.data.copy_(kept)

    def after_step(step):
        outputs(model)
        teacher.update_parameters(model)
        wanted.update(model)
        swap()
        wanted.check(outputs(model))
        swap()

    train(model, after_step)
    assert torch.equal(outputs(model), outputs(train(make())))


# --- averages of state dicts -------------------------------------------------------------------


def test_positions_that_were_averaged_are_refused_by_name():
    model = train(make())
    states = [{n: t.clone() for n, t in model.state_dict().items()} for _ in range(3)]
    mean = {n: sum(s[n] for s in states) / 3 for n in states[0]}
    with pytest.raises(SFAError, match=r"sfa_slots\.default: positions as torch.float32"):
        model.load_state_dict(mean)


def test_a_mean_of_state_dicts_keeps_the_base_and_loads_onto_it_again(tmp_path):
    model, states = make(), []
    train(model, lambda step: states.append({n: t.clone() for n, t in model.state_dict().items()}))
    few = states[-3:]
    mean = {
        n: sum(s[n] for s in few) / 3 if t.is_floating_point() else t for n, t in few[-1].items()
    }
    assert any(not torch.equal(mean[n], few[0][n]) for n in mean if "base_layer" in n)
    model.load_state_dict(mean)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path)
    same_but_for_rounding(loaded, model)


# --- what it costs -----------------------------------------------------------------------------


def test_frozen_adapters_and_steps_of_training_are_not_looked_at(monkeypatch, tmp_path):
    looks = []
    monkeypatch.setattr(adapter_module, "notice", looks.append)
    model = make()
    model.save_pretrained(tmp_path)
    looks.clear()
    for training in (False, True):
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        outputs(loaded, training=training)
        loaded.train(training)(X)
        loaded.state_dict()
    assert not looks
    train(model)
    assert len(looks) == 1
    train(model, lambda step: outputs(model))
    assert len(looks) == 2 * STEPS  # each evaluation, and each step after one
