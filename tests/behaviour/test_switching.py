# SPDX-License-Identifier: Apache-2.0
"""Whatever is done to a model with several adapters, it ends as a fresh one does, to the bit."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_peft.sparse import write_lock as together_module
from sfa_peft.tuner.adapted_layers import find_pool
from tests.switching_kit import (
    ACTIONS,
    Kit,
    Session,
    assert_equal,
    layers_of,
    output,
    weights_of,
)

DTYPES = [torch.float32, torch.bfloat16]


def check(session: Session, end: str) -> None:
    """Compare with a fresh model: every adapter, the backbone, and what `end` leaves."""
    session.do("unmerge")
    kit, model, dtype = session.kit, session.model.eval(), session.dtype
    batch, bare = kit.batch(dtype), kit.bare().to(dtype)
    for name in list(model.peft_config):
        fresh = kit.fresh(model, [name], session.cast)
        model.set_adapter(name)
        expected = output(fresh, batch)
        own = [layer for layer in layers_of(model) if layer.has_adapter(name)]
        assert len(own) == len(layers_of(fresh))
        assert_equal(weights_of(model), weights_of(fresh))  # before any forward
        assert torch.equal(output(model, batch), expected)
    with model.disable_adapter():
        for layer in layers_of(model):
            if not layer.in_graph:  # else a backward may come, and the forward takes a copy
                assert torch.equal(layer.base_weight, bare.get_submodule(layer.name).weight)
        assert torch.equal(output(model, batch), output(bare, batch))
    if end == "both" and not session.has_heads and len(model.peft_config) > 1:
        names = list(model.peft_config)
        model.base_model.set_adapter(names)
        assert torch.equal(
            output(model, batch), output(kit.fresh(model, names, session.cast), batch)
        )
    elif end == "merge_and_unload":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload()
        assert torch.equal(output(merged, batch), expected)
        assert not any("sfa_" in key for key in merged.state_dict())
    elif end == "unload":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = model.unload()
        assert list(plain.state_dict()) == list(bare.state_dict())
        assert_equal(
            [plain.get_submodule(layer).weight for layer in _names(kit)],
            [bare.get_submodule(layer).weight for layer in _names(kit)],
        )


def _names(kit: Kit) -> list[str]:
    return [layer.name for layer in layers_of(kit.start())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mlp", "head"])
@settings(max_examples=30)
@given(
    st.lists(st.sampled_from(ACTIONS), max_size=14),
    st.sampled_from(["both", "merge_and_unload", "unload"]),
)
def test_after_any_sequence_the_model_is_as_a_fresh_one(kind, dtype, actions, end):
    session = Session(Kit(kind, dtype))
    for action in actions:
        session.do(action)
    check(session, end)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("actions", "end"),
    [
        ("merge unmerge other disabled one forward merge", "merge_and_unload"),
        ("train_mode train other train eval_mode delete_active", "unload"),
        ("other delete_active add train to_bfloat16 load", "merge_and_unload"),
        ("forward disabled_switch copied load merge disabled", "unload"),
    ],
)
def test_so_is_a_segmentation_model_with_its_head(dtype, actions, end):
    session = Session(Kit("upernet", dtype))
    for action in actions.split():
        session.do(action)
    check(session, end)


@pytest.mark.parametrize("kind", ["mlp", "head"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_switches_and_merges_change_no_bit(kind, dtype):
    session = Session(Kit(kind, dtype))
    model, bare = session.model, session.kit.bare()
    adapted = {}
    for _ in range(500):
        for name in ("one", "two"):
            model.set_adapter(name)
            model.merge_adapter()
            assert_equal(weights_of(model), adapted.setdefault(name, weights_of(model)))
            model.unmerge_adapter()
    assert_equal(weights_of(model), [bare.get_submodule(x.name).weight for x in layers_of(model)])
    check(session, "unload")


def pretrained_of(model):
    with model.disable_adapter():
        return weights_of(model)


def test_in_eval_mode_weights_are_written_at_once_and_the_forward_writes_nothing():
    kit = Kit("head", torch.float32)
    model = kit.start()
    bits = pretrained_of(model)
    model.set_adapter("two")
    written = weights_of(model)
    assert not any(torch.equal(a, b) for a, b in zip(bits, written, strict=True))
    versions = [layer.base_weight._version for layer in layers_of(model)]
    output(model, kit.batch(torch.float32))
    assert versions == [layer.base_weight._version for layer in layers_of(model)]
    model.base_model.disable_adapter_layers()
    assert_equal(weights_of(model), bits)


def test_in_train_mode_weights_stay_pretrained_until_the_next_forward():
    model = Kit("head", torch.float32).start().train()
    bits = pretrained_of(model)
    model.set_adapter("two")
    assert_equal(weights_of(model), bits)


def test_deleting_the_active_adapter_activates_another_on_every_layer():
    model = Kit("mlp", torch.float32).start()
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert all(layer.active_adapters == ["two"] for layer in layers_of(model))


def test_layers_are_written_by_several_threads_with_the_same_result(monkeypatch):
    session = Session(Kit("head", torch.float32))
    session.do("other")
    expected = weights_of(session.model)
    monkeypatch.setattr(together_module, "_WORTH_THREADS", 0)
    monkeypatch.setattr(together_module.torch, "get_num_threads", lambda: 4)
    for _ in range(20):
        session.do("one")
        session.do("other")
        assert_equal(weights_of(session.model), expected)
    check(session, "merge_and_unload")


def test_an_error_in_a_thread_is_raised_and_the_rest_is_right_afterwards(monkeypatch):
    session = Session(Kit("mlp", torch.float32))
    monkeypatch.setattr(together_module, "_WORTH_THREADS", 0)
    monkeypatch.setattr(together_module.torch, "get_num_threads", lambda: 2)
    entries = layers_of(session.model)[0].weights["weight"]
    with monkeypatch.context() as patch:
        patch.setattr(entries, "_write_finished", lambda *_args, **_options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.model.set_adapter("two")
    check(session, "unload")


def test_training_after_a_switch_sees_the_gradient_in_the_order_of_the_values():
    kit = Kit("mlp", torch.float32)
    switched, direct = kit.start(), kit.start()
    switched.set_adapter("two")  # kept in the order of the weights
    direct.train().set_adapter("two")
    for model in (switched, direct):
        model(kit.batch(torch.float32)).square().sum().backward()
    grads = [find_pool(model, "two").values.grad for model in (switched, direct)]
    assert torch.equal(*grads)
    assert torch.equal(find_pool(switched, "two").originals(), find_pool(direct, "two").originals())
