# SPDX-License-Identifier: Apache-2.0
from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig
from tests.tiny import upernet


def saved(folder, seed, **options):
    """Save an adapter with a random selection, as if it had been trained."""
    config = {"budget": 0.2, "modules_to_save": ["decode_head"], "score": "random", "seed": seed}
    get_peft_model(upernet(), SFAConfig(**(config | options))).save_pretrained(folder)


saved("out/ade20k", 1)
saved("out/first", 2)
for number, name in enumerate(["out/a", "out/b", "out/city", "out/roads"]):
    saved(name, number, rho=0, modules_to_save=None)
cityscapes_model, task_model, plain_model, pretrained_model = (upernet() for _ in range(4))
upernet(seed=5).save_pretrained("out/fully-tuned")
peft_model = PeftModel.from_pretrained(upernet(), "out/city", adapter_name="city")
peft_model.load_adapter("out/roads", adapter_name="roads")
