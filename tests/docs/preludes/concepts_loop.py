# SPDX-License-Identifier: Apache-2.0
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, SFASelector
from tests.tiny import images, upernet

model = get_peft_model(upernet(), SFAConfig(budget=0.1, modules_to_save="auto"))
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
update_steps = [[images(seed=step), images(seed=-1 - step)] for step in range(4)]
selector = SFASelector(model, total_steps=len(update_steps))
