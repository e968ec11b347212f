# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading

import pytest
import torch

from sfa_peft import SFAError
from sfa_peft.tasks.thread_claims import Claim, Claims
from tests.tasks.models import NAMES, PIXELS, answer, depth_model, output


def in_thread(function):
    """Run a function in a thread called `second`; return its result or error."""
    box = []

    def body():
        try:
            box.append(function())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=body, name="second")
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return box[0]


def test_another_task_in_another_thread_is_refused_while_one_is_in_use(bank, expected):
    with bank.activate("segmentation"):
        for use in (
            lambda: bank.activate("depth"),
            lambda: bank.run("depth", PIXELS),
            lambda: bank["depth"].model(PIXELS),
            lambda: bank.remove("depth"),
            lambda: bank.activate("depth", wait=0.05),
        ):
            error = in_thread(use)
            assert isinstance(error, SFAError)
            assert "thread `MainThread` is using `segmentation`" in str(error)
        assert torch.equal(output(bank, "segmentation"), expected["segmentation"])
    assert torch.equal(in_thread(lambda: output(bank, "depth")), expected["depth"])


def test_the_same_task_may_be_used_by_two_threads(bank, expected):
    with bank.activate("depth"):
        assert torch.equal(in_thread(lambda: output(bank, "depth")), expected["depth"])


def test_a_task_below_the_inner_one_is_not_lost_to_another_thread(bank, expected):
    with bank.activate("segmentation"), bank.activate("depth"):
        error = in_thread(lambda: bank.activate("depth"))
    assert "is using `segmentation`" in str(error)


def test_who_holds_a_task_beside_others_cannot_wait_for_another(bank):
    inside, done = threading.Event(), threading.Event()

    def hold():
        with bank.activate("depth"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold, name="holder")
    thread.start()
    inside.wait(60)
    try:
        with (
            bank.activate("depth"),
            pytest.raises(SFAError, match=r"`holder` is using `depth`.*cannot wait"),
        ):
            bank.activate("segmentation", wait=True)
    finally:
        done.set()
        thread.join(60)


def test_waiting_threads_get_their_turn_and_the_right_bits(bank, expected):
    wrong, failed = [], []

    def work(seed: int):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(8):
                name = NAMES[int(torch.randint(3, (1,), generator=generator))]
                got = answer(bank.run(name, PIXELS, wait=True))
                if not torch.equal(got, expected[name]):
                    wrong.append(name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed
    assert not wrong


def test_adding_and_removing_need_the_bank_for_themselves(bank, folders):
    with bank.activate("depth"):
        with pytest.raises(SFAError, match="removing `depth`: end this thread's"):
            bank.remove("depth")
        with pytest.raises(SFAError, match="adding `again`: end this thread's"):
            bank.add("again", folders["depth"], depth_model())


def test_a_failing_forward_lets_go(bank, expected):
    with pytest.raises(RuntimeError, match="channels"):
        bank.run("depth", PIXELS[:, :2])
    found = in_thread(lambda: output(bank, "segmentation"))
    assert torch.equal(found, expected["segmentation"])


def test_blocks_that_end_out_of_order_are_named(bank, expected):
    first, second = bank.activate("depth"), bank.activate("segmentation")
    first.__enter__()
    second.__enter__()
    with pytest.raises(SFAError, match="reverse order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(in_thread(lambda: output(bank, "depth")), expected["depth"])


def test_who_waits_comes_in_order_also_behind_others_that_could_join():
    switched, order = [], []
    claims = Claims(switched.append)
    started = threading.Semaphore(0)

    def work(key: str):
        started.release()
        with claims.hold(Claim(key, f"using {key}"), wait=60):
            order.append(key)

    threads = [threading.Thread(target=work, args=(key,)) for key in ("b", "a", "b", "c")]
    with claims.hold(Claim("a", "using a")):
        for number, thread in enumerate(threads, 1):
            thread.start()
            started.acquire()
            while len(claims._queue) < number:
                thread.join(0.001)
    for thread in threads:
        thread.join(60)
    assert order == ["b", "a", "b", "c"]
    assert switched == ["a", "b", "a", "b", "c"]
    assert not claims._queue
    assert not claims.is_held_here


def test_an_outer_claim_is_taken_up_again_and_the_same_one_needs_no_switch():
    switched = []
    claims = Claims(switched.append)
    with claims.hold(Claim("a", "")), claims.hold(Claim("a", "")):
        with claims.hold(Claim("b", "")):
            pass
        assert switched == ["a", "b", "a"]
    assert switched == ["a", "b", "a"]


def test_a_switch_that_fails_leaves_no_claim():
    def fail(key):
        raise RuntimeError(key)

    claims = Claims(fail)
    with pytest.raises(RuntimeError, match="a"), claims.hold(Claim("a", "")):
        pass
    assert not claims.is_held_here


def test_waiting_ends_after_the_time_given():
    claims = Claims(lambda key: None)

    def ask():
        with claims.hold(Claim("b", "using b"), wait=0.05):
            pass

    with claims.hold(Claim("a", "using a")):
        error = in_thread(ask)
    assert "thread `MainThread` is using a" in str(error)
    assert "Waited 0.05 s." in str(error)
    assert not claims._queue
