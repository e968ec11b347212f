# SPDX-License-Identifier: Apache-2.0
"""A base with the same weights that computes other things is not the adapter's base."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import AdapterFileError, SFAConfig, SFAWarning
from sfa_peft.backbones import find_backbone
from sfa_peft.files.adapter_config import Resolved, read_resolved
from sfa_peft.tasks import combine
from sfa_peft.tuner.adapted_layers import find_pool
from sfa_peft.tuner.base_model_config import check_base_config, config_fields, recorded_fields
from tests.model_zoo import FAMILIES, pixels
from tests.tiny import images, upernet
from tests.whole_life import evaluate

SIZES = {"total": 1, "allowed": 1, "adapter_dim": 0, "internal": 0, "layers": {}, "tensors": ()}
CONFIG = {"budget": 0.2, "score": "random", "modules_to_save": ["decode_head"]}


def other_size(**changes):
    """Return the same weights in a model that was built otherwise."""
    model = upernet(**changes)
    model.load_state_dict(upernet().state_dict())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(upernet(), SFAConfig(init_weights=False, **CONFIG))
    model.save_pretrained(root)
    return root


def test_another_image_size_changes_swinv2_with_the_same_weights():
    with torch.no_grad():
        usual = upernet().eval()(images(size=64)["pixel_values"]).logits
        other = other_size(image_size=64).eval()(images(size=64)["pixel_values"]).logits
    assert not torch.equal(usual, other)


def test_another_function_of_the_layers_is_refused_by_the_name_of_the_field(folder, tmp_path):
    for changes in ({"image_size": 64}, {"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}):
        ((field, value),) = changes.items()
        with pytest.raises(AdapterFileError, match=f"trained on a .* {field}=.* has {field}=") as e:
            PeftModel.from_pretrained(other_size(**changes), folder)
        assert repr(value) in str(e.value)
    trained = {"selection_from": folder, "selection_values": "trained"}
    for use in (trained, {"continue_from": folder}):
        with pytest.raises(AdapterFileError, match="image_size=32; here it has image_size=64"):
            get_peft_model(other_size(image_size=64), SFAConfig(**use, **CONFIG))
    with pytest.raises(AdapterFileError, match="image_size=32; here it has image_size=64"):
        combine(other_size(image_size=64), [folder, tmp_path])


def test_a_selection_that_starts_from_zero_is_trained_with_another_function(folder):
    config = SFAConfig(selection_from=folder, **CONFIG)
    model = get_peft_model(other_size(image_size=64), config)
    pool = find_pool(model, "default")
    saved = find_pool(PeftModel.from_pretrained(upernet(), folder), "default")
    assert pool.num_assigned == saved.num_assigned > 0
    assert not pool.values.any()
    assert torch.equal(pool.slots, saved.slots)


def test_who_insists_gets_a_warning(folder, monkeypatch):
    config = SFAConfig.from_pretrained(folder)
    config.check_base = False
    with pytest.warns(SFAWarning, match="image_size=32; here it has image_size=64"):
        PeftModel.from_pretrained(other_size(image_size=64), folder, config=config)
    monkeypatch.setenv("SFA_CHECK_BASE", "0")
    with pytest.warns(SFAWarning, match="image_size=32; here it has image_size=64"):
        PeftModel.from_pretrained(other_size(image_size=64), folder)


def test_what_leaves_the_layers_alone_is_a_note_or_nothing(folder):
    noted = copy.deepcopy(upernet())
    noted.backbone.config.encoder_stride = 16
    with pytest.warns(SFAWarning, match="encoder_stride=32; here it has encoder_stride=16"):
        PeftModel.from_pretrained(noted, folder)
    silent = other_size(drop_path_rate=0.3, hidden_dropout_prob=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SFAWarning)
        PeftModel.from_pretrained(silent, folder)


def test_a_trained_adapter_keeps_what_its_file_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_CHECK_BASE", "0")
    with pytest.warns(SFAWarning, match="image_size"):
        model = PeftModel.from_pretrained(other_size(image_size=64), folder)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(AdapterFileError, match="image_size=32; here it has image_size=64"):
        PeftModel.from_pretrained(other_size(image_size=64), tmp_path)
    PeftModel.from_pretrained(upernet(), tmp_path)


def test_a_file_that_does_not_say_loads_as_before(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields["resolved"]["format"] == 3
    assert fields["resolved"].pop("base_config")["image_size"] == 32
    path.write_text(json.dumps(fields))
    PeftModel.from_pretrained(other_size(image_size=64), tmp_path)


@pytest.mark.parametrize("value", [[1], "image_size", {"a": "x" * (1 << 16)}])
def test_a_record_that_is_none_or_too_large_is_refused(value, folder):
    data = json.loads((folder / "adapter_config.json").read_text())["resolved"]
    with pytest.raises(AdapterFileError, match="`resolved` is damaged"):
        read_resolved(data | {"base_config": value})


def test_long_values_are_left_out_of_the_record():
    model = upernet()
    model.backbone.config.notes = ["x" * 100] * 100
    fields = recorded_fields(find_backbone(model))
    assert "notes" not in fields
    assert fields["depths"] == [1, 1, 2, 1]
    assert "id2label" not in fields
    assert recorded_fields(None) is None


def test_a_size_is_the_same_as_a_pair_of_it_and_another_release_may_lack_fields():
    backbone = find_backbone(upernet())
    fields = config_fields(backbone.module) | {"image_size": [32, 32], "of_later": 1}
    saved = Resolved(**SIZES, backbone="swinv2", base_config=fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SFAWarning)
        check_base_config("default", saved, backbone, strict=True)


def others(value):
    """Return values of the same kind, in the order in which a backbone most likely takes them."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1, value // 2]
    if isinstance(value, str):
        return ["relu"]
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return [[change(v) for v in value] for change in (lambda v: v * 2, lambda v: v + 1)]
    return []


def is_refused(backbone, field, other):
    fields = config_fields(backbone.module) | {field: other}
    saved = Resolved(**SIZES, backbone=backbone.model_type, base_config=fields)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SFAWarning)
            check_base_config("default", saved, backbone, strict=True)
    except AdapterFileError:
        return True
    return False


#: Fields that say which of a backbone's features come out, or what a pooler makes of them.
READ_OUT = {
    "out_features",
    "out_indices",
    "pooler_act",
    "pooler_output_size",
    "use_mean_pooling",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_changes_a_backbone_with_the_same_weights_is_refused(family):
    """Found by trying: each field of each family gets another value, if that builds."""
    model = FAMILIES[family]()
    backbone = find_backbone(model)
    weights = backbone.module.state_dict()
    for name, weight in weights.items():  # so that nothing is neutral
        if weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weights[name] = weight + 0.05 * noise

    def build(config):
        torch.manual_seed(0)  # for poolers, which may be in the class and not in the model
        built = type(backbone.module)(config)
        keys = built.load_state_dict(weights, strict=False)
        return keys, evaluate(built, {"pixel_values": pixels(family)})

    keys, expected = build(copy.deepcopy(backbone.module.config))
    missed = set()
    for field, value in config_fields(backbone.module).items():
        for other in others(value):
            if is_refused(backbone, field, other):
                break
            config = copy.deepcopy(backbone.module.config)
            try:
                setattr(config, field, other)
                own_keys, found = build(config)
            except Exception:  # no such model, or its weights have other shapes
                continue
            same = len(found) == len(expected) and all(map(torch.equal, found, expected))
            if own_keys == keys and not same:
                missed.add(field)
            break
    assert missed <= READ_OUT
