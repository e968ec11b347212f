# SPDX-License-Identifier: Apache-2.0
"""Every score, ranking, granularity and schedule against the dense reference, step by step."""

import copy
import itertools

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SelectionError, SFAConfig, SFASelector, register_score
from sfa_peft.selection import scores
from sfa_peft.selection.topk import RandomSource
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import DenseReference, assert_same, masks_of
from tests.tiny import MLP

BETAS, EPS = (0.9, 0.999), 1e-3  # an eps that keeps rounding of tiny gradients small
TOTAL, ROUND = 21, 4
NAMES = ("first.weight", "first.bias", "second.weight")
SCORES = (*DenseReference.SCORE_STEPS, "weight_difference", "largest")
KINDS = [*itertools.product(("global", "layer"), ("weight", "block", "row")), ("output", "weight")]


def largest(weight, gradient, state):
    return torch.maximum(state, (gradient * weight).abs())


@pytest.fixture(autouse=True)
def _own_score():
    register_score("largest", largest)
    yield
    del scores._SCORES["largest"]


def build(reference_options=None, **options):
    base = MLP()
    dense = copy.deepcopy(base).requires_grad_(False)
    config = SFAConfig(
        budget=0.4,
        rho=0,
        target_modules=["first", "second"],
        target_parameters=["first.bias"],
        selection_steps=ROUND,
        **({"select_until": 1} | options),
    )
    model = get_peft_model(base, config)
    pool = find_pool(model, "default")
    assert pool.names == list(NAMES)
    parameters = dict(dense.named_parameters())
    score = options.get("score", "accumulated_gradient")
    reference = DenseReference(
        {n: parameters[n] for n in NAMES},
        pool.values.numel(),
        TOTAL,
        ROUND,
        score=largest if score == "largest" else score,
        ranking=options.get("ranking", "global"),
        granularity=options.get("granularity", "weight"),
        **(reference_options or {}),
    )
    return model, dense, pool, reference


def run(model, dense, pool, reference, micro_batches=2, decay=0.1):
    selector = SFASelector(model, total_steps=TOTAL)
    optimizer = torch.optim.AdamW([pool.values], lr=5e-3, betas=BETAS, eps=EPS, weight_decay=decay)
    generator = torch.Generator().manual_seed(3)
    for _ in range(TOTAL):
        for _ in range(micro_batches):
            x = torch.randn(8, 12, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            for net in (model, dense):
                (torch.nn.functional.cross_entropy(net(x), y) / micro_batches).backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
        reference.step(5e-3, decay, BETAS, EPS)
        assert_same(pool, reference)
    return selector


@pytest.mark.parametrize(("ranking", "granularity"), KINDS)
@pytest.mark.parametrize("score", SCORES)
def test_every_step_equals_the_dense_reference(score, ranking, granularity):
    model, dense, pool, reference = build(score=score, ranking=ranking, granularity=granularity)
    run(model, dense, pool, reference)
    assert reference.selected == pool.num_assigned
    if granularity == "weight":
        assert pool.num_assigned == pool.values.numel()
    else:
        assert pool.num_assigned > pool.values.numel() - 3 * 16  # less than a row (block) of each


@pytest.mark.parametrize(("ranking", "granularity"), KINDS)
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_scores_without_data_are_selected_at_once_and_train_alike(score, ranking, granularity):
    model, dense, pool, reference = build(
        score=score, ranking=ranking, granularity=granularity, seed=5
    )
    ranked = {n: w.abs() for n, w in reference.original.items()}
    if score == "random":
        sources = [
            RandomSource(w.numel(), f"5/{i}", w.device) for i, w in enumerate(ranked.values())
        ]
        ranked = {
            n: s.read(0, s.numel).view(w.shape)
            for (n, w), s in zip(ranked.items(), sources, strict=True)
        }
    reference.targets = {}
    reference.admit(ranked, pool.values.numel())
    assert_same(pool, reference)
    assert run(model, dense, pool, reference).schedule is None


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({"schedule": "one_shot"}, lambda q: {4: q}),
        ({"schedule": "literal"}, lambda q: {4 * i: q * i // 5 for i in range(1, 5)}),
        (
            {"schedule": "cubic"},
            lambda q: {4 * i: q - -(-q * (4 - i) ** 3 // 64) for i in range(1, 5)},
        ),
        ({"select_until": 0.5}, lambda q: {4: q // 2, 8: q}),
    ],
)
def test_other_schedules_equal_the_dense_reference(options, targets):
    size = build()[2].values.numel()
    model, dense, pool, reference = build({"targets": targets(size)}, **options)
    run(model, dense, pool, reference)
    assert pool.num_assigned == max(targets(size).values())


@pytest.mark.parametrize("score", ["accumulated_gradient", "squared_gradient", "largest"])
@pytest.mark.parametrize("every", [3, 9])
def test_with_score_every_the_last_step_of_a_round_and_each_kth_before_it_count(score, every):
    model, dense, pool, reference = build({"every": every}, score=score, score_every=every)
    run(model, dense, pool, reference)


def test_a_wrong_score_in_the_reference_is_noticed():
    model, dense, pool, reference = build(score="absolute_gradient")
    reference.update = DenseReference.SCORE_STEPS["accumulated_gradient"]
    with pytest.raises(AssertionError):
        run(model, dense, pool, reference)


def test_a_bfloat16_score_selects_nearly_the_same_and_repeats():
    masks = []
    for dtype in ("float32", "bfloat16", "bfloat16"):
        model, dense, pool, reference = build(
            {"targets": {4: 10}}, score="movement", score_dtype=dtype, schedule="one_shot"
        )
        with pytest.raises(AssertionError):  # the reference is not asked here
            run(model, dense, pool, reference)
        masks.append(torch.cat([m.flatten() for m in masks_of(pool).values()]))
    assert torch.equal(masks[1], masks[2])
    shared = int((masks[0] & masks[1]).sum()) / int(masks[0].sum())
    assert 0.9 < shared < 1


@pytest.mark.parametrize("score", ["accumulated_gradient", "absolute_gradient", "largest"])
def test_a_call_after_a_micro_batch_without_a_step_does_not_count_nor_forget(score):
    chosen = []
    for often in (False, True):
        model, _, pool, _ = build(score=score)
        selector = SFASelector(model, total_steps=TOTAL)
        optimizer = torch.optim.SGD([pool.values], lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        for _ in range(ROUND):
            for last in (False, True):
                model(torch.randn(8, 12, generator=generator)).square().sum().backward()
                if last:
                    optimizer.step()
                if last or often:
                    assert selector.step(optimizer) == (last and pool.num_assigned > 0)
            optimizer.zero_grad()
        assert selector.update_steps == ROUND
        chosen.append(pool.slots.clone())
    assert torch.equal(*chosen)


def test_an_own_score_that_returns_a_wrong_shape_gives_one_clear_error():
    register_score("odd", lambda w, g, s: g.sum(0))
    try:
        model, _, pool, _ = build(score="odd")
        selector = SFASelector(model, total_steps=TOTAL)
        optimizer = torch.optim.SGD([pool.values], lr=1e-2)
        model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        with pytest.raises(SelectionError, match=r"score='odd'.*shape \[16, 12\].*returned \[12\]"):
            selector.step(optimizer)
    finally:
        del scores._SCORES["odd"]
