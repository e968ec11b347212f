# SPDX-License-Identifier: Apache-2.0
"""Saved adapters become models again, alone or with the base that they name."""

import shutil

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import sfa_peft
from sfa_peft import AdapterFileError, ConfigError, SFAConfig, SFAError
from sfa_peft.tasks.task_folder import convert, load_base, load_saved, merge, verify
from tests.task_folder import NAMES, plain_model, save_backbone, save_task
from tests.tiny import MLP, images

PIXELS = images()["pixel_values"]


def logits(model):
    with torch.no_grad():
        return model(pixel_values=PIXELS).logits


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("base"))


@pytest.fixture
def sparse(backbone, tmp_path):
    return tmp_path / "task", save_task(tmp_path / "task", backbone, rho=0)


@pytest.mark.parametrize("rho", [0, 0.5])
def test_a_task_is_loaded_to_the_bit(rho, backbone, tmp_path):
    model = save_task(tmp_path / "task", backbone, rho=rho)
    loaded = sfa_peft.load_task(tmp_path / "task", device="cpu")
    assert isinstance(loaded, PeftModel)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.task_spec.class_names == tuple(NAMES)
    assert loaded.get_base_model().task_spec is loaded.task_spec


def test_a_task_is_loaded_with_a_backbone_that_moved(sparse, backbone, tmp_path):
    folder, model = sparse
    moved = tmp_path / "elsewhere"
    shutil.copytree(backbone, moved)
    shutil.copytree(folder, tmp_path / "deep" / "er" / "task")
    text = (tmp_path / "deep" / "er" / "task" / "task.json").read_text()
    gone = text.replace(str(backbone), "no/such/backbone")
    (tmp_path / "deep" / "er" / "task" / "task.json").write_text(gone)
    with pytest.raises(SFAError, match=r"no/such/backbone.*backbone=\.\.\."):
        sfa_peft.load_task(tmp_path / "deep" / "er" / "task")
    loaded = sfa_peft.load_task(tmp_path / "deep" / "er" / "task", backbone=str(moved))
    assert torch.equal(logits(loaded), logits(model))


def test_a_name_that_is_no_folder_is_one_of_the_hub(sparse, monkeypatch):
    folder, model = sparse
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr("sfa_peft.tasks.task_folder.snapshot_download", download)
    loaded = sfa_peft.load_task("someone/streets", revision="v1")
    assert asked == [("someone/streets", "v1")]
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def whole(tmp_path):
    """An adapter on a published model, without a `task.json`."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "decoder_hidden_size": 8}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes)).save_pretrained(tmp_path / "base")
    base = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "base")
    config = SFAConfig(
        budget=0.1, rho=0, score="random", init_weights=False, modules_to_save="auto"
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


def test_an_adapter_of_a_published_model_needs_no_task_file(whole):
    folder, model = whole
    for loaded in (load_saved(folder), AutoPeftModel.from_pretrained(str(folder)).eval()):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-7)
    with pytest.raises(SFAError, match=r"task\.json: no such file"):
        sfa_peft.load_task(folder)


def test_an_adapter_of_an_own_class_says_what_is_not_known(tmp_path):
    config = SFAConfig(budget=0.1, rho=0, score="random", target_modules=["first"])
    get_peft_model(MLP(), config).save_pretrained(tmp_path)
    with pytest.raises(SFAError, match=r"class MLP, weights unknown.*--base"):
        load_base(tmp_path)
    with pytest.raises(SFAError, match="no such folder, and not on the Hub"):
        load_base(tmp_path / "none")


def test_a_sound_adapter_is_verified(sparse, whole):
    folder, model = sparse
    report = verify(folder)
    assert report.tensors == len(model.peft_config["default"].to_dict()["resolved"]["tensors"])
    assert (report.unknown, report.chain) == (0, 0)
    assert "whole" in str(report)
    verify(whole[0])


def test_a_chain_is_verified_with_what_it_builds_on(sparse, backbone, tmp_path):
    folder, _ = sparse
    save_task(tmp_path / "next", backbone, rho=0, seed=1, continue_from=str(folder))
    report = verify(tmp_path / "next")
    assert report.chain == 1
    assert "1 earlier adapters" in str(report)


def test_another_base_or_a_damaged_file_is_not_verified(sparse, backbone, tmp_path):
    folder, _ = sparse
    other = plain_model(backbone).backbone
    torch.nn.init.normal_(other.encoder.layers[2].blocks[1].intermediate.dense.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"layers\.2\.blocks\.1\.intermediate"):
        verify(folder, str(tmp_path / "other"))
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(AdapterFileError, match="damaged"):
        verify(folder)


def test_a_merged_task_is_a_plain_model_that_predicts_the_same(sparse, tmp_path):
    folder, model = sparse
    merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
    loaded = sfa_peft.load_task(tmp_path / "merged")
    assert torch.equal(loaded.state_dict()["backbone.embeddings.norm.weight"],
                       merged.state_dict()["backbone.embeddings.norm.weight"])  # fmt: skip
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_external_adapters_are_not_merged(backbone, tmp_path):
    save_task(tmp_path / "task", backbone)
    with pytest.raises(SFAError, match="trained with rho=0 can be merged"):
        merge(tmp_path / "task", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_changes_are_written_in_fewer_bits(values, sparse, tmp_path):
    folder, model = sparse
    size = convert(folder, tmp_path / "small", values)
    exact = (folder / "adapter_model.safetensors").stat().st_size
    assert size == (tmp_path / "small" / "adapter_model.safetensors").stat().st_size < exact
    torch.testing.assert_close(
        logits(sfa_peft.load_task(tmp_path / "small")), logits(model), rtol=0, atol=0.05
    )
    with pytest.raises(ConfigError, match="expected one of exact"):
        convert(folder, tmp_path / "no", "int4")
