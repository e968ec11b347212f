# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model

from sfa_peft import SFAConfig
from tests.tiny import images, upernet

AcceleratorState._reset_state(reset_partial_state=True)
accelerator = Accelerator(cpu=True)
steps, path = 4, Path("checkpoint.pt")
model = get_peft_model(upernet(), SFAConfig(budget=0.1, modules_to_save="auto"))
loader = [images(seed=seed) for seed in range(steps)]


def micro_batches(step):
    return [loader[step], loader[step]]
