# SPDX-License-Identifier: Apache-2.0
"""Trainer runs in processes of their own, so that they can be killed."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sfa_peft import SFACallback, SFAConfig
from tests.tiny import images, upernet

STEPS, ROUND = 12, 3


#: Training arguments of every run.
QUIET = {
    "save_strategy": "no",
    "report_to": [],
    "remove_unused_columns": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Images(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        return {k: v[0] for k, v in images(1, seed=index).items()}


class Kill(TrainerCallback):
    """Send SIGKILL to the own process at an event of one update step.

    Beside the Trainer's events: "rotated" (all of a checkpoint is written but the selector's state,
    and older checkpoints are gone), "model_saved" (only the adapter is written).
    """

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step
        name = "on_save" if event == "rotated" else event
        setattr(self, name, self._kill)

    def _kill(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledTrainer(Trainer):
    killed_after_model = None

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if self.state.global_step == self.killed_after_model:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def make_trainer(
    out, callbacks, options=None, model=None, data=None, optimizers=(None, None), **changes
) -> Trainer:
    """Return the same small run each time; `options` are the adapter's, `changes` the Trainer's."""
    config = {"budget": 0.2, "selection_steps": ROUND, "modules_to_save": ["decode_head"]}
    config["select_until"] = 1
    model = model or get_peft_model(upernet(), SFAConfig(**(config | (options or {}))))
    model.accepts_loss_kwargs = model.get_base_model().accepts_loss_kwargs = False
    arguments = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "label_names": ["labels"],
    }
    data = data or Images()
    return KilledTrainer(
        model=model,
        args=TrainingArguments(**(QUIET | arguments | changes)),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def run(out, options=None, kill=None, resume=None, **changes) -> None:
    """Train to the end, or to where it is killed; write the final adapter."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    first = kill is not None and kill[0] in ("rotated", "model_saved")
    callbacks = [SFACallback()]
    if kill is not None:
        callbacks.insert(0 if first else 1, Kill(*kill))
    trainer = make_trainer(out, callbacks, options, **(saving | changes))
    trainer.killed_after_model = kill[1] if kill and kill[0] == "model_saved" else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.model.save_pretrained(Path(out) / "final")


def in_child(*args, **kwargs) -> int:
    """Call `run` in a forked process; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*args, **kwargs)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_cases(folder: Path, cases: list[dict]) -> None:
    """Do every case of a list: an uninterrupted run, a killed one, and the killed one resumed.

    Each run is in a child forked from this process, which must not have started threads.
    """
    warnings.simplefilter("ignore")
    for number, case in enumerate(cases):
        options, changes = case.get("options"), case.get("changes", {})
        straight = folder / f"straight-{json.dumps(options)}"
        codes = []
        if not straight.exists():
            codes.append(in_child(straight, options, save_strategy="no"))
        out = folder / str(number)
        codes.append(in_child(out, options, kill=case["kill"], **changes))
        codes.append(in_child(out, options, resume=True, **changes))
        (folder / f"{number}.json").write_text(json.dumps({"codes": codes}))
        (folder / f"{number}.straight").symlink_to(straight)
