# SPDX-License-Identifier: Apache-2.0
"""Loading onto the base an adapter was trained on, and onto others."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from sfa_peft import AdapterFileError, SFAConfig, SFAWarning
from sfa_peft.tuner.adapted_layers import adapter_layers, find_pool
from tests.reference import deltas_of, masks_of
from tests.tiny import MLP, images, upernet

OPTIONS = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "score": "random"}


def trained(dtype=torch.float32, size=0.05, **changes) -> PeftModel:
    model = get_peft_model(MLP().to(dtype), SFAConfig(**(OPTIONS | changes)))
    values = find_pool(model, "default").values
    with torch.no_grad():
        values.copy_(size * torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    return model


def output(model, dtype=torch.float32):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.05, 300.0])
def test_every_bit_of_the_adapted_weights_comes_back(dtype, size, tmp_path):
    model = trained(dtype, size)
    expected = output(model, dtype)
    weights = [find_pool(model, "default").weights[i].tensor.clone() for i in range(2)]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP().to(dtype), tmp_path)
    assert torch.equal(output(loaded, dtype), expected)
    pool = find_pool(loaded, "default")
    assert all(torch.equal(pool.weights[i].tensor, w) for i, w in enumerate(weights))
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0] | files[1])


@pytest.mark.parametrize(("saved_values", "bound"), [("bfloat16", 2**-8), ("int8", None)])
def test_lossy_values_stay_within_the_stated_error(saved_values, bound, tmp_path):
    model = trained(saved_values=saved_values)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path)
    pools = [find_pool(m, "default") for m in (model, loaded)]
    for name, delta in deltas_of(pools[0]).items():
        error = (deltas_of(pools[1])[name] - delta).abs()
        limit = bound * delta.abs() if bound else delta.abs().max() / 253
        assert (error <= limit).all()
    assert all(torch.equal(m, masks_of(pools[1])[n]) for n, m in masks_of(pools[0]).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_pretrained_values_are_refused_by_name_before_anything_changes(dtype, tmp_path):
    trained(dtype).save_pretrained(tmp_path)
    other = MLP().to(dtype)
    with torch.no_grad():
        other.second.weight[0, 0] += 1
    with pytest.raises(AdapterFileError, match=r"`second\.weight` holds other values here"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any(isinstance(m, BaseTunerLayer) for m in other.modules())


def test_values_trained_in_16_bits_stay_in_16_bits(tmp_path):
    model = get_peft_model(
        MLP().to(torch.bfloat16), SFAConfig(**OPTIONS), autocast_adapter_dtype=False
    )
    values = find_pool(model, "default").values
    with torch.no_grad():
        values.normal_()
    assert values.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for low, autocast in ((False, False), (True, False), (False, True)):
        loaded = PeftModel.from_pretrained(
            MLP().to(torch.bfloat16),
            tmp_path,
            low_cpu_mem_usage=low,
            autocast_adapter_dtype=autocast,
        )
        found = find_pool(loaded, "default").values
        assert found.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert torch.equal(output(loaded, torch.bfloat16), output(model, torch.bfloat16))


def test_a_user_may_insist_on_another_base(tmp_path, monkeypatch):
    trained().save_pretrained(tmp_path)
    other = MLP()
    with torch.no_grad():
        other.second.weight[0, 0] += 1
    config = SFAConfig.from_pretrained(tmp_path)
    config.check_base = False
    with pytest.warns(SFAWarning, match="all the same, as you wish"):
        model = PeftModel.from_pretrained(other, tmp_path, config=config)
    assert find_pool(model, "default").num_assigned
    monkeypatch.setenv("SFA_CHECK_BASE", "0")
    other = MLP().requires_grad_(False)
    other.second.weight += 1
    with pytest.warns(SFAWarning, match="all the same, as you wish"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (torch.float32, torch.bfloat16, "its values are the rounded ones"),
        (torch.bfloat16, torch.float32, "its values are the rounded ones"),
    ],
)
def test_a_base_of_another_type_is_verified_and_said(before, now, says, tmp_path):
    model = trained(before)
    model.save_pretrained(tmp_path)
    base = MLP().to(before).to(now) if before == torch.bfloat16 else MLP().to(now)
    with pytest.warns(SFAWarning, match=says):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    output(loaded, now)
    for i in range(2):
        delta = deltas_of(find_pool(loaded, "default"))
        name = find_pool(loaded, "default").names[i]
        pretrained = find_pool(loaded, "default").weights[i].pretrained()
        expected = (pretrained.float() + delta[name]).to(now)
        assert torch.equal(find_pool(loaded, "default").weights[i].tensor, expected)


def test_renamed_modules_are_found_by_role(tmp_path):
    config = SFAConfig(budget=0.1, score="random", modules_to_save=["decode_head"])
    model = get_peft_model(upernet(), config).eval()
    with torch.no_grad():
        find_pool(model, "default").values.normal_(std=0.01)
        for layer in adapter_layers(model, "default"):
            if "default" in layer.sfa_up:
                layer.sfa_up["default"].weight.normal_(std=0.01)
    batch = images(seed=9)["pixel_values"]
    with torch.no_grad():
        expected = model(batch).logits
    model.save_pretrained(tmp_path)
    # What a rename in transformers does: the same roles under other paths.
    renames = {"attention.self": "attention.own", "attention.output.dense": "attention.o_proj"}
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for new, old in renames.items():
        text = text.replace(new, old)
        tensors = {k.replace(new, old): v for k, v in tensors.items()}
    text = text.replace("layers.", "stages.")
    tensors = {k.replace("encoder.layers.", "encoder.stages."): v for k, v in tensors.items()}
    path.write_text(text)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(upernet(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert "stages" not in json.dumps(again["resolved"])  # saved under the names of this model


def test_under_an_existing_name_the_base_is_checked_too(tmp_path):
    trained().save_pretrained(tmp_path)
    other = MLP()
    with torch.no_grad():
        other.second.weight[0, 0] += 1
    model = get_peft_model(other, SFAConfig(**OPTIONS))
    before = output(model)
    with pytest.raises(AdapterFileError, match=r"`second\.weight` holds other values here"):
        model.load_adapter(tmp_path, "default")
    state = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"`second\.weight` holds other values here"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(output(model), before)


def test_values_never_go_into_other_tensors_of_the_same_size(tmp_path):
    def three(targets):
        torch.manual_seed(0)
        base = torch.nn.ModuleDict({n: torch.nn.Linear(12, 12) for n in "abc"})
        options = OPTIONS | {"target_modules": targets}
        return get_peft_model(base, SFAConfig(**options))

    three(["a", "b"]).save_pretrained(tmp_path)
    other = three(["a", "c"])
    with pytest.raises(AdapterFileError, match=r"count `b\.weight` where .* counts `c\.weight`"):
        other.load_adapter(tmp_path, "default")


def test_weights_made_in_inference_mode_work(tmp_path):
    model = trained()
    expected = output(model)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
        assert torch.equal(loaded(x), expected)
        loaded.half().float()
        loaded(x)


@pytest.mark.parametrize(
    ("field", "value"), [("internal", 10**12), ("packed", 10**13), ("internal", -1)]
)
def test_sizes_beyond_the_model_are_refused_before_memory_is_taken(field, value, tmp_path):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    data["resolved"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(AdapterFileError, match="`resolved` is damaged"):
        PeftModel.from_pretrained(MLP(), tmp_path)


def test_an_external_adapter_wider_than_its_layer_is_refused(tmp_path):
    config = SFAConfig(budget=1.0, rho=1.0, target_modules=["first"], external_modules=["first"])
    get_peft_model(MLP(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    data["resolved"]["layers"][0]["width"] = 10**9
    path.write_text(json.dumps(data))
    with pytest.raises(AdapterFileError, match="external adapter of width 1000000000"):
        PeftModel.from_pretrained(MLP(), tmp_path)
