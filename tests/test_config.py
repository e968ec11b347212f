# SPDX-License-Identifier: Apache-2.0
import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sfa_peft import ConfigError, SFAConfig, SFASelector, budget_report
from tests.tiny import MLP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "0 < budget <= 1, got 0"),
        ({"budget": -0.1}, "0 < budget <= 1"),
        ({"budget": 1.01}, "0 < budget <= 1"),
        ({"budget": float("nan")}, "0 < budget <= 1"),
        ({"budget": "0.2"}, "0 < budget <= 1"),
        ({"rho": -0.01}, "0 <= rho <= 1"),
        ({"rho": 1.5}, "0 <= rho <= 1"),
        ({"rho": 0.5, "adapter_dim": 8}, "both given"),
        ({"adapter_dim": 0}, "width of at least 1"),
        ({"adapter_dim": 1.5}, "width of at least 1"),
        ({"score": "fisher"}, "unknown score 'fisher'.*accumulated_gradient"),
        ({"selection_steps": 0}, "at least 1, got 0"),
        ({"total_steps": -5}, "at least 1, got -5"),
        ({"score": 3}, "unknown score 3"),
        ({"score_dtype": "float16"}, "score_dtype: expected one of float32, bfloat16, got 'float1"),
        ({"score_every": 0}, "score_every: expected .* at least 1, got 0"),
        ({"score_every": 1.5}, "score_every"),
        ({"score": "weight_difference", "score_every": 2}, "on every step"),
        ({"ranking": "local"}, "ranking: expected one of global, layer, output, got 'local'"),
        ({"ranking": None}, "ranking: expected one of"),
        ({"ranking": "output", "granularity": "row"}, "Leave one of them out"),
        ({"granularity": "column"}, "granularity: expected one of weight, block, block64, row"),
        ({"schedule": "square"}, "schedule: expected one of linear, cubic, one_shot, literal"),
        ({"select_until": 0}, "0 < select_until <= 1, got 0"),
        ({"select_until": 1.01}, "0 < select_until <= 1"),
        ({"select_until": True}, "0 < select_until <= 1"),
        ({"internal_lr_ratio": 0}, "a factor above 0, got 0"),
        ({"internal_lr_ratio": -1.0}, "a factor above 0"),
        ({"internal_lr_ratio": float("inf")}, "a factor above 0"),
        ({"weight_decay_on": "both"}, "weight_decay_on: expected one of change, weight"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"seed": None}, "seed: expected an integer"),
        ({"layers_pattern": "blocks"}, "layers_to_transform"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "is a str"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected(changes, message):
    with pytest.raises(ConfigError, match=message):
        SFAConfig(**changes)


def test_a_saved_config_is_json_and_reads_back_equal(tmp_path):
    config = SFAConfig(
        budget=0.1,
        target_modules=["query", "key"],
        target_parameters=["bias", "norm.weight"],
        total_steps=100,
        score="movement",
        score_dtype="bfloat16",
        score_every=2,
        ranking="layer",
        granularity="row",
        schedule="cubic",
        select_until=0.5,
        late_bias_correction=False,
        internal_lr_ratio=3.0,
        weight_decay_on="weight",
        seed=7,
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SFA"
    assert SFAConfig.from_pretrained(tmp_path) == config


def test_names_in_any_collection_can_be_saved():
    for collection in (list, tuple, set, frozenset):
        config = SFAConfig(target_modules=collection(["b", "a"]))
        assert config.target_modules == {"a", "b"}
        assert json.loads(json.dumps(config.to_dict()))["target_modules"] == ["a", "b"]


def test_what_is_known_of_an_adapter_stays_with_its_config_and_is_no_setting(tmp_path):
    config = SFAConfig()
    other = copy.copy(config)
    config.remember(metrics={"mIoU": 0.5})
    assert other.notes.metrics is None
    assert config == other
    config.save_pretrained(str(tmp_path))
    again = SFAConfig.from_pretrained(tmp_path)
    assert (again.notes.folder, again.notes.metrics) == (str(tmp_path), None)
    assert config.notes.folder is None


def test_a_config_of_another_method_is_read_as_what_it_is(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert SFAConfig.from_pretrained(tmp_path).r == 3


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    SFAConfig(budget=0.1).save_pretrained(str(tmp_path))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        SFAConfig(budget=0.2).save_pretrained(str(tmp_path))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_the_file_of_another_method_is_read_as_that(tmp_path):
    LoraConfig(r=4, target_modules=["first"]).save_pretrained(tmp_path)
    found = SFAConfig.from_pretrained(tmp_path)  # as PEFT's own classes do
    assert isinstance(found, LoraConfig)
    assert found.r == 4


def test_what_belongs_to_a_run_is_dropped_from_a_file_as_peft_does(tmp_path):
    SFAConfig(budget=0.1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    assert SFAConfig.from_json_file(path) == fields


def test_the_papers_settings_may_be_changed_one_by_one():
    config = SFAConfig.paper()
    assert (config.budget, config.rho, config.schedule) == (0.2, 0.5, "literal")
    small = SFAConfig.paper(0.048, adapter_dim=64, ranking="layer")
    assert (small.budget, small.rho, small.adapter_dim) == (0.048, None, 64)
    assert (small.ranking, small.schedule) == ("layer", "literal")


def test_the_papers_loop_leaves_one_round_of_the_budget_and_counts_no_biases():
    layers = ["first", "second"]
    options = {"target_modules": layers, "external_modules": ["second"], "selection_steps": 5}
    model = get_peft_model(MLP(), SFAConfig.paper(0.5, **options))
    selector = SFASelector(model, total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(20):
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()

    report = budget_report(model)
    assert report.external == 2 * 16 * report.adapter_dim > 0
    assert report.selected == report.internal * 3 // 4
