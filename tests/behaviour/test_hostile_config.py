# SPDX-License-Identifier: Apache-2.0
"""Whatever `adapter_config.json` holds, loading ends soon: in one error, or in the adapter."""

import json
import time
import warnings
from string import ascii_uppercase, digits

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from sfa_peft import AdapterFileError, SFAConfig
from tests.tiny import MLP

PATH = "adapter_config.json"
#: Takes 36 ways for each letter of a name.
BACKTRACKING = "(" + "|".join(f"[^{c}]" for c in ascii_uppercase + digits) + ")*$x"


@pytest.fixture
def folder(tmp_path):
    options = {"rho": 0, "score": "random", "target_modules": ["first"]}
    get_peft_model(MLP(), SFAConfig(**options, modules_to_save=["head"])).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    fields = json.loads((folder / PATH).read_text())
    (folder / PATH).write_text(json.dumps(fields | changes))


def load(folder):
    start = time.process_time()
    try:
        return PeftModel.from_pretrained(MLP(), folder)
    finally:
        assert time.process_time() - start < 2


PATTERNS = {
    "exclude_modules": {"exclude_modules": BACKTRACKING},
    "target_modules": {"target_modules": BACKTRACKING},
    "target_parameters": {"target_parameters": BACKTRACKING},
    "external_modules": {"external_modules": BACKTRACKING},
    "bad patterns": {"exclude_modules": "(", "target_modules": "[", "external_modules": "*"},
    "layers_pattern": {"layers_pattern": BACKTRACKING, "layers_to_transform": [0]},
    "modules_to_save": {"modules_to_save": ["head", BACKTRACKING, "("]},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_a_loaded_adapter_are_not_evaluated(name, folder):
    expected = load(folder).state_dict()
    edit(folder, **PATTERNS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


HOSTILE = {
    "a number as resolved": {"resolved": 7},
    "a text as budget": {"budget": "much"},
    "a list as score": {"score": ["random"]},
    "a list as task": {"task_type": []},
    "an object as modules": {"target_modules": {"first": 1}},
    "numbers as modules": {"target_modules": [1, 2]},
    "many modules": {"target_modules": ["x"] * 20_000},
    "many fields": {f"field{i}": i for i in range(1000)},
    "a list as base": {"base_model_name_or_path": ["a"]},
    "a list as mapping": {"auto_mapping": ["a"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_fields_of_another_kind_are_one_error_with_the_files_name(name, folder):
    edit(folder, **HOSTILE[name])
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: "):
        load(folder)
    assert all("sfa" not in name for name, _ in MLP().named_modules())


def test_a_config_cut_anywhere_is_one_error_with_its_path(folder):
    data = (folder / PATH).read_bytes()
    for size in range(0, len(data) - 1, 37):
        (folder / PATH).write_bytes(data[:size])
        for read in (SFAConfig.from_pretrained, PeftConfig.from_pretrained, load):
            with pytest.raises(AdapterFileError, match=rf"{folder / PATH}: no config of an"):
                read(folder)


def test_a_config_with_a_mark_before_it_is_read(folder):
    (folder / PATH).write_bytes(b"\xef\xbb\xbf" + (folder / PATH).read_bytes())
    load(folder)


def test_configs_of_other_methods_are_read_by_peft_itself(tmp_path):
    get_peft_model(MLP(), peft.LoraConfig(target_modules=["first"])).save_pretrained(tmp_path)
    edit(tmp_path, r=3, unknown=[0] * 20_000)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3
    (tmp_path / PATH).write_text("{")
    with pytest.raises(json.JSONDecodeError):
        PeftConfig.from_pretrained(tmp_path)
