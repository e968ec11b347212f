# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from PIL import Image

import sfa_peft
from tests.task_folder import plain_model, save_backbone, save_task

for name in ("photo.jpg", "other.png"):
    Image.new("RGB", (40, 48), "teal").save(name)
save_task(Path("out/streets"), save_backbone(Path()))
plain_model = plain_model(Path("backbone"))
load_task = sfa_peft.load_task
# The page has a GPU.
monkeypatch.setattr(sfa_peft, "load_task", lambda folder, device: load_task(folder, device="cpu"))
