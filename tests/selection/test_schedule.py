# SPDX-License-Identifier: Apache-2.0
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import SelectionError
from sfa_peft.selection.schedule import (
    DEFAULT_SELECT_UNTIL,
    SCHEDULES,
    Schedule,
    make_schedule,
    share_by_rates,
)

RUNS = st.integers(2, 400).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t // 2)))
QUOTAS = st.integers(0, 10_000)


@given(st.integers(2, 500), st.data())
def test_picks_come_every_s_steps_and_use_the_whole_budget(total, data):
    steps = data.draw(st.integers(1, total // 2))
    quota = data.draw(st.integers(0, 10_000))
    schedule = make_schedule(total, steps, quota)
    picks = [t for t in range(total + 1) if schedule.is_pick(t)]
    assert picks == [steps * i for i in range(1, total // steps)]
    assert total - picks[-1] >= steps  # the last pick still trains a whole round
    taken = [schedule.selected_after(t) for t in range(total + 1)]
    assert taken == sorted(taken)
    assert taken[-1] == quota
    sizes = [schedule.selected_after(t) - schedule.selected_after(t - 1) for t in picks]
    assert max(sizes) - min(sizes) <= 1


def test_a_long_run_gets_the_papers_rounds_and_a_short_one_a_twentieth(caplog):
    assert make_schedule(80_000, None, 10).selection_steps == 2000
    assert not caplog.records
    assert make_schedule(1000, None, 10).selection_steps == 50
    assert "too short for 20 rounds of 2000: using rounds of 50 steps." in caplog.text
    assert make_schedule(7, None, 10).selection_steps == 1
    assert "using rounds of 1 step." in caplog.text


@pytest.mark.parametrize(
    ("total", "steps", "message"),
    [
        (None, 10, "length of the run is unknown"),
        (100, 51, "selection_steps=51 leaves no pick in a run of 100"),
        (1, None, "no room for a pick"),
    ],
)
def test_a_run_without_a_pick_is_refused(total, steps, message):
    with pytest.raises(SelectionError, match=message):
        make_schedule(total, steps, 10)


@given(RUNS, QUOTAS, st.sampled_from(SCHEDULES))
def test_every_schedule_grows_at_its_picks_only_and_never_beyond_the_quota(run, quota, kind):
    schedule = make_schedule(*run, quota, kind)
    taken = [schedule.selected_after(t) for t in range(run[0] + 1)]
    assert taken[0] == 0
    grown = [t for t in range(1, run[0] + 1) if taken[t] != taken[t - 1]]
    assert all(schedule.is_pick(t) for t in grown)
    assert taken == sorted(taken)
    assert taken[-1] <= quota
    if kind != "literal":
        assert taken[-1] == quota


@given(RUNS, QUOTAS)
def test_cubic_takes_one_minus_the_cube_of_what_is_left(run, quota):
    schedule = make_schedule(*run, quota, "cubic")
    picks = run[0] // run[1] - 1
    for i in range(1, picks + 1):
        exact = quota * (1 - Fraction(picks - i, picks) ** 3)
        assert schedule.selected_after(i * run[1]) == exact // 1
        linear = make_schedule(*run, quota).selected_after(i * run[1])
        assert schedule.selected_after(i * run[1]) >= linear


@given(RUNS, QUOTAS)
def test_literal_makes_n_minus_one_picks_of_an_nth_and_leaves_an_nth(run, quota):
    schedule = make_schedule(*run, quota, "literal")
    rounds = run[0] // run[1]
    for i in range(1, rounds):
        assert schedule.selected_after(i * run[1]) == quota * i // rounds
    assert quota - schedule.selected_after(run[0]) >= quota // rounds


@given(RUNS, QUOTAS)
def test_one_shot_takes_all_after_the_first_round(run, quota):
    schedule = make_schedule(*run, quota, "one_shot")
    assert [t for t in range(run[0] + 1) if schedule.is_pick(t)] == [run[1]]
    assert schedule.selected_after(run[1]) == quota


@given(RUNS, QUOTAS, st.integers(1, 100), st.sampled_from(SCHEDULES))
def test_no_pick_comes_after_select_until_and_the_budget_is_used_before(run, quota, percent, kind):
    total, steps = run
    until = percent / 100
    limit = Fraction(percent, 100) * total
    if limit < steps:
        with pytest.raises(SelectionError, match=f"select_until={until} ends the selection before"):
            make_schedule(total, steps, quota, kind, until)
        return
    schedule = make_schedule(total, steps, quota, kind, until)
    picks = [t for t in range(total + 1) if schedule.is_pick(t)]
    possible = [t for t in range(steps, total - steps + 1, steps) if t <= limit]
    assert picks == (possible[:1] if kind == "one_shot" else possible)
    if kind != "literal":
        assert schedule.selected_after(total) == quota


@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 6))
def test_one_step_in_so_many_is_scored_and_the_last_of_a_round_always(steps, every, rounds):
    schedule = Schedule(steps * rounds, steps, 10)
    for number in range(rounds):
        scored = [
            t
            for t in range(number * steps + 1, (number + 1) * steps + 1)
            if schedule.is_scored(t, every)
        ]
        last = (number + 1) * steps
        if number == rounds - 1:
            assert scored == []  # nothing is picked any more
        else:
            assert scored == sorted(range(last, number * steps, -every))


# --- where it ends by default -----------------------------------------------------------------

#: Rates of a run of 10,000 steps, and the share after which a quarter of their integral is left.
SHARES = {
    "constant": (lambda t: 1.0, 0.75),
    "linear": (lambda t: 1 - t, 0.5),
    "power 0.9": (lambda t: (1 - t) ** 0.9, 1 - 0.25 ** (1 / 1.9)),
    "cosine": (lambda t: 1 + math.cos(math.pi * t), 0.4376),
    "one step down": (lambda t: 1.0 if t < 0.5 else 0.1, 0.5 - (0.55 / 4 - 0.05)),
}


@pytest.mark.parametrize("name", SHARES)
def test_a_quarter_of_the_rates_integral_is_left_after_the_share(name):
    rate, expected = SHARES[name]
    rates = [1e-4 * rate((i + 0.5) / 10_000) for i in range(10_000)]
    assert share_by_rates(rates) == pytest.approx(expected, abs=2e-4)


@given(st.lists(st.floats(1e-6, 1) | st.just(0.0), min_size=1, max_size=300))
def test_the_share_ends_at_the_last_step_that_leaves_a_quarter(rates):
    share = share_by_rates(rates)
    if not sum(rates):
        assert share == DEFAULT_SELECT_UNTIL
        return
    left = [sum(rates[t:]) / sum(rates) for t in range(len(rates) + 1)]
    limit = math.floor(share * len(rates) + 1e-9)
    assert left[limit] >= 0.25 - 1e-6
    assert left[limit + 1] <= 0.25 + 1e-6


def test_rates_that_are_not_known_are_taken_for_a_linear_decay():
    assert share_by_rates(None) == share_by_rates([1 - t / 1000 for t in range(1000)]) == 0.5


@given(st.integers(2, 400), st.floats(1e-3, 1), st.sampled_from(SCHEDULES))
def test_the_default_leaves_one_pick_and_the_literal_schedule_alone(total, until, kind):
    for steps in {1, max(1, total // 7), total // 2}:
        schedule = make_schedule(total, steps, 1000, kind, None, until)
        whole = make_schedule(total, steps, 1000, kind, 1.0)
        assert 1 <= schedule.num_picks <= whole.num_picks
        if kind == "literal":
            assert schedule.last_pick == whole.last_pick
        else:
            assert schedule.last_pick <= max(steps, until * total + 1e-6)
            assert schedule.selected_after(total) == 1000
