# SPDX-License-Identifier: Apache-2.0
"""Loads that fail before, beside or after the copying of tensors, and what is as before then."""

import json
from pathlib import Path

import peft
import peft.peft_model
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn

from sfa_peft import AdapterFileError, SFAConfig, SFAError
from sfa_peft.files.folder import WEIGHTS_NAME
from sfa_peft.tasks import TaskBank, combine
from tests.behaviour.test_failed_load import (
    CONFIG,
    DAMAGE,
    adapted,
    assert_same,
    drop,
    folder,  # noqa: F401 (a fixture)
    rewrite,
    saved,  # noqa: F401 (a fixture)
    state_of,
)
from tests.tiny import MLP, upernet

PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PIXELS).logits


def no_tensors(path: Path):
    (path / WEIGHTS_NAME).unlink()


def cut_bin(path: Path):
    tensors = load_file(path / WEIGHTS_NAME)
    torch.save(tensors, path / "adapter_model.bin")
    (path / WEIGHTS_NAME).unlink()
    whole = (path / "adapter_model.bin").read_bytes()
    (path / "adapter_model.bin").write_bytes(whole[: len(whole) // 2])


def swapped_layers(path: Path):
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    layers = config["resolved"]["layers"]
    layers[0], layers[-1] = layers[-1], layers[0]
    file.write_text(json.dumps(config))


def no_external_tensor(path: Path):
    rewrite(path, drop("sfa_up"))


BEFORE = [no_tensors, cut_bin, swapped_layers, no_external_tensor]


@pytest.mark.parametrize("damage", BEFORE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_nothing_is_left_in_a_plain_model(damage, low_cpu_mem_usage, saved, folder):  # noqa: F811
    damage(folder)
    model = upernet().train()
    model.backbone.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    before, attributes = state_of(model), set(vars(model))
    with pytest.raises(SFAError):
        PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == attributes
    assert not {**model._forward_hooks, **model._forward_pre_hooks}
    assert model.training
    again = PeftModel.from_pretrained(model, saved)
    assert torch.equal(logits(again), logits(adapted()))


@pytest.mark.parametrize("damage", BEFORE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_nothing_is_left_beside_another_adapter(damage, low_cpu_mem_usage, saved, folder):  # noqa: F811
    damage(folder)
    model = adapted(seed=3)
    flags = [p.requires_grad for p in model.parameters()]
    names, before, expected = list(model.state_dict()), state_of(model), logits(model)
    with pytest.raises(SFAError):
        model.load_adapter(folder, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.state_dict()) == names
    assert_same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.load_adapter(saved, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(adapted()))


@pytest.mark.parametrize("damage", [*DAMAGE, "another head"])
def test_tasks_of_a_bank_stay_as_they_were(damage, saved, folder, tmp_path):  # noqa: F811
    adapted(seed=7).save_pretrained(tmp_path / "second")
    bank = TaskBank(upernet())
    bank.add("first", saved, upernet())
    bank.add("second", tmp_path / "second", upernet())
    expected = {name: bank.run(name, PIXELS).logits for name in bank}
    if damage != "another head":
        rewrite(folder, DAMAGE[damage])
    with pytest.raises(AdapterFileError):
        bank.add("third", folder, upernet(num_labels=5 if damage == "another head" else 3))
    assert list(bank) == ["first", "second"]
    for name in bank:
        assert torch.equal(bank.run(name, PIXELS).logits, expected[name])
    bank.add("third", saved, upernet())
    assert torch.equal(bank.run("third", PIXELS).logits, expected["first"])
    assert torch.equal(bank.run("second", PIXELS).logits, expected["second"])


def test_a_second_wrapper_around_one_model_leaves_the_first_as_it_was(saved, folder):  # noqa: F811
    model = upernet()
    first = PeftModel.from_pretrained(model, saved, "first").eval()
    expected = logits(first)
    no_external_tensor(folder)
    with (
        pytest.warns(UserWarning, match="peft_config"),
        pytest.raises(AdapterFileError),
    ):
        PeftModel.from_pretrained(model, folder, "second")
    assert torch.equal(logits(first), expected)
    assert list(first.peft_config) == ["first"]


def test_an_adapter_filled_by_hand_survives_a_failed_load(saved, folder):  # noqa: F811
    model = get_peft_model(upernet(), SFAConfig.from_pretrained(saved))
    peft.set_peft_model_state_dict(model, load_peft_weights(saved, device="cpu"))
    expected = logits(model)
    no_external_tensor(folder)
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, "default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("config", ["missing", "of another method", "no json"])
def test_flipped_bits_are_noticed_where_the_config_is_not_read(config, folder):  # noqa: F811
    given = SFAConfig.from_pretrained(folder)
    path = folder / "adapter_config.json"
    if config == "missing":
        path.unlink()
    else:
        path.write_text('{"peft_type": "LORA"}' if config == "of another method" else "{")
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(AdapterFileError, match="checksum"):
        PeftModel.from_pretrained(upernet(), folder, config=given)
    model = adapted(seed=3)
    with pytest.raises(AdapterFileError, match="checksum"):
        model.load_adapter(folder, "default")


class MaskedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.linear(x)[..., None] + self.mask, -1).sum(-1)


def test_heads_may_hold_infinite_buffers(tmp_path):
    def make():
        model = MLP()
        model.head = MaskedHead()
        return model

    config = SFAConfig(rho=0, score="magnitude", target_modules=["first"], modules_to_save=["head"])
    model = get_peft_model(make(), config)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 12)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))


@pytest.mark.parametrize("part", ["sfa_up", "decode_head.classifier.weight"])
def test_a_combination_does_not_take_over_half_an_adapter(part, saved, folder, tmp_path):  # noqa: F811
    adapted(seed=7).save_pretrained(tmp_path / "second")
    rewrite(folder, drop(part))
    model = upernet()
    before, kinds = state_of(model), [type(m) for m in model.modules()]
    with pytest.raises(SFAError):
        combine(model, [tmp_path / "second", folder], keep=folder)
    assert_same(model, before)
    assert [type(m) for m in model.modules()] == kinds


def test_a_pool_keeps_its_type_where_a_load_fails(folder):  # noqa: F811
    model = get_peft_model(upernet().bfloat16(), CONFIG, autocast_adapter_dtype=False)
    types = {name: p.dtype for name, p in model.named_parameters()}
    model.save_pretrained(folder)
    rewrite(folder, drop("sfa_up"))
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, "default")
    assert {name: p.dtype for name, p in model.named_parameters()} == types


def test_pefts_functions_take_what_they_took():
    model = get_peft_model(upernet(), peft.LoraConfig(target_modules=["query"]))
    state = get_peft_model_state_dict(model)
    fill = peft.peft_model.set_peft_model_state_dict
    assert not fill(model=model, peft_model_state_dict=state).unexpected_keys
    save = peft.peft_model.safe_save_file
    assert save.__wrapped__ is save_file
