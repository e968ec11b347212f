# SPDX-License-Identifier: Apache-2.0
"""A run that was killed, or went back, ends with the same bits as one that never stopped."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from sfa_peft import ResumedRunWarning, SelectionError, SFACallback, SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.processes import start
from tests.tiny import MLP
from tests.training.trainer_runs import make_trainer, run_cases

KILLED = -signal.SIGKILL
#: What happens to a run of 12 steps with picks after steps 3, 6 and 9.
CASES = {
    "inside the first round": {"kill": ["on_step_end", 2]},
    "at a pick's step, before it is saved": {"kill": ["on_step_end", 6]},
    "right after a pick, in its on_save": {"kill": ["on_save", 6]},
    "after older checkpoints are gone": {
        "kill": ["rotated", 5],
        "changes": {"save_total_limit": 1},
    },
    "with half a checkpoint": {"kill": ["model_saved", 7]},
    "between scored steps, with bfloat16 scores": {
        "kill": ["on_step_end", 5],
        "options": {"score_every": 2, "score_dtype": "bfloat16"},
    },
    "with a score of whole steps": {
        "kill": ["on_step_end", 5],
        "options": {"score": "absolute_gradient"},
    },
    "while candidates train": {
        "kill": ["on_step_end", 5],
        "options": {"score": "weight_difference"},
    },
}


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    process = start(run_cases, folder, list(CASES.values()))
    process.join()
    assert process.exitcode == 0
    return folder


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, two) -> None:
    assert one.keys() == two.keys()
    assert not [k for k in one if not torch.equal(one[k], two[k])]


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_resumed_in_a_new_process_ends_with_the_same_bits(killed_runs, name):
    number = list(CASES).index(name)
    codes = json.loads((killed_runs / f"{number}.json").read_text())["codes"]
    assert codes[-2:] == [KILLED, 0]
    final = (killed_runs / f"{number}.straight" / "final", killed_runs / str(number) / "final")
    assert_same(*(adapter(f) for f in final))
    bytes_of = [(f / "adapter_model.safetensors").read_bytes() for f in final]
    assert bytes_of[0] == bytes_of[1]
    assert not list((killed_runs / str(number)).glob("sfa_selector*"))  # nothing is left behind


def test_a_checkpoint_without_the_selectors_state_says_what_to_do(tmp_path):
    make_trainer(tmp_path, [SFACallback()], save_strategy="steps", save_steps=4).train()
    last = get_last_checkpoint(str(tmp_path))
    (Path(last) / "sfa_selector.pt").unlink()
    again = make_trainer(tmp_path, [SFACallback()])
    with pytest.raises(SelectionError, match="delete the folder and resume from the one before"):
        again.train(resume_from_checkpoint=last)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


HALVES = {
    "the Trainer's state is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "the Trainer's state is cut": lambda folder: cut(folder / "trainer_state.json"),
    "the selector's state is missing": lambda folder: (folder / "sfa_selector.pt").unlink(),
    "the selector's state is cut": lambda folder: cut(folder / "sfa_selector.pt"),
    "the adapter is cut": lambda folder: cut(folder / "adapter_model.safetensors"),
    "nothing is there": shutil.rmtree,
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, [SFACallback()], save_strategy="steps", save_steps=4)
    trainer.train()
    return folder, {n: t.clone() for n, t in trainer.model.state_dict().items()}


@pytest.mark.parametrize("missing", HALVES)
def test_a_resume_passes_over_half_a_checkpoint_and_says_so(whole_run, missing, tmp_path):
    source, final = whole_run
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    HALVES[missing](tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12").mkdir(exist_ok=True)
    (tmp_path / "checkpoint-best").mkdir()  # not the Trainer's
    again = make_trainer(tmp_path, [SFACallback()])
    said = r"checkpoint-12 is not whole \(.*: the run resumes from .*checkpoint-8\.$"
    with pytest.warns(ResumedRunWarning, match=said) as caught:
        again.train(resume_from_checkpoint=True)
    assert {w.filename for w in caught if "is not whole" in str(w.message)} == {__file__}
    assert_same(again.model.state_dict(), final)


def test_where_no_checkpoint_is_whole_the_trainer_decides(whole_run, tmp_path):
    shutil.copytree(whole_run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        make_trainer(tmp_path, [SFACallback()]).train(resume_from_checkpoint=True)


# --- own loops -------------------------------------------------------------------------------

STEPS = 16
SETTINGS = {
    "default": {},
    "bfloat16": {"score_dtype": "bfloat16"},
    "every second step": {"score_every": 2},
    "absolute": {"score": "absolute_gradient"},
    "candidates": {"score": "weight_difference"},
    "rows": {"granularity": "row"},
    "blocks": {"granularity": "block"},
}


class Loop:
    """A loop with Accelerate; everything in it is registered for checkpoints."""

    def __init__(self, kind=torch.optim.AdamW, **options) -> None:
        self.accelerator = Accelerator(cpu=True)
        config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"]}
        config |= {"modules_to_save": ["head"], "selection_steps": 4, "select_until": 1} | options
        model = get_peft_model(MLP(), SFAConfig(**config))
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.selector = SFASelector(self.model, total_steps=STEPS)
        self.accelerator.register_for_checkpointing(self.selector)

    def train(self, first: int, last: int, folder=None) -> None:
        """Make update steps `first` to `last`; save each state where there is a folder."""
        for step in range(first, last + 1):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward((self.model(x) - 1).square().mean())
            self.optimizer.step()
            self.selector.step(self.optimizer)
            self.optimizer.zero_grad()
            if folder is not None:
                self.accelerator.save_state(str(folder / str(step)))

    def load(self, folder, step: int) -> None:
        self.accelerator.load_state(str(folder / str(step)))

    def state(self) -> dict[str, torch.Tensor]:
        return {n: t.clone() for n, t in self.model.state_dict().items()}


class OtherAdam(torch.optim.Adam):
    """Adam's steps under a name that late entries do not know."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loaded_state_goes_on_with_the_same_bits_in_fresh_objects(name, tmp_path):
    straight = Loop(**SETTINGS[name])
    straight.train(1, STEPS, tmp_path)
    for step in (2, 4, 5, 9, 12, 14):
        fresh = Loop(**SETTINGS[name])
        fresh.load(tmp_path, step)
        fresh.train(step + 1, STEPS)
        assert_same(fresh.state(), straight.state())


@pytest.mark.parametrize("name", SETTINGS)
def test_an_earlier_state_loaded_over_a_later_one_takes_everything_back(name, tmp_path):
    loop = Loop(**SETTINGS[name])
    loop.train(1, STEPS, tmp_path)
    final = loop.state()
    pool = find_pool(loop.model, "default")
    assert not any(pool.weights[i].observers for i in range(2))  # freed by the last pick
    for step in (14, 9, 6, 2, 11, 4):
        loop.load(tmp_path, step)
        assert loop.selector.update_steps == step
        if name not in ("rows", "blocks"):
            assert pool.num_assigned == loop.selector.schedule.selected_after(step)
        loop.train(step + 1, STEPS)
        assert_same(loop.state(), final)


def test_what_was_found_out_about_an_optimizer_is_resumed_too(tmp_path):
    straight = Loop(kind=OtherAdam)
    straight.train(1, STEPS, tmp_path)
    for step in (4, 5, 6, 10):
        fresh = Loop(kind=OtherAdam)
        fresh.load(tmp_path, step)
        fresh.train(step + 1, STEPS)
        assert_same(fresh.state(), straight.state())
    uncorrected = Loop(kind=OtherAdam, late_bias_correction=False)
    uncorrected.train(1, STEPS)
    pools = [find_pool(loop.model, "default") for loop in (straight, uncorrected)]
    assert not torch.equal(pools[0].values, pools[1].values)


@pytest.mark.filterwarnings("ignore::sfa_peft.UnfinishedSelectionWarning")
@pytest.mark.parametrize("best", [2, 4, 6, 12])
def test_the_best_model_loaded_at_the_end_is_its_checkpoint_bit_for_bit(tmp_path, best):
    def quality(_prediction) -> dict[str, float]:
        return {"quality": float(trainer.state.global_step == best)}

    trainer = make_trainer(
        tmp_path,
        [SFACallback()],
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
    )
    trainer.compute_metrics = quality
    trainer.train()
    folder = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(folder)
    trainer.model.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
