# SPDX-License-Identifier: Apache-2.0
import random
import zipfile
import zlib
from contextlib import suppress

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SelectionError, SFACallback, SFAConfig, SFASelector
from sfa_peft.training.state_files import (
    STATE_NAME,
    move_into_checkpoints,
    read_state,
    write_state,
)
from tests.processes import run_code
from tests.tiny import MLP
from tests.training.trainer_runs import make_trainer

SMALL = {"pool": {"slots": torch.tensor([2, 5, -1]), "values": torch.tensor([1.0, -1.0, 0.0])}}


def selector_after(steps, **options):
    """Return the selector of a run of 16 steps with picks after steps 4, 8 and 12."""
    config = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"]}
    model = get_peft_model(MLP(), SFAConfig(**config, selection_steps=4, select_until=1, **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    selector = SFASelector(model, total_steps=16)
    for step in range(steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return selector


@pytest.fixture(scope="module")
def selector():
    return selector_after(10)


def written(state, folder, step=4):
    """Return the checkpoint that holds a state."""
    (folder / f"checkpoint-{step}").mkdir()
    write_state(state, folder, step)
    move_into_checkpoints(folder)
    return folder / f"checkpoint-{step}"


def assert_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(SelectionError, match=r"sfa_selector\.pt: cut short or damaged"):
        read_state(path.parent, 4)


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_state_comes_back_and_torch_alone_reads_it_too(tmp_path, selector):
    folder = written(selector.state_dict(), tmp_path)
    expected = selector.state_dict()
    for found in (read_state(folder, 4), torch.load(folder / STATE_NAME, weights_only=True)):
        assert found.keys() == expected.keys()
        assert found["joined"] == expected["joined"]
        for name, sums in expected["sums"].items():
            assert torch.equal(found["sums"][name], sums)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_same_state_is_the_same_file_whatever_its_name(tmp_path):
    for step in (4, 8):
        written(SMALL, tmp_path, step)
    one, two = (tmp_path / f"checkpoint-{step}" / STATE_NAME for step in (4, 8))
    assert one.read_bytes() == two.read_bytes()


def test_every_flipped_bit_of_a_small_state_is_refused(tmp_path):
    path = written(SMALL, tmp_path) / STATE_NAME
    data, accepted = path.read_bytes(), []
    with path.open("rb+", buffering=0) as file:
        for bit in range(8 * len(data)):
            file.seek(bit // 8)
            file.write(bytes([data[bit // 8] ^ 1 << bit % 8]))
            with suppress(SelectionError):
                accepted.append(read_state(path.parent, 4))
            file.seek(bit // 8)
            file.write(data[bit // 8 : bit // 8 + 1])
    assert not accepted
    assert read_state(path.parent, 4)["pool"]["slots"].tolist() == [2, 5, -1]


def test_flipped_bits_and_cuts_of_a_larger_state_are_refused(tmp_path, selector):
    path = written(selector.state_dict(), tmp_path) / STATE_NAME
    data, rng = path.read_bytes(), random.Random(0)
    for bit in rng.sample(range(8 * len(data)), 300):
        assert_refused(path, flipped(data, bit))
    for size in (0, 3, 12, *rng.sample(range(len(data)), 100)):
        assert_refused(path, data[:size])
    assert_refused(path, data + b"x")
    assert_refused(path, data[:-12])  # without a checksum


def test_a_forged_archive_that_expands_is_refused_before_it_does(tmp_path):
    path = written({"pool": {"values": torch.zeros(1 << 20)}}, tmp_path) / STATE_NAME
    packed = path.with_suffix(".zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    body = packed.read_bytes()
    assert_refused(path, body + b"SFASTATE" + zlib.crc32(body).to_bytes(4, "little"))


def _changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


DAMAGES = {
    "NaN sums": ("sums", lambda t: _changed(t, (0, 0), torch.nan), "NaN or infinite"),
    "infinite sums": ("sums", lambda t: _changed(t, (0, 0), -torch.inf), "NaN or infinite"),
    "one sum for all": ("sums", lambda t: t[:1, :1].clone(), r"expected shape .*, got \[1, 1\]"),
    "flat sums": ("sums", torch.flatten, "expected shape"),
    "sums of integers": ("sums", torch.Tensor.long, "expected floats"),
    "sums that are no tensor": ("sums", torch.Tensor.tolist, "expected floats"),
    "sums of more than the model": ("sums", lambda t: t[:1, :1].expand(1 << 40, 9), "shape"),
    "permuted positions": ("slots", lambda t: t.flip(0).roll(-int((t < 0).sum())), "out of order"),
    "repeated positions": ("slots", lambda t: _changed(t, 1, t[0]), "positions repeat"),
    "a gap": ("slots", lambda t: _changed(t, 1, -1), "positions have gaps"),
    "fewer positions": ("slots", lambda t: torch.full_like(t, -1), "not of its positions"),
    "positions that one stands for": ("slots", lambda t: t[:1].expand(1 << 50), "entries out of"),
    "positions of floats": ("slots", torch.Tensor.float, "expected integers"),
    "NaN values": ("values", lambda t: _changed(t, 0, torch.nan), "NaN or infinite"),
    "fewer values": ("values", lambda t: t[:-1], "expected shape"),
    "picks in another order": ("joined", lambda picks: picks[::-1], "not of its positions"),
    "a pick that is missing": ("joined", lambda picks: picks[:1], "not of its positions"),
    "picks at one step": ("joined", lambda p: [p[0], (*p[1][:2], p[0][2])], "out of order"),
    "picks that are none": ("joined", lambda picks: 3, "not iterable"),
    "a pick of one number": ("joined", lambda picks: [(3,)], "unpack"),
    "picks in the future": ("update_steps", lambda n: 3, "out of order"),
    "a fraction of a step": ("update_steps", lambda n: n + 0.5, "is none"),
    "steps below zero": ("selection_steps", lambda n: -n, "is none"),
    "a setting of another name": ("settings", lambda old: old | {"budget": 1}, "other settings"),
    "a setting that is a list": ("settings", lambda old: old | {"score": []}, "a setting is none"),
    "an end that is no number": ("settings", lambda s: s | {"select_until": True}, "no share"),
    "an end that is NaN": ("settings", lambda s: s | {"select_until": float("nan")}, "no share"),
    "an end after the end": ("settings", lambda s: s | {"select_until": 1.5}, "no share"),
    "no number of gradients": ("num_added", lambda numbers: {}, "KeyError"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_state_that_contradicts_itself_is_one_error(name, selector):
    field, damage, message = DAMAGES[name]
    state = selector.state_dict()
    if field == "sums":
        first = next(iter(state["sums"]))
        state["sums"] = state["sums"] | {first: damage(state["sums"][first])}
    elif field in ("slots", "values"):
        state["pool"] = state["pool"] | {field: damage(state["pool"][field])}
    else:
        state[field] = damage(state[field])
    with pytest.raises(SelectionError, match=f"state is damaged .*{message}"):
        selector.load_state_dict(state)
    selector.load_state_dict(selector.state_dict())


def test_moments_of_candidates_are_checked_too():
    selector = selector_after(6, score="weight_difference")
    state = selector.state_dict()
    state["candidates"]["state"][0]["exp_avg"][0, 0] = torch.nan
    with pytest.raises(SelectionError, match="exp_avg of candidate 0: NaN"):
        selector.load_state_dict(state)


@pytest.mark.parametrize("state", [{"pool": 3}, {"update_steps": 3}, [1], {"pool": {"slots": 1}}])
def test_a_state_of_another_kind_is_the_same_error(state, selector):
    with pytest.raises(SelectionError, match="state is damaged"):
        selector.load_state_dict(state)


# --- killed while writing ---------------------------------------------------------------------

KILLED_SAVE = """
import os, signal, sys
import peft, safetensors.torch
import sfa_peft.files.folder as files
from sfa_peft import SFAConfig
from tests.tiny import MLP

def write_half(tensors, path, metadata):
    safetensors.torch.save_file(tensors, path, metadata)
    os.kill(os.getpid(), signal.SIGKILL)

files.save_file = write_half
config = SFAConfig(rho=0, score="random", target_modules=["first"])
peft.get_peft_model(MLP(), config).save_pretrained(sys.argv[1])
"""

KILLED_STATE = """
import os, pathlib, signal, sys
import torch
from sfa_peft.training import state_files

def write_half(state, file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = write_half
state_files.write_state({}, pathlib.Path(sys.argv[1]), 4)
"""


def killed(program, folder):
    folder.mkdir(exist_ok=True)
    run = run_code(program, folder)
    assert run.returncode < 0, run.stderr


def test_a_checkpoint_in_which_a_save_was_killed_is_still_resumed(tmp_path):
    make_trainer(
        tmp_path, [SFACallback()], save_strategy="steps", save_steps=4, max_steps=8
    ).train()
    last = str(tmp_path / "checkpoint-4")
    killed(KILLED_SAVE, tmp_path / "checkpoint-4")
    trainer = make_trainer(tmp_path, [SFACallback()], max_steps=8)
    trainer.train(resume_from_checkpoint=last)
    trainer.model.save_pretrained(last)
    assert not list((tmp_path / "checkpoint-4").glob(".*"))


def test_a_state_whose_writing_was_killed_is_swept_by_the_next(tmp_path):
    killed(KILLED_STATE, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    folder = written(SMALL, tmp_path, step=8)
    assert list(tmp_path.iterdir()) == [folder]
    read_state(folder, 8)


def test_files_of_others_beside_the_checkpoints_stay(tmp_path):
    (tmp_path / "sfa_selector-best.pt").touch()
    (tmp_path / "sfa_selector-4.pt").touch()
    move_into_checkpoints(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["sfa_selector-best.pt"]
