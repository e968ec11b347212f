# SPDX-License-Identifier: Apache-2.0
from unittest.mock import create_autospec

import huggingface_hub
from peft import PeftModel, get_peft_model

import sfa_peft
from sfa_peft import SFAConfig
from tests.tiny import upernet

monkeypatch.setattr(huggingface_hub, "HfApi", create_autospec(huggingface_hub.HfApi))
base = upernet()
config = SFAConfig(budget=0.1, rho=0, score="random")
peft_model = get_peft_model(upernet(), config, adapter_name="city")
peft_model.add_adapter("roads", SFAConfig(budget=0.1, rho=0, score="random", seed=1))
model = get_peft_model(upernet(), SFAConfig(budget=0.1, score="random"))
