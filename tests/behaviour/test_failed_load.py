# SPDX-License-Identifier: Apache-2.0
"""A load that fails leaves the model as it was; a save that fails leaves the file as it was."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import peft.peft_model
import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sfa_peft import AdapterFileError, SFAConfig
from sfa_peft.files import folder as files
from sfa_peft.files.folder import WEIGHTS_NAME, check_complete
from tests.processes import start
from tests.tiny import upernet

CONFIG = SFAConfig(budget=0.2, score="magnitude", modules_to_save=["decode_head"])


def adapted(seed: int = 0) -> PeftModel:
    model = get_peft_model(upernet(), CONFIG)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors as another program would: without the checksum."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def key_of(tensors, part: str, last: bool = True) -> str:
    return [key for key in tensors if part in key][-1 if last else 0]


def drop(part: str):
    return lambda tensors: tensors.pop(key_of(tensors, part))


def cut(part: str):
    def change(tensors):
        key = key_of(tensors, part)
        tensors[key] = tensors[key][:-1].clone()

    return change


def poison(part: str, value: float):
    def change(tensors):
        tensors[key_of(tensors, part)].view(-1)[-1] = value

    return change


def as_integers(part: str):
    def change(tensors):
        key = key_of(tensors, part)
        tensors[key] = tensors[key].int()

    return change


def base_weight(tensors):
    key = key_of(tensors, "sfa_up")
    tensors[f"{key.rpartition('.sfa_up')[0]}.base_layer.weight"] = torch.zeros(16, 16)


def rename(tensors):
    key = key_of(tensors, "sfa_up")
    tensors[key.replace("layers.0", "layers.7").replace("layers.3", "layers.8")] = tensors.pop(key)


DAMAGE = {
    "no external tensor": drop("sfa_up"),
    "no selection": drop("sfa_packed"),
    "no head tensor": drop("decode_head.classifier.weight"),
    "short external tensor": cut("sfa_up"),
    "short head tensor": cut("decode_head.classifier.bias"),
    "NaN in an external adapter": poison("sfa_down", float("nan")),
    "other numbers in the head": as_integers("decode_head.classifier.weight"),
    "other numbers in an external adapter": as_integers("sfa_up"),
    "weights of the base": base_weight,
    "tensor of a layer that is not there": rename,
}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[key], before[key]) for key in before)


def load(way: str, model, folder: Path) -> None:
    if way == "from_pretrained":
        PeftModel.from_pretrained(model, folder)
    else:
        model.load_adapter(folder, "default" if way == "existing name" else "other")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("way", ["from_pretrained", "new name", "existing name"])
def test_a_load_that_fails_leaves_the_model_as_it_was(way, damage, folder):
    rewrite(folder, DAMAGE[damage])
    model = upernet() if way == "from_pretrained" else adapted(seed=3)
    kinds = [type(module) for module in model.modules()]
    before = state_of(model)
    with pytest.raises(AdapterFileError):
        load(way, model, folder)
    assert_same(model, before)
    if way != "new name":  # which leaves an empty place for another adapter in PEFT's containers
        assert [type(module) for module in model.modules()] == kinds
    if way != "from_pretrained":
        assert list(model.peft_config) == ["default"]
        assert model.active_adapters == ["default"]


def test_after_a_failed_load_a_good_file_loads(saved, folder):
    rewrite(folder, DAMAGE["short head tensor"])
    model = upernet()
    with pytest.raises(AdapterFileError, match="decode_head"):
        PeftModel.from_pretrained(model, folder)
    loaded = PeftModel.from_pretrained(model, saved).eval()
    with pytest.raises(AdapterFileError):
        loaded.load_adapter(folder, "other")
    loaded.load_adapter(saved, "other")
    pixels = torch.randn(1, 3, 32, 32)
    expected = adapted()(pixels).logits
    assert torch.equal(loaded(pixels).logits, expected)
    loaded.set_adapter("other")
    assert torch.equal(loaded(pixels).logits, expected)


def test_a_head_of_another_size_starts_anew_where_asked(saved):
    with pytest.raises(AdapterFileError, match="ignore_mismatched_sizes"):
        PeftModel.from_pretrained(upernet(num_labels=5), saved)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(
            upernet(num_labels=5), saved, ignore_mismatched_sizes=True
        )
    assert loaded(torch.randn(1, 3, 32, 32)).logits.shape[1] == 5


def test_an_edited_config_is_noticed(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"external_bias": False}))
    model = upernet()
    before = state_of(model)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(model, folder)
    assert_same(model, before)


@pytest.mark.parametrize("way", ["from_pretrained", "existing name"])
def test_every_flipped_byte_of_the_tensors_is_noticed(way, saved, folder):
    good = (saved / WEIGHTS_NAME).read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    model = adapted(seed=3)
    before = state_of(model)
    for at in range(start, len(good), max(1, (len(good) - start) // 12)):
        flipped = bytearray(good)
        flipped[at] ^= 1 << (at % 8)
        (folder / WEIGHTS_NAME).write_bytes(flipped)
        with pytest.raises(AdapterFileError, match=r"checksum|CRC"):
            load(way, upernet() if way == "from_pretrained" else model, folder)
    assert_same(model, before)


def test_the_checksum_is_that_of_the_specification(saved):
    import zlib

    with safetensors.safe_open(saved / WEIGHTS_NAME, framework="np") as file:
        found = 0
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            kind = str(array.dtype)
            found = zlib.crc32(f"{name} {kind} {list(array.shape)}\n".encode(), found)
            found = zlib.crc32(array.tobytes(), found)
        assert file.metadata() == {"format": "pt", "sfa_crc32": f"{found:08x}"}


def test_the_same_adapter_is_the_same_file_byte_for_byte(tmp_path):
    """Safetensors alone writes its metadata in another order every other time."""
    model = adapted()
    files = set()
    for _ in range(8):
        model.save_pretrained(tmp_path)
        files.add((tmp_path / WEIGHTS_NAME).read_bytes())
    assert len(files) == 1


def test_a_file_of_another_writer_needs_no_checksum(folder):
    rewrite(folder, lambda tensors: None)
    check_complete(folder)
    PeftModel.from_pretrained(upernet(), folder)


def test_a_save_that_fails_leaves_the_old_file(folder, monkeypatch):
    good = (folder / WEIGHTS_NAME).read_bytes()

    def write_half(_tensors, path, _metadata):
        Path(path).write_bytes(good[: len(good) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", write_half)
    model = adapted(seed=5)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS_NAME).read_bytes() == good
    assert not list(folder.glob(".*partial*"))
    PeftModel.from_pretrained(upernet(), folder)


def _save_for_ever(folder: Path, ready: Path) -> None:
    model = adapted()
    ready.touch()
    while True:
        model.save_pretrained(folder)


def test_a_killed_save_leaves_the_old_file_or_the_new_one(folder):
    ready = folder / "ready"
    process = start(_save_for_ever, folder, ready)
    while process.is_alive() and not ready.exists():
        time.sleep(0.01)
    time.sleep(0.7)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    pixels = torch.randn(1, 3, 32, 32)
    loaded = PeftModel.from_pretrained(upernet(), folder).eval()
    assert torch.equal(loaded(pixels).logits, adapted()(pixels).logits)


def test_files_of_other_methods_are_written_and_read_by_peft_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "save_file", None)
    model = get_peft_model(upernet(), peft.LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(safetensors.SafetensorError):
        PeftModel.from_pretrained(upernet(), tmp_path)


def test_installing_twice_changes_nothing():
    from sfa_peft.tuner.upstream.save_and_load import install

    before = peft.peft_model.safe_save_file
    install()
    assert peft.peft_model.safe_save_file is before
