# SPDX-License-Identifier: Apache-2.0
from peft import get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.dense import SceneDataset
from tests.tiny import upernet

model = get_peft_model(upernet(), SFAConfig(budget=0.1, modules_to_save="auto"))
train = SceneDataset(4)
