# SPDX-License-Identifier: Apache-2.0
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments

from sfa_peft import SFAConfig
from sfa_peft.dense import SceneDataset
from tests.tiny import upernet

model = get_peft_model(upernet(), SFAConfig(budget=0.1, score="random", modules_to_save="auto"))
model.save_pretrained("out/ade20k")
base, args, train = upernet(), TrainingArguments("out", use_cpu=True), SceneDataset(4)
