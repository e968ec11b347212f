# SPDX-License-Identifier: Apache-2.0
"""A task on top of an earlier one, against that task on weights with the earlier change in them."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from sfa_peft import AdapterFileError, SFAConfig, SFAError, SFASelector, SFAWarning, TargetError
from sfa_peft.tasks import TaskBank, combine
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of, masks_of
from tests.tiny import MLP, images, upernet

FIRST = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "score": "random"}
SECOND = {"budget": 0.25, "rho": 0, "target_modules": ["second"]}
DTYPES = [torch.float32, torch.bfloat16]


def x_of(seed=1, dtype=torch.float32):
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save_first(folder, dtype=torch.float32, size=0.05, **changes):
    """Save an adapter with both kinds of parts; return the weights with its sparse change."""
    model = get_peft_model(MLP().to(dtype), SFAConfig(**(FIRST | changes)))
    pool = find_pool(model, "default")
    with torch.no_grad():
        pool.values.normal_(std=size, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return on_top(MLP().to(dtype), model)


@torch.no_grad()
def on_top(base, model, name="default"):
    """Add an adapter's change to dense weights, in float32, rounded to their type."""
    for tensor, delta in deltas_of(find_pool(model, name)).items():
        weight = base.get_parameter(tensor)
        weight.copy_((weight.float() + delta).to(weight.dtype))
    return base


def fit(model, steps=6):
    selector = SFASelector(model, total_steps=steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(x_of(step, model.get_base_model().head.weight.dtype)).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "movement"},
        {"score": "weight_difference"},
        {"score": "magnitude"},
        {"weight_decay_on": "weight"},
        {"target_modules": ["first", "second"], "rho": 0.4, "external_modules": ["first"]},
    ],
    ids=str,
)
def test_training_is_that_on_dense_weights_with_the_earlier_change(options, dtype, tmp_path):
    merged = save_first(tmp_path / "a", dtype)
    settings_ = SECOND | {"selection_steps": 2} | options
    base = MLP().to(dtype)
    torch.manual_seed(9)  # external adapters start alike
    model = get_peft_model(base, SFAConfig(**settings_, continue_from=tmp_path / "a"))
    torch.manual_seed(9)
    reference = get_peft_model(merged, SFAConfig(**settings_))
    assert torch.equal(model(x_of(7, dtype)), reference(x_of(7, dtype)))
    fit(model)
    fit(reference)
    pools = [find_pool(m, "default") for m in (model, reference)]
    masks = [masks_of(p) for p in pools]
    assert all(torch.equal(m, masks[1][n]) for n, m in masks[0].items())
    assert torch.equal(pools[0].values, pools[1].values)
    assert torch.equal(model(x_of(7, dtype)), reference(x_of(7, dtype)))
    earlier = PeftModel.from_pretrained(MLP().to(dtype), tmp_path / "a")
    first = masks_of(find_pool(earlier, "default"))
    if options != {"score": "weight_difference"}:
        assert any((masks[0][n] & first[n]).any() for n in masks[0])  # they may share entries
    model.save_pretrained(tmp_path / "b")
    loaded = PeftModel.from_pretrained(MLP().to(dtype), tmp_path / "b")
    assert torch.equal(loaded(x_of(7, dtype)), model(x_of(7, dtype)))
    with loaded.disable_adapter():
        assert torch.equal(loaded(x_of(7, dtype)), MLP().to(dtype)(x_of(7, dtype)))


def test_external_adapters_and_head_of_the_earlier_one_stay_behind(tmp_path):
    config = SFAConfig(
        budget=0.2, score="random", init_weights=False, modules_to_save=["decode_head"]
    )
    first = get_peft_model(upernet(), config)
    with torch.no_grad():
        first.get_base_model().decode_head.modules_to_save.default.classifier.bias.add_(1)
    first.save_pretrained(tmp_path / "a")
    config = SFAConfig(budget=0.1, rho=1, continue_from=tmp_path / "a")
    model = get_peft_model(upernet(), config).eval()
    expected = on_top(upernet(), first).eval()
    pixels = images()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, expected(pixels).logits)
        with pytest.warns(SFAWarning, match="stay in the merged model"):
            merged = model.merge_and_unload()
        assert torch.equal(merged(pixels).logits, expected(pixels).logits)


def test_merging_leaves_both_changes_in_the_weights(chain):
    root, outputs = chain
    merged = PeftModel.from_pretrained(MLP(), root / "two").merge_and_unload()
    assert type(merged.second) is torch.nn.Linear
    assert torch.equal(merged(x_of()), outputs["two"])
    first, second = (PeftModel.from_pretrained(MLP(), root / name) for name in ("one", "two"))
    expected = on_top(on_top(MLP(), first), second).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in merged.state_dict().items())


@pytest.fixture
def chain(tmp_path):
    """Three adapters, each on the one before, recorded by names relative to their folder."""
    outputs = {}
    save_first(tmp_path / "one")
    outputs["one"] = PeftModel.from_pretrained(MLP(), tmp_path / "one")(x_of())
    for seed, (name, before) in enumerate([("two", "one"), ("three", "two")]):
        options = SECOND | {"score": "random", "seed": seed + 5, "init_weights": False}
        config = SFAConfig(**options, continue_from=tmp_path / before)
        model = get_peft_model(MLP(), config)
        outputs[name] = model(x_of())
        model.save_pretrained(tmp_path / name)
    return tmp_path, outputs


def resolved_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["resolved"]


def test_a_chain_is_recorded_and_resolved_also_after_its_folders_have_moved(chain, tmp_path):
    root, outputs = chain
    links = resolved_of(root / "three")["chain"]
    assert [link["source"] for link in links] == [str(root / "one"), str(root / "two")]
    assert all(len(link["digest"]) == 64 for link in links)
    assert resolved_of(root / "three")["format"] == 4
    assert resolved_of(root / "one")["format"] == 3
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in outputs:
        shutil.move(root / name, moved / name)
    for low in (False, True):
        for name, expected in outputs.items():
            loaded = PeftModel.from_pretrained(MLP(), moved / name, low_cpu_mem_usage=low)
            assert torch.equal(loaded(x_of()), expected)
    loaded.save_pretrained(moved / "again")
    assert resolved_of(moved / "again")["chain"] == links
    again = PeftModel.from_pretrained(MLP(), moved / "again")
    assert torch.equal(again(x_of()), outputs["three"])


def test_paths_relative_to_the_later_folder_are_tried(chain):
    root, outputs = chain
    path = root / "two" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(root / "one"), "../kept/inside"))
    (root / "kept").mkdir()
    shutil.move(root / "one", root / "kept" / "inside")
    model = PeftModel.from_pretrained(MLP(), root / "two")
    assert torch.equal(model(x_of()), outputs["two"])
    assert torch.equal(PeftModel.from_pretrained(MLP(), root / "three")(x_of()), outputs["three"])


def refused(folder, says):
    model = MLP()
    with pytest.raises(AdapterFileError, match=says):
        PeftModel.from_pretrained(model, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_a_missing_or_changed_earlier_adapter_is_refused(chain):
    root, _ = chain
    shutil.move(root / "one", root / "gone")
    refused(root / "two", "and needs it as it was then: .*no adapter can be read there")
    refused(root / "three", "and needs it as it was then")
    save_first(root / "one", size=0.01)
    refused(root / "two", "its selection .* is another now")
    refused(root / "three", "is another now")


def test_a_cycle_is_refused(chain):
    root, _ = chain
    path = root / "one" / "adapter_config.json"
    data = json.loads(path.read_text())
    data["resolved"] |= {"format": 4, "chain": [{"source": str(root / "three"), "digest": "0"}]}
    path.write_text(json.dumps(data))
    refused(root / "three", "is another now")


def test_what_does_not_fit_is_refused_before_the_model_is_touched(chain):
    root, _ = chain
    model = MLP()
    for options, error, says in [
        ({"modules_to_save": ["first"]}, TargetError, "changes `first`, which modules_to_save"),
        ({"continue_from": root / "nowhere"}, AdapterFileError, "no adapter can be read"),
        (
            {"selection_from": root / "one", "selection_values": "trained"},
            TargetError,
            "changes on top of the plain backbone",
        ),
    ]:
        with pytest.raises(error, match=says):
            get_peft_model(model, SFAConfig(**(SECOND | {"continue_from": root / "one"} | options)))
        assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    with pytest.raises(SFAError, match="continues"):
        combine(MLP(), [root / "one", root / "two"])


def test_a_selection_of_a_later_adapter_is_read_on_its_own_base(chain):
    root, outputs = chain
    options = SECOND | {"selection_from": root / "two", "selection_values": "trained"}
    model = get_peft_model(MLP(), SFAConfig(**options, continue_from=root / "one"))
    assert torch.equal(model(x_of()), outputs["two"])


# --- any order of what users do ----------------------------------------------------------------


@torch.no_grad()
def off(model, root, x, expected):
    with model.disable_adapter():
        assert torch.equal(model(x), expected[None])


@torch.no_grad()
def merge(model, root, x, expected):
    model.merge_adapter()
    assert torch.equal(model(x), expected[model.active_adapter])
    model.unmerge_adapter()


def state(model, root, x, expected):
    found = model.get_base_model().state_dict()
    found = {n.replace(".base_layer", ""): t for n, t in found.items()}
    originals = MLP().to(x.dtype).state_dict()
    assert all(torch.equal(found[n], t) for n, t in originals.items())
    model.load_state_dict(model.state_dict())


def reload(model, root, x, expected):
    model.set_adapter("one")
    model.delete_adapter("three")
    model.load_adapter(root / "three", "three")


def move(model, root, x, expected):
    model.cpu()


ACTIONS = {f.__name__: f for f in (off, merge, state, reload, move)}
NAMES = ["one", "two", "three", "copy", "pickle", *ACTIONS]


def fresh(root, dtype):
    outputs = {None: MLP().to(dtype)(x_of(dtype=dtype)).detach()}
    for name in ("one", "two", "three"):
        model = PeftModel.from_pretrained(MLP().to(dtype), root / name)
        outputs[name] = model(x_of(dtype=dtype)).detach()
    return outputs


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def three(request, tmp_path_factory):
    root, dtype = tmp_path_factory.mktemp("chain"), request.param
    save_first(root / "one", dtype)
    for seed, (name, before) in enumerate([("two", "one"), ("three", "two")]):
        options = SECOND | {"score": "random", "seed": seed + 5, "init_weights": False}
        config = SFAConfig(**options, continue_from=root / before)
        get_peft_model(MLP().to(dtype), config).save_pretrained(root / name)
    return root, dtype, fresh(root, dtype)


@given(actions=st.lists(st.sampled_from(NAMES), min_size=1, max_size=10))
@settings(max_examples=25, deadline=None)
def test_after_any_actions_every_adapter_gives_the_bits_of_a_fresh_load(three, actions):
    root, dtype, expected = three
    model = PeftModel.from_pretrained(MLP().to(dtype), root / "one", adapter_name="one")
    for name in ("two", "three"):
        model.load_adapter(root / name, name)
    originals = MLP().to(dtype).state_dict()
    x = x_of(dtype=dtype)
    for action in actions:
        if action in expected:
            model.set_adapter(action)
        elif action == "copy":
            model = copy.deepcopy(model)
        elif action == "pickle":
            model = pickle.loads(pickle.dumps(model))
        else:
            ACTIONS[action](model, root, x, expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected[model.active_adapter]), action
    base = model.unload()
    assert all(torch.equal(t, originals[n]) for n, t in base.state_dict().items())


def test_deleting_the_last_later_adapter_forgets_the_earlier_change(three):
    root, dtype, expected = three
    model = PeftModel.from_pretrained(MLP().to(dtype), root / "two", adapter_name="two")
    model.load_adapter(root / "three", "three")
    layer = model.get_base_model().second
    pools = layer.weights["weight"].slices
    assert len([n for n in pools if n.startswith("earlier")]) == 2  # one is shared
    model.delete_adapter("three")
    assert len([n for n in pools if n.startswith("earlier")]) == 1
    model.set_adapter("two")
    with torch.no_grad():
        assert torch.equal(model(x_of(dtype=dtype)), expected["two"])
    assert not any("earlier" in n for n in model.state_dict())


def test_a_bank_serves_tasks_of_one_chain(tmp_path):
    pixels = images()["pixel_values"]
    options = {"budget": 0.1, "rho": 0, "score": "random", "init_weights": False}
    get_peft_model(upernet(), SFAConfig(**options)).save_pretrained(tmp_path / "one")
    config = SFAConfig(**options, seed=1, continue_from=tmp_path / "one")
    get_peft_model(upernet(), config).save_pretrained(tmp_path / "two")
    path = tmp_path / "two" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(tmp_path / "one"), "../one"))
    bank = TaskBank(upernet())
    for name in ("one", "two"):
        bank.add(name, tmp_path / name, upernet())
    with torch.no_grad():
        for name in ("one", "two", "one"):
            alone = PeftModel.from_pretrained(upernet(), tmp_path / name).eval()
            assert torch.equal(bank.run(name, pixel_values=pixels).logits, alone(pixels).logits)
