# SPDX-License-Identifier: Apache-2.0
# The page's run has 40,000 steps and evaluates every 2,000: here a ten-thousandth of that.
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset

from tests.tiny import images, upernet


class Tiny(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[0] for name, value in images(1, seed=index).items()}


def mean_iou(prediction):
    return {"mean_iou": 0.5}


def short(*args, **options):
    counts = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "report_to": []}
    options |= {name: value for name, value in counts.items() if name in options}
    return Arguments(*args, **options, use_cpu=True, per_device_train_batch_size=2)


Arguments = transformers.TrainingArguments
monkeypatch.setattr(transformers, "TrainingArguments", short)
AcceleratorState._reset_state(reset_partial_state=True)
base, train, val, T = upernet(), Tiny(), Tiny(), 4
probe = images()
loader = torch.utils.data.DataLoader(train, 2)
