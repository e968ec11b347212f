# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from sfa_peft import ConfigError, SFAConfig


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
        ({"layers_pattern": "blocks"}, "layers_to_transform"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "is a str"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected(changes, message):
    with pytest.raises(ConfigError, match=message):
        SFAConfig(**changes)


def test_a_saved_config_is_json_and_reads_back_equal(tmp_path):
    config = SFAConfig(budget=0.1, target_modules=["query", "key"], total_steps=100)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SFA"
    assert SFAConfig.from_pretrained(tmp_path) == config


def test_the_model_card_says_how_to_load_and_says_it_once(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# My adapter\n")
    SFAConfig().save_pretrained(tmp_path)
    SFAConfig().save_pretrained(tmp_path)
    text = card.read_text()
    assert text.startswith("# My adapter")
    assert text.count("import sfa_peft  # registers") == 1
