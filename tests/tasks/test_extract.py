# SPDX-License-Identifier: Apache-2.0
"""An adapter out of a fully fine-tuned checkpoint, against a sort of the dense difference."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from sfa_peft import ConfigError, SFAConfig, SFAError
from sfa_peft.tasks import extract
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import masks_of
from tests.tasks.models import class_model
from tests.tiny import MLP, images, upernet

OPTIONS = {"budget": 0.3, "target_modules": ["first", "second"], "modules_to_save": ["head"]}


def tuned_copy(make, seed=5, size=0.1, dtype=torch.float32):
    """A model whose every parameter and buffer has moved."""
    model = make().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * size
                tensor.copy_((tensor.float() + noise).to(dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_changes_are_taken_and_lead_to_the_checkpoints_bits(dtype, tmp_path):
    tuned = tuned_copy(MLP, dtype=dtype)
    model, report = extract(MLP().to(dtype), tuned, SFAConfig(**OPTIONS))
    base = MLP().to(dtype)
    names = ["first.weight", "second.weight"]
    change = {
        n: (tuned.get_parameter(n).float() - base.get_parameter(n).float()).detach() for n in names
    }
    flat = torch.cat([c.flatten() for c in change.values()])
    count = find_pool(model, "default").size
    threshold = flat.abs().sort(descending=True).values[count - 1]
    masks = masks_of(find_pool(model, "default"))
    assert sum(int(m.sum()) for m in masks.values()) == count == report.selected
    expected = MLP().to(dtype)
    for name, mask in masks.items():
        assert (change[name].abs()[mask] >= threshold).all()
        assert (change[name].abs()[~mask] <= threshold).all()
        weight = expected.get_parameter(name).data
        weight[mask] = tuned.get_parameter(name).data[mask]
    expected.head = tuned.head
    x = torch.randn(5, 12, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP().to(dtype), tmp_path)
        assert torch.equal(loaded(x), expected(x))
    kept = torch.cat([change[n][m] for n, m in masks.items()]).double().norm()
    assert report.kept == pytest.approx(float(kept / flat.double().norm()), rel=1e-6)
    assert report.stages == {None: pytest.approx(report.kept)}
    assert report.not_selected == int((flat != 0).sum()) - count


def test_what_is_lost_is_named(tmp_path):
    _, report = extract(MLP(), tuned_copy(MLP), SFAConfig(**OPTIONS))
    assert {t.name for t in report.lost} == {"first.bias", "second.bias"}
    assert all(t.differing == t.numel == 16 for t in report.lost)
    first = next(t for t in report.lost if t.name == "first.bias")
    change = tuned_copy(MLP).first.bias - MLP().first.bias
    assert first.norm == pytest.approx(float(change.detach().norm()), rel=1e-5)
    options = OPTIONS | {"target_parameters": ["bias"], "modules_to_save": None}
    _, report = extract(MLP(), tuned_copy(MLP), SFAConfig(**options))
    assert {t.name for t in report.lost} == {"head.weight"}
    assert "head.weight: 64 of 64" in str(report)


def test_a_task_model_from_its_folder_with_head_and_buffers(tmp_path):
    tuned = tuned_copy(upernet)
    tuned.save_pretrained(tmp_path)
    config = SFAConfig(budget=0.2, modules_to_save="auto")
    model, report = extract(upernet(), tmp_path, config)
    assert model.peft_config["default"].modules_to_save == ["decode_head"]
    head = model.get_base_model().decode_head.modules_to_save["default"]
    assert all(
        torch.equal(t, tuned.decode_head.state_dict()[n]) for n, t in head.state_dict().items()
    )
    assert set(report.stages) == {0, 1, 2, 3}
    assert 0.2 < report.kept < 1
    assert all(0 < share < 1 for share in report.stages.values())
    lost = {t.name for t in report.lost}
    assert any("layernorm" in n for n in lost)
    assert not any("decode_head" in n for n in lost)
    with torch.no_grad():
        assert model.eval()(images()["pixel_values"]).logits.isfinite().all()


def test_a_budget_for_everything_keeps_everything():
    config = SFAConfig(budget=1, target_modules=["first", "second"], target_parameters=["bias"])
    with pytest.warns(UserWarning, match="every eligible weight"):
        model, report = extract(MLP(), tuned_copy(MLP).state_dict(), config)
    assert report.kept == 1
    assert report.not_selected == 0
    assert {t.name for t in report.lost} == {"head.weight"}
    merged = model.merge_and_unload()
    for name in ("first.weight", "second.bias", "head.bias"):
        assert torch.equal(merged.get_parameter(name), tuned_copy(MLP).get_parameter(name))


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_scores_without_data_do_not_interfere(score):
    models = [
        extract(MLP(), tuned_copy(MLP), SFAConfig(**OPTIONS, score=s))[0]
        for s in (score, "accumulated_gradient")
    ]
    slots = [find_pool(m, "default").slots for m in models]
    assert torch.equal(*slots)


def missing():
    return {n: t for n, t in MLP().state_dict().items() if n != "second.weight"}


def misshapen():
    return MLP().state_dict() | {"head.weight": torch.zeros(5, 16)}


def infinite():
    return MLP().state_dict() | {"first.weight": torch.full((16, 12), torch.inf)}


@pytest.mark.parametrize(
    ("checkpoint", "options", "error", "says"),
    [
        (missing, {}, SFAError, "has no tensor `second.weight`"),
        (misshapen, {}, SFAError, r"`head.weight` is \[5, 16\] in the checkpoint"),
        (infinite, {}, SFAError, "`first.weight` is NaN or infinite"),
        (lambda: "no/where", {}, SFAError, "no checkpoint can be read there"),
        (class_model, {}, SFAError, "has no tensor"),
        (MLP, {"rho": 0.5}, ConfigError, "ask for external adapters"),
        (MLP, {"adapter_dim": 2}, ConfigError, "ask for external adapters"),
        (MLP, {"selection_from": "a"}, ConfigError, "names a saved selection"),
    ],
)
def test_errors_leave_the_model_as_it_was(checkpoint, options, error, says):
    model = MLP()
    with pytest.raises(error, match=says):
        extract(model, checkpoint(), SFAConfig(**(OPTIONS | options)))
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_a_head_that_is_named_by_its_end_is_not_lost():
    tuned = tuned_copy(upernet)
    config = SFAConfig(budget=0.2, modules_to_save=["head"])
    model, report = extract(upernet(), tuned, config)
    head = model.get_base_model().decode_head.modules_to_save["default"]
    assert torch.equal(head.classifier.weight, tuned.decode_head.classifier.weight)
    assert not any("decode_head" in t.name for t in report.lost)
