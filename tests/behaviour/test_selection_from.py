# SPDX-License-Identifier: Apache-2.0
"""A new task that trains the selection of a finished one (Table 7)."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from sfa_peft import (
    AdapterFileError,
    BudgetError,
    ConfigError,
    SFAConfig,
    SFAError,
    SFASelector,
    TargetError,
)
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of, masks_of
from tests.tasks.models import class_model
from tests.tiny import MLP, images, upernet

OPTIONS = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "score": "random"}
NEW = {"budget": 0.3, "rho": 0}


def x_of(seed=1):
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path):
    """A trained adapter: (model, folder)."""
    model = get_peft_model(MLP(), SFAConfig(**OPTIONS, seed=3, init_weights=False))
    model.save_pretrained(tmp_path / "first")
    return model, tmp_path / "first"


def assert_same_masks(new, old):
    masks = masks_of(find_pool(old, "default"))
    assert all(torch.equal(m, masks[n]) for n, m in masks_of(find_pool(new, "default")).items())


def test_values_start_from_zero_so_the_model_is_the_base(saved):
    old, folder = saved
    model = get_peft_model(MLP(), SFAConfig(**NEW, selection_from=folder))
    assert_same_masks(model, old)
    assert find_pool(model, "default").size == int((find_pool(old, "default").slots >= 0).sum())
    assert torch.equal(model(x_of()), MLP()(x_of()))


def test_values_start_from_the_trained_ones(saved):
    old, folder = saved
    config = SFAConfig(**NEW, selection_from=folder, selection_values="trained")
    model = get_peft_model(MLP(), config)
    assert_same_masks(model, old)
    assert torch.equal(model(x_of()), old(x_of()))


def test_exactly_the_saved_entries_train_and_nothing_is_picked(saved, tmp_path):
    old, folder = saved
    model = get_peft_model(MLP(), SFAConfig(**NEW, selection_from=str(folder)))
    dense = MLP()
    masks = masks_of(find_pool(old, "default"))
    weights = {n: dense.get_parameter(n) for n in masks}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    selector = SFASelector(model)  # no length of the run is asked for
    assert selector.schedule is None
    for step in range(4):
        model(x_of(step)).square().mean().backward()
        dense.zero_grad()
        dense(x_of(step)).square().mean().backward()
        optimizer.step()
        assert selector.step(optimizer) is False
        optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.sub_(0.1 * weight.grad * masks[name])
    for name, delta in deltas_of(find_pool(model, "default")).items():
        torch.testing.assert_close(
            delta, weights[name].detach() - MLP().get_parameter(name), atol=1e-6, rtol=0
        )
    expected = model(x_of())
    model.save_pretrained(tmp_path / "new")
    shutil.rmtree(folder)  # the new adapter needs the old one no longer
    assert torch.equal(PeftModel.from_pretrained(MLP(), tmp_path / "new")(x_of()), expected)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["selection_from"] == str(folder)


def test_external_adapters_are_as_the_new_config_says(tmp_path):
    old = get_peft_model(upernet(), SFAConfig(budget=0.1, score="random", init_weights=False))
    old.save_pretrained(tmp_path)
    config = SFAConfig(budget=0.3, adapter_dim=3, selection_from=tmp_path)
    model = get_peft_model(upernet(), config)
    assert_same_masks(model, old)
    widths = {layer.sfa_down["default"].weight.shape[0] for layer in _external(model)}
    assert widths == {3}
    pixels = images()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels).logits, upernet().eval()(pixels).logits)


def test_the_backbone_of_another_task_model_is_found_by_role(tmp_path):
    old = get_peft_model(upernet(), SFAConfig(budget=0.1, rho=0, score="random"))
    old.save_pretrained(tmp_path)
    config = SFAConfig(budget=0.2, selection_from=tmp_path, modules_to_save=["classifier"])
    model = get_peft_model(class_model(), config)
    masks = [list(masks_of(find_pool(m, "default")).values()) for m in (old, model)]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def _external(model):
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and m.sfa_down]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"budget": 0.1}, BudgetError, "the saved selection has .* The smallest budget that works"),
        ({"exclude_modules": ["second"]}, TargetError, "selects weights of `second`"),
        ({"modules_to_save": ["second"]}, TargetError, "selects weights of `second`"),
        ({"selection_from": "no/where"}, AdapterFileError, "no adapter can be read there"),
    ],
)
def test_errors_leave_the_model_as_it_was(saved, options, error, says):
    model = MLP()
    with pytest.raises(error, match=says):
        get_peft_model(model, SFAConfig(**(NEW | {"selection_from": saved[1]} | options)))
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_another_base_is_refused_and_so_is_another_model(saved):
    model = MLP()
    with torch.no_grad():
        model.second.weight[0, 0] += 1
    with pytest.raises(AdapterFileError, match=r"`second\.weight` holds other values"):
        get_peft_model(model, SFAConfig(**NEW, selection_from=saved[1]))
    with pytest.raises(AdapterFileError, match="Adapter of another model"):
        get_peft_model(upernet(), SFAConfig(**NEW, selection_from=saved[1]))


def test_a_damaged_file_and_an_empty_selection_are_refused(saved, tmp_path):
    path = saved[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(AdapterFileError):
        get_peft_model(MLP(), SFAConfig(**NEW, selection_from=saved[1]))
    empty = get_peft_model(MLP(), SFAConfig(rho=0, target_modules=["first"]))
    with pytest.warns(UserWarning, match="empty selection"):
        empty.save_pretrained(tmp_path / "empty")
    with pytest.raises(TargetError, match="no weight is selected there"):
        get_peft_model(MLP(), SFAConfig(**NEW, selection_from=tmp_path / "empty"))


def test_contradictions_in_the_config():
    with pytest.raises(ConfigError, match="rho=1 leaves no budget"):
        SFAConfig(rho=1, selection_from="a")
    with pytest.raises(ConfigError, match="selection_from names none"):
        SFAConfig(selection_values="trained")
    with pytest.raises(SFAError, match="expected one of zero, trained"):
        SFAConfig(selection_from="a", selection_values="ones")
