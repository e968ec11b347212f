# SPDX-License-Identifier: Apache-2.0
"""One pass from adapter to adapter: the same bits, and nothing kept beyond its time or bound."""

import gc
import threading

import pytest
import torch

from sfa_peft import SFAError, limit_switch_memory
from sfa_peft.sparse import pairs, write_lock
from sfa_peft.tuner.adapted_layers import find_pool
from tests.behaviour.test_switching import check
from tests.switching_kit import ACTIONS, Kit, Session, assert_equal, layers_of, output, weights_of

LIMIT = pairs._LIMIT


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Count the pairs that are used; every test begins without any."""
    found = []
    find = pairs.Pairs.find

    def counted(self, key):
        pair = find(self, key)
        found.append(pair is not None)
        return pair

    limit_switch_memory(0)
    limit_switch_memory(LIMIT)
    # Entries of other tests are gone, and new ones may have their ids.
    monkeypatch.setattr(pairs.PAIRS, "_met", set())
    monkeypatch.setattr(pairs.Pairs, "find", counted)
    yield found
    limit_switch_memory(LIMIT)


def switch(model, times=6):
    for _ in range(times // 2):
        model.set_adapter("two")
        model.set_adapter("one")


def hot_session(kind="mlp", dtype=torch.float32):
    session = Session(Kit(kind, dtype))
    switch(session.model)
    return session


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mlp", "head"])
def test_a_pair_is_written_in_one_pass_from_the_third_switch_on(kind, dtype, used):
    session = Session(Kit(kind, dtype))
    model = session.model
    model.set_adapter("two")
    model.set_adapter("one")
    one = weights_of(model)
    model.set_adapter("two")
    two = weights_of(model)
    for _ in range(3):
        used.clear()
        model.set_adapter("one")
        assert_equal(weights_of(model), one)
        model.set_adapter("two")
        assert_equal(weights_of(model), two)
    assert used == [True] * 2 * len(two)
    check(session, "merge_and_unload")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_are_disabled_again_give_way_in_one_pass_too(dtype, used):
    kit = Kit("mlp", dtype)
    model, pretrained = kit.start(), [kit.bare().body.first.weight, kit.bare().body.second.weight]
    switch(model, 2)
    for number in range(4):
        for name in ("one", "two"):
            model.set_adapter(name)
            used.clear()
            with model.disable_adapter():
                assert_equal(weights_of(model), pretrained)
                assert used == [number >= 2] * 2
            fresh = kit.fresh(model, [name])
            output(fresh, kit.batch(dtype))  # writes
            output(model, kit.batch(dtype))
            assert_equal(weights_of(model), weights_of(fresh))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_done_between_switches_the_model_is_as_a_fresh_one(action, dtype):
    session = hot_session(dtype=dtype)
    session.do(action)
    for name in ("one", "other", "one", "other"):
        session.do(name)
    check(session, "both")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_pair_takes_no_more_memory_than_the_weight(share):
    kit = Kit("mlp", torch.float32)
    model = kit.start()
    for seed, name in enumerate(("one", "two")):
        pool = find_pool(model, name)
        count = int(share * pool.starts[-1])
        order = torch.randperm(pool.starts[-1], generator=torch.Generator().manual_seed(seed))
        slots = torch.full_like(pool.slots, -1)
        slots[:count] = order[:count].sort().values
        values = pool.values.detach().clone()
        values[count:] = 0
        pool.load_state_dict({"values": values, "slots": slots})
    switch(model)
    kept = list(pairs.PAIRS._kept.values())
    assert len(kept) == 4
    assert [pair.indices is None for pair in kept] == [share == 0.5] * 4
    everything = 2 * sum(weight.nbytes for weight in weights_of(model))
    assert (pairs.PAIRS.nbytes == everything) == (share == 0.5)
    assert 0 < pairs.PAIRS.nbytes <= everything
    for name in ("two", "one"):
        model.set_adapter(name)
        fresh = kit.fresh(model, [name])
        output(fresh, kit.batch(torch.float32))  # writes
        assert_equal(weights_of(model), weights_of(fresh))


def test_a_weight_that_somebody_changed_is_written_as_without_pairs(used):
    found = []
    for limit in (LIMIT, 0):
        limit_switch_memory(limit)
        model = hot_session().model
        with torch.no_grad():
            layers_of(model)[0].weights["weight"].tensor.mul_(2)
        used.clear()
        model.set_adapter("two")
        if limit:
            assert used == [True]  # the other layer's
        found.append(weights_of(model))
        switch(model)
        found.append(weights_of(model))
    assert_equal(found[0], found[2])
    assert_equal(found[1], found[3])


def test_training_one_of_two_ends_their_pairs(used):
    session = hot_session()
    before = pairs.PAIRS.nbytes
    assert before > 0
    session.model.train()
    session.do("train")
    session.model.eval()
    used.clear()
    session.model.set_adapter("two")
    assert not any(used)
    session.model.set_adapter("one")
    gc.collect()
    assert pairs.PAIRS.nbytes < before
    check(session, "unload")


def test_nothing_is_kept_once_a_model_is_gone():
    session = hot_session()
    assert pairs.PAIRS.nbytes > 0
    del session
    gc.collect()
    assert pairs.PAIRS.nbytes == 0


def test_no_more_is_kept_than_allowed_and_the_rest_is_written_in_two_passes(used):
    session = hot_session()
    everything = limit_switch_memory(LIMIT)
    used.clear()
    switch(session.model, 2)
    assert all(used)
    some = limit_switch_memory(everything // 2)
    assert 0 < some <= everything // 2
    used.clear()
    switch(session.model, 8)
    assert any(used)
    assert not all(used)
    assert limit_switch_memory(everything // 2) <= everything // 2
    assert limit_switch_memory(0) == 0
    used.clear()
    switch(session.model, 8)
    assert not any(used)
    check(session, "unload")


def test_pairs_that_are_no_longer_used_give_way(used):
    first = hot_session()
    everything = limit_switch_memory(LIMIT)
    limit_switch_memory(limit := int(1.2 * everything))  # no room for another pair
    second = hot_session(dtype=torch.float32)
    switch(second.model, 200)
    used.clear()
    switch(second.model, 2)
    assert all(used)
    assert limit_switch_memory(limit) <= limit
    for session in (first, second):
        check(session, "unload")


def test_threads_that_switch_models_of_their_own_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(write_lock, "_WORTH_THREADS", 0)
    sessions = [hot_session() for _ in range(3)]
    limit_switch_memory(limit_switch_memory(LIMIT) // 2)
    threads = [threading.Thread(target=switch, args=(s.model, 60)) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        check(session, "merge_and_unload")


def test_blocks_are_written_block_by_block_with_the_same_bits(used):
    kit = Kit("mlp", torch.float32)
    model = kit.start()
    for seed, name in enumerate(("one", "two")):
        pool = find_pool(model, name)
        blocks = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:5]
        chosen = (16 * blocks.sort().values[:, None] + torch.arange(16)).flatten()
        start = pool.starts[1]
        slots = torch.full_like(pool.slots, -1)
        slots[: chosen.numel()] = chosen + start
        pool.load_state_dict({"values": pool.values.detach(), "slots": slots})
    switch(model)
    weight = layers_of(model)[1].weights["weight"]
    assert weight.finished["one"].undo.shape == (5, write_lock.BLOCK)
    for name in ("two", "one", "two"):
        used.clear()
        model.set_adapter(name)
        assert all(used)
        fresh = kit.fresh(model, [name])
        output(fresh, kit.batch(torch.float32))  # writes
        assert_equal(weights_of(model), weights_of(fresh))
        assert weight.is_as_written()
    with model.disable_adapter():
        assert torch.equal(weight.tensor, kit.bare().body.second.weight)


@pytest.mark.parametrize("nbytes", [-1, True, 1.5, "1GB", None])
def test_a_limit_that_is_no_number_of_bytes_is_refused(nbytes):
    with pytest.raises(SFAError, match="expected a number of bytes, 0 or more, got"):
        limit_switch_memory(nbytes)
