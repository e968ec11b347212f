# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sfa_peft import AdapterFileError, SFAConfig, SFAError
from sfa_peft.tasks import TaskBank
from tests.tasks.models import NAMES, depth_model, make_bank, output
from tests.tiny import upernet

# --- bad input ---------------------------------------------------------------------------------


def test_a_removed_task_is_gone_and_the_others_are_not(bank, expected):
    bank.activate("depth")
    bank.remove("depth")
    assert bank.active is None
    for use in (lambda: bank["depth"], lambda: bank.run("depth"), lambda: bank.remove("depth")):
        with pytest.raises(SFAError, match="no task `depth`"):
            use()
    assert torch.equal(output(bank, "segmentation"), expected["segmentation"])


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", "sfa_"])
def test_a_name_that_peft_cannot_use_is_refused(bank, folders, name):
    with pytest.raises(SFAError, match="cannot name a task"):
        bank.add(name, folders["depth"], depth_model())


def test_a_name_or_model_that_is_taken_is_refused(bank, folders):
    with pytest.raises(SFAError, match="`depth` is in the bank already"):
        bank.add("depth", folders["depth"], depth_model())
    model = bank["depth"].model.get_base_model()
    with pytest.raises(SFAError, match="the model belongs to task `depth`"):
        bank.add("other", folders["depth"], model)


def changed_weight() -> nn.Module:
    model = depth_model()
    with torch.no_grad():
        model.backbone.encoder.layers[0].blocks[0].intermediate.dense.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed_weight, "`backbone.encoder.*intermediate.dense.weight` holds other values"),
        (lambda: depth_model().bfloat16(), r"torch.bfloat16, the bank's .* torch.float32"),
        (lambda: upernet(embed_dim=32), "another config.*embed_dim=32, the bank's 16"),
        (lambda: nn.Linear(2, 2), "no vision backbone found"),
        (
            lambda: get_peft_model(depth_model(), LoraConfig(target_modules=["query"])),
            "belongs to an adapter already",
        ),
    ],
)
def test_a_model_around_another_backbone_is_refused(bank, folders, expected, make, message):
    with pytest.raises(SFAError, match=message):
        bank.add("other", folders["depth"], make())
    assert "other" not in bank
    for name in NAMES:
        assert torch.equal(output(bank, name), expected[name])


def test_the_backbone_itself_is_no_task_model(bank, folders):
    with pytest.raises(SFAError, match="shared backbone itself"):
        bank.add("other", folders["depth"], bank.backbone)


def test_a_model_without_pretrained_weights_can_be_given_on_request(folders, expected):
    bank = make_bank(folders, ["segmentation"])
    random = depth_model()
    with torch.no_grad():
        for parameter in random.backbone.parameters():
            parameter.normal_()
    bank.add("depth", folders["depth"], random, check_weights=False)
    assert torch.equal(output(bank, "depth"), expected["depth"])


def test_a_model_built_around_the_banks_backbone_is_taken_as_it_is(folders, expected):
    bank = make_bank(folders, ["segmentation"])
    model = depth_model()
    model.backbone = bank.backbone
    bank.add("depth", folders["depth"], model)
    assert torch.equal(output(bank, "depth"), expected["depth"])


def damage(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("sfa_packed"))
    tensors[key][-1] ^= 1
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("others", [[], NAMES[:1]])
def test_a_damaged_adapter_leaves_bank_and_backbone_alone(folders, expected, tmp_path, others):
    bank = make_bank(folders, others)
    model = depth_model()
    own = model.backbone
    before = copy.deepcopy(bank.backbone.state_dict())
    with pytest.raises(AdapterFileError, match="sfa_packed"):
        bank.add("depth", damage(folders["depth"], tmp_path / "damaged"), model)
    after = bank.backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert bank.list() == others
    assert model.backbone is own
    bank.add("depth", folders["depth"], model)  # the same model serves a second try
    for name in [*others, "depth"]:
        assert torch.equal(output(bank, name), expected[name])


def test_an_adapter_of_another_method_or_none_is_named(bank, tmp_path):
    get_peft_model(depth_model(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(SFAError, match="a LORA adapter"):
        bank.add("lora", tmp_path, depth_model())
    with pytest.raises(SFAError, match="no adapter can be read"):
        bank.add("none", tmp_path / "nowhere", depth_model())


def test_a_copied_part_of_the_backbone_cannot_be_shared(tmp_path, folders):
    config = SFAConfig(budget=0.2, score="random", modules_to_save=["head.head", "embeddings.norm"])
    get_peft_model(depth_model(), config).save_pretrained(tmp_path)
    bank = make_bank(folders, NAMES[:1])
    with pytest.raises(SFAError, match=r"names `embeddings.norm` of the backbone"):
        bank.add("depth", tmp_path, depth_model())
    assert not any("modules_to_save" in n for n, _ in bank.backbone.named_modules())


def test_a_bank_needs_a_plain_backbone(bank):
    with pytest.raises(SFAError, match=r"backbone: .* belongs to an adapter already"):
        TaskBank(bank.backbone)
