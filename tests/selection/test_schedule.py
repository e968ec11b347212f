# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import SelectionError
from sfa_peft.selection.schedule import make_schedule


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
    assert "too short for 20 rounds of 2000" in caplog.text
    assert make_schedule(7, None, 10).selection_steps == 1


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
