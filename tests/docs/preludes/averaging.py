# SPDX-License-Identifier: Apache-2.0
import copy

import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, SFASelector
from tests.tiny import images, upernet

student = get_peft_model(upernet(), SFAConfig(budget=0.1, modules_to_save="auto", total_steps=4))
optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
selector = SFASelector(student, total_steps=4)
batches = [images(seed=seed) for seed in range(4)]
