# SPDX-License-Identifier: Apache-2.0
"""What a merged model's files hold: a plain checkpoint, or nothing, but never random weights."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, UperNetForSemanticSegmentation

from sfa_peft import MergeWarning, SFAConfig, SFAError
from tests.tiny import images, upernet

HEAD = {"modules_to_save": ["decode_head"], "init_weights": False, "score": "random"}


def adapted(**options) -> PeftModel:
    return get_peft_model(upernet(), SFAConfig(budget=0.5, **HEAD, **options))


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images()["pixel_values"]).logits


@pytest.fixture
def merged():
    model = adapted()
    with pytest.warns(MergeWarning, match="save_pretrained is refused"):
        return model.merge_and_unload()


def test_a_merged_selection_is_a_plain_checkpoint_to_the_bit(tmp_path):
    model = adapted(rho=0)
    expected = output(model)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    found, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert found.state_dict().keys() == upernet().state_dict().keys()
    assert all(torch.equal(t, found.state_dict()[k]) for k, t in plain.state_dict().items())
    # A copy: kernels round differently where tensors lie as in the file, at any address.
    assert torch.equal(output(copy.deepcopy(found)), expected)


def test_saving_a_model_with_merged_external_adapters_is_refused(merged, tmp_path):
    trainer = Trainer(merged, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    folder = tmp_path / "model"
    for save in (
        merged.save_pretrained,
        merged.backbone.save_pretrained,
        trainer.save_model,
        lambda path: merged.save_pretrained(path, state_dict=merged.state_dict()),
    ):
        with pytest.raises(SFAError, match=r"`.*` has an external adapter .* merged"):
            save(str(folder))
        assert not list(tmp_path.rglob("*.safetensors"))


def test_the_adapter_merged_after_loading_is_the_merged_model(tmp_path):
    model = adapted()
    expected = output(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(MergeWarning):
        again = PeftModel.from_pretrained(upernet(), tmp_path).merge_and_unload()
    assert torch.equal(output(again), expected)


def test_a_merged_model_saved_whole_is_the_same(merged, tmp_path):
    torch.save(merged, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output(found), output(merged))


def test_tensors_of_a_merged_model_fit_one_that_was_merged_alike_and_no_other(merged):
    with pytest.warns(MergeWarning):
        other = get_peft_model(upernet(1), SFAConfig(budget=0.5, **HEAD)).merge_and_unload()
    other.load_state_dict(merged.state_dict())
    assert torch.equal(output(other), output(merged))
    with pytest.raises(RuntimeError, match=r"Missing key.*\.weight"):
        upernet().load_state_dict(merged.state_dict())
