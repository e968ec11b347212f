# SPDX-License-Identifier: Apache-2.0
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, SFASelector
from tests.distributed_runs import process_group
from tests.tiny import upernet

stack.enter_context(process_group())
task_model, T = upernet(), 4
