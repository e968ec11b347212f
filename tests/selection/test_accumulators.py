# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfa_peft import ConfigError, GradientWarning, SelectionError, SFAConfig, register_score
from sfa_peft.selection import accumulators, scores
from sfa_peft.selection.accumulators import (
    Accumulator,
    add_rounded,
    check_scores,
    noise_on,
    round_stochastically,
)
from sfa_peft.selection.scores import find_score

SHAPE = (6, 5)


@pytest.fixture
def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gradients():
    """Four update steps of three micro-batches that partly cancel."""
    return torch.randn(4, 3, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def own_scores():
    before = dict(scores._SCORES)
    yield register_score
    scores._SCORES.clear()
    scores._SCORES.update(before)


def _feed(accumulator, gradients):
    for step in gradients:
        for micro in step:
            accumulator(micro)
        accumulator.end_step()
    return accumulator.source().read(0, gradients[0, 0].numel()).view(SHAPE)


DENSE = {
    "accumulated_gradient": lambda w, steps: steps.sum(0),
    "absolute_gradient": lambda w, steps: steps.abs().sum(0),
    "squared_gradient": lambda w, steps: steps.square().sum(0),
    "movement": lambda w, steps: (steps * w).sum(0),
}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", DENSE)
def test_a_score_equals_its_formula_over_the_gradients_of_update_steps(
    name, scale, weight, gradients
):
    loss_scale = None if scale is None else lambda tensor: tensor * scale
    accumulator = Accumulator(find_score(name), lambda: weight, loss_scale=loss_scale)
    got = _feed(accumulator, gradients * (scale or 1))
    # The gradient of an update step is the sum of its micro-batches', and only then is it squared.
    torch.testing.assert_close(got, DENSE[name](weight, gradients.sum(1)), rtol=1e-5, atol=1e-6)
    accumulator.reset()
    torch.testing.assert_close(_feed(accumulator, gradients * (scale or 1)), got)


@pytest.mark.parametrize("name", ["absolute_gradient", "squared_gradient"])
def test_micro_batches_that_cancel_leave_no_trace(name, weight):
    accumulator = Accumulator(find_score(name), lambda: weight)
    accumulator(torch.ones(SHAPE))
    accumulator(-torch.ones(SHAPE))
    accumulator.end_step()
    assert not accumulator.state.any()


@pytest.mark.parametrize("name", DENSE)
def test_a_dropped_step_leaves_no_trace(name, weight, gradients):
    accumulator = Accumulator(find_score(name), lambda: weight, loss_scale=lambda tensor: tensor)
    accumulator(torch.full(SHAPE, float("inf")))
    accumulator.drop_step()
    accumulator.end_step()
    torch.testing.assert_close(
        _feed(accumulator, gradients),
        DENSE[name](weight, gradients.sum(1)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", DENSE)
def test_a_bfloat16_state_is_right_on_average_and_repeats(name):
    size = 20_000
    weight = torch.full((size,), 2.0)
    steps = torch.full((50, size), 0.013)
    states = []
    for _ in range(2):
        accumulator = Accumulator(find_score(name), lambda: weight, dtype="bfloat16", key="w")
        for step in steps:
            accumulator(step)
            accumulator.end_step()
        assert accumulator.state.dtype == torch.bfloat16
        states.append(accumulator.source().read(0, size))
    assert torch.equal(*states)
    expected = float(DENSE[name](weight, steps)[0])
    assert abs(float(states[0].mean()) / expected - 1) < 1e-3


def test_the_state_keeps_gradients_of_any_dtype_and_layout(weight):
    accumulator = Accumulator(find_score("absolute_gradient"), lambda: weight)
    gradient = torch.randn(SHAPE[::-1]).bfloat16().T
    accumulator(gradient)
    gradient.zero_()  # what a backward hands over belongs to it
    accumulator.end_step()
    assert accumulator.state.dtype == torch.float32
    assert accumulator.state.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_own_score_gets_weight_gradient_and_state(own_scores, weight, dtype, in_place):
    def largest(w, gradient, state):
        new = torch.maximum(state, (w * gradient).abs())
        return state.copy_(new) if in_place else new

    own_scores("largest", largest)
    weight = weight.bfloat16().float()
    accumulator = Accumulator(find_score("largest"), lambda: weight, dtype=dtype, key="w")
    signs = torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1, 1).expand(3, 1, *SHAPE)
    assert torch.equal(_feed(accumulator, signs), 2 * weight.abs())
    assert accumulator.state.dtype == getattr(torch, dtype)


def test_an_own_score_that_returns_the_weight_itself_does_not_lose_it(own_scores, weight):
    own_scores("size", lambda w, g, s: w)
    before = weight.clone()
    accumulator = Accumulator(find_score("size"), lambda: weight)
    _feed(accumulator, torch.ones(2, 1, *SHAPE))
    accumulator.reset()
    assert torch.equal(weight, before)
    assert not accumulator.state.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda w, g, s: s.sum(), r"\[\]"),
        (lambda w, g, s: s[:1], r"\[1, 5\]"),
        (lambda w, g, s: None, "NoneType"),
        (lambda w, g, s: 3.0, "float"),
    ],
)
def test_an_own_score_that_returns_something_else_is_named(
    own_scores, weight, function, got, dtype
):
    own_scores("odd", function)
    accumulator = Accumulator(find_score("odd"), lambda: weight, key="first.weight", dtype=dtype)
    message = rf"score='odd'.*`first\.weight`, a tensor of shape \[6, 5\], but it returned {got}"
    with pytest.raises(SelectionError, match=message):
        _feed(accumulator, torch.ones(1, 1, *SHAPE))


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("two words", abs, "expected a word as the name, got 'two words'"),
        ("", abs, "expected a word"),
        (["a"], abs, "expected a word"),
        ("magnitude", abs, "'magnitude' is a score of sfa_peft"),
        ("weight_difference", abs, "is a score of sfa_peft"),
        ("fine", None, "expected a function"),
    ],
)
def test_what_cannot_be_registered_is_refused(own_scores, name, function, message):
    with pytest.raises(ConfigError, match=message):
        own_scores(name, function)


def test_an_own_score_may_be_replaced_and_an_unknown_one_is_refused(own_scores):
    own_scores("mine", lambda w, g, s: s)
    own_scores("mine", lambda w, g, s: s + 1)
    assert find_score("mine").update(None, None, torch.zeros(())) == 1
    assert SFAConfig(score="mine").selects_while_training
    for unknown in ("your", ["mine"], None):
        with pytest.raises(ConfigError, match="must be registered first"):
            SFAConfig(score=unknown)


# --- gradients that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"can_drop": True}, {"loss_scale": lambda tensor: 8 * tensor}],
    ids=["plain", "can drop", "scaled"],
)
@pytest.mark.parametrize("name", DENSE)
def test_a_gradient_that_is_not_finite_never_enters_a_score(
    name, options, dtype, bad, weight, gradients
):
    got = []
    for disturbed in (False, True):
        accumulator = Accumulator(find_score(name), lambda: weight, dtype=dtype, key="w", **options)
        for step in gradients:
            for micro in step:
                accumulator(micro)
            if disturbed:
                broken = torch.full(SHAPE, 1e30)  # finite entries of such a gradient are no better
                broken[2, 3] = bad
                accumulator(broken)
            accumulator.end_step()
        got.append(accumulator.source().read(0, weight.numel()))
        assert int(accumulator.left_out) == 4 * disturbed
    if dtype == "float32":
        assert torch.equal(*got)
    else:  # rounded with other noise
        torch.testing.assert_close(*got, rtol=0.05, atol=0.05)
    accumulator.reset()
    assert int(accumulator.left_out) == 0


def test_a_broken_gradient_of_a_dropped_step_is_not_missed(weight):
    accumulator = Accumulator(find_score("movement"), lambda: weight, can_drop=True)
    accumulator(torch.full(SHAPE, float("inf")))
    accumulator.drop_step()
    accumulator.end_step()
    assert int(accumulator.left_out) == 0


def test_what_is_missing_from_scores_is_said_once_with_a_number(weight, own_scores):
    own_scores("broken", lambda w, g, s: s.fill_(float("nan")))
    names = {"a": "movement", "b": "movement", "c": "absolute_gradient", "d": "broken"}
    made = {n: Accumulator(find_score(s), lambda: weight) for n, s in names.items()}
    assert not check_scores(made)  # there are none yet
    for name, count in {"a": 0, "b": 2, "c": 1, "d": 0}.items():
        for _ in range(count):
            made[name](torch.full(SHAPE, float("nan")))
        made[name](torch.ones(SHAPE))
        made[name].end_step()
    with pytest.warns(GradientWarning) as caught:
        assert check_scores(made)
    assert [str(w.message).partition(" of this round")[0] for w in caught] == [
        "`b` (and some of 1 other tensors): 2 gradients",
        "`d`: scores are NaN or infinite; those weights are skipped.",
    ]


# --- stochastic rounding -----------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [1.003, -1.003, 3.1415926, -1e-5, 1e-39, 123456.7])
def test_the_expected_value_is_the_exact_one(value):
    size, draws = 4096, 64
    exact = torch.full((size,), value)
    bits = exact[:1].view(torch.int32) & -0x10000
    neighbours = torch.cat([bits, bits + 0x10000]).view(torch.float32)
    spread = float((neighbours[1] - neighbours[0]).abs())
    total = torch.zeros(size, dtype=torch.float64)
    for key in range(draws):
        rounded = round_stochastically(exact.clone(), 991 * key)
        assert torch.isin(rounded, neighbours).all()
        total += rounded.double()
    error = float((total / draws - exact.double()).mean()) / spread
    assert abs(error) < 0.01


def test_over_all_offsets_rounding_is_exactly_unbiased():
    # An offset is drawn uniformly for each key; here each one comes once.
    added = 2**-8 * 0.37
    for offset in (0, 12_345):
        tile = noise_on(CPU)[offset : offset + (1 << 16)]
        assert torch.equal(tile.sort().values, torch.arange(1 << 16, dtype=torch.int32))
    exact = torch.full((1 << 16,), 1 + added)
    rounded = round_stochastically(exact, 7)  # one turn of the whole tile
    assert abs(float((rounded - 1).double().mean()) - added) < 2**-23


def test_what_bfloat16_can_hold_is_kept_exactly():
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exact[:4] = torch.tensor([0.0, -0.0, 3.3895e38, -1e-40]).bfloat16().float()
    for offset in (0, 1, 65_535):
        kept = round_stochastically(exact.clone(), offset)
        assert torch.equal(kept.view(torch.int32), exact.view(torch.int32))


def test_infinity_and_nan_stay_what_they_are():
    special = torch.tensor([float("inf"), -float("inf"), float("nan")] * 500)
    # NaNs whose lower bits are all set: adding to them would carry into the sign.
    special.view(torch.int32)[:4] = torch.tensor([0x7FFFFFFF, -1] * 2, dtype=torch.int32)
    rounded = round_stochastically(special.clone(), 3)
    assert torch.equal(rounded.isnan(), special.isnan())
    assert torch.equal(rounded[~special.isnan()], special[~special.isnan()])


def test_the_same_key_rounds_alike_and_another_key_does_not():
    addend = torch.randn(150_000, generator=torch.Generator().manual_seed(1))  # over one tile
    results = []
    for key in "aab":
        target = torch.ones(150_000, dtype=torch.bfloat16)
        add_rounded(target, addend, key)
        results.append(target)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_bits_do_not_depend_on_how_many_are_rounded_together(monkeypatch):
    addend = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    results = []
    for tiles in (1, 4, 256):  # as on a CPU, and as elsewhere
        monkeypatch.setattr(accumulators, "_TILES_ON_CPU", tiles)
        target = torch.ones(400_000, dtype=torch.bfloat16)
        add_rounded(target, addend, "key")
        results.append(target)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # The noise of one tile is not that of the next.
    same = torch.full((400_000,), 1 + 2**-9)
    rounded = round_stochastically(same, 0).view(-1)[: 6 * (1 << 16)].view(6, -1)
    assert float((rounded[0] == rounded[1]).float().mean()) < 0.9


class Launches(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_bfloat16_scores_take_few_times_the_launches_of_float32_ones(monkeypatch):
    monkeypatch.setattr(accumulators, "_TILES_ON_CPU", accumulators._TILES_ELSEWHERE)
    gradient, counts = torch.ones(1 << 20), {}
    for dtype in ("float32", "bfloat16"):
        accumulator = Accumulator(
            find_score("accumulated_gradient"), lambda: gradient, dtype=dtype, key="w"
        )
        accumulator(gradient)
        with Launches() as launches:
            accumulator(gradient)
        counts[dtype] = launches.count
    assert counts["bfloat16"] <= 3 * counts["float32"] <= 36


def test_many_small_steps_add_up_where_plain_rounding_stands_still():
    target, plain = torch.ones(5000, dtype=torch.bfloat16), torch.ones(5000, dtype=torch.bfloat16)
    addend = torch.full((50, 100), 1e-3).T  # any shape, not contiguous
    for step in range(200):
        add_rounded(target, addend, f"w/{step}")
        plain += 1e-3
    assert torch.equal(plain, torch.ones_like(plain))
    assert abs(float(target.float().mean()) - 1.2) < 0.002
    assert float(target.float().std()) < 0.05
