# SPDX-License-Identifier: Apache-2.0
"""Pretraining as a user runs it, small: every layout of data, a kill, what is saved, and errors."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Swinv2Backbone, Swinv2ForImageClassification

from sfa_peft.dense.data.transforms import IGNORE_INDEX, to_tensors
from tests.class_images import (
    COUNTS,
    NAMES,
    make_folder,
    make_image,
    make_npz,
    make_parquet,
)
from tests.processes import run_code
from tests.tiny import STAGES

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_backbone.py"
# 8 steps an epoch; augmentation, mixing and stochastic depth all draw random numbers.
OPTIONS = ["--batch_size", "4", "--epochs", "1.25", "--threads", "1", "--device", "cpu"]
OPTIONS += ["--learning_rate", "3e-3", "--mixup", "0.2", "--cutmix", "0.5", "--drop_path", "0.2"]
OPTIONS += ["--ema", "0.5", "--bf16", "false", "--save_steps", "4"]


@pytest.fixture
def images() -> ModuleType:
    import pretrain_images

    return pretrain_images


def run(monkeypatch: pytest.MonkeyPatch, *options: Any) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    data = make_npz(tmp_path / "data")
    options = ["--data", data, "--config", config, *OPTIONS]
    run(monkeypatch, *options, "--output_dir", tmp_path / "whole")

    # Killed in its seventh step: after the checkpoint of the fourth, before that of the eighth.
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import pretrain_backbone
update, steps = pretrain_backbone.update, []
def counted(*args):
    steps.append(1)
    if len(steps) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
pretrain_backbone.update = counted
pretrain_backbone.main()
"""
    killed = tmp_path / "killed"
    child = run_code(code, *options, "--output_dir", killed)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [p.name for p in killed.iterdir()] == ["checkpoint.pt"]
    capsys.readouterr()
    run(monkeypatch, *options, "--output_dir", killed, "--resume_from_checkpoint")

    assert "going on after step 4" in capsys.readouterr().out
    assert equal(saved(tmp_path / "whole"), saved(killed))
    whole, resumed = (
        json.loads((folder / "results.json").read_text())["history"]
        for folder in (tmp_path / "whole", killed)
    )
    assert whole == resumed
    assert [entry[:2] for entry in whole] == [[8, 1.0]]


@pytest.mark.parametrize("make_data", [make_folder, make_parquet])
def test_every_layout_gives_the_same_images(
    make_data: Any, images: ModuleType, tmp_path: Path
) -> None:
    reference = images.load_images(make_npz(tmp_path / "npz"))
    splits = images.load_images(make_data(tmp_path / "data"))

    for split, count in COUNTS.items():
        assert splits[split].names == NAMES
        order = np.argsort(reference[split].labels, kind="stable")
        if make_data is make_parquet:
            order = np.arange(count)
        np.testing.assert_array_equal(splits[split].labels, reference[split].labels[order])
        decoded, expected = (images.decode(s[split], 24, 2) for s in (splits, reference))
        assert torch.equal(decoded, expected[torch.from_numpy(order)])
        square = torch.from_numpy(np.array(make_image(split, 0)[0])).permute(2, 0, 1)
        assert torch.equal(expected[0], square)


def test_what_is_written_loads_as_a_backbone(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out, data = tmp_path / "new" / "out", make_folder(tmp_path / "data")
    options = ["--data", data, "--config", config, "--output_dir", out, *OPTIONS]
    run(monkeypatch, *options, "--data_name", "Noise", "--data_licence", "free", "--epochs", 6)

    model = Swinv2ForImageClassification.from_pretrained(out)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.dtype == torch.float32
    backbone = Swinv2Backbone.from_pretrained(out, out_features=STAGES[:2])
    assert len(backbone(torch.randn(1, 3, 32, 32)).feature_maps) == 2
    stored = saved(out)
    kept = backbone.encoder.layers[0].blocks[0].output.dense.weight
    assert torch.equal(stored["swinv2.encoder.layers.0.blocks.0.output.dense.weight"], kept)

    results = json.loads((out / "results.json").read_text())["results"]
    assert results["top1"] > 0.8  # dark from light
    assert f"top-1 {results['top1']:.1%}" in capsys.readouterr().out
    readme = (out / "README.md").read_text()
    for text in ("Noise; 32 training and 8", "free.", "6.0 epochs", "--epochs 6"):
        assert text in readme
    for name in ("loss.png", "top1.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_half_precision_files_still_load_as_float32(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_npz(tmp_path / "data")
    options = ["--data", data, "--config", config, *OPTIONS, "--max_minutes", 0.02]
    run(monkeypatch, *options, "--output_dir", tmp_path / "half", "--save_dtype", "float16")

    model = Swinv2ForImageClassification.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.float32
    stored = saved(tmp_path / "half")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert equal({n: t.float() for n, t in stored.items()}, dict(model.state_dict()))
    results = json.loads((tmp_path / "half" / "results.json").read_text())["results"]
    assert 0.02 <= results["minutes"] < 0.1  # stopped by the clock
    assert results["steps"] > 0


def test_blocks_start_as_the_identity(config: Path) -> None:
    from pretrain_setup import Arguments, make_model

    args = Arguments(data=".", config=str(config), device="cpu")
    model = make_model(args, NAMES)
    pixels = torch.randn(2, 3, 32, 32)
    embedded = model.swinv2.embeddings(pixels)[0]
    stage = model.swinv2.encoder.layers[0]

    assert torch.equal(stage.blocks[0](embedded, (8, 8))[0], embedded)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_weight_has_one_optimizer_and_matrices_decay(optimizer: str, config: Path) -> None:
    from pretrain_setup import Arguments, make_model, make_optimizer

    args = Arguments(data=".", config=str(config), device="cpu", optimizer=optimizer)
    model = make_model(args, NAMES)
    names = {id(p): name for name, p in model.named_parameters()}
    made = make_optimizer(model, args)
    groups = [group for member in made.members for group in member.param_groups]

    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    plain = [g for g in groups if not g["weight_decay"]]
    assert [g["weight_decay"] for g in groups if g not in plain] == [0.05] * (len(groups) - 1)
    still = {names[id(p)] for g in plain for p in g["params"]}
    assert all(p.ndim < 2 or n in still for n, p in model.named_parameters() if "bias_mlp" in n)
    assert {"classifier.bias", "swinv2.layernorm.weight"} <= still
    if optimizer == "adamw":
        return
    (muon,) = made.members[1].param_groups
    shapes = {names[id(p)]: p.ndim for p in muon["params"]}
    assert set(shapes.values()) == {2}
    assert not {name for name in shapes if "classifier" in name or "patch" in name}

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made.step(0.5)
    assert [g["lr"] for g in groups] == [1.5e-3 / 2, 1.5e-3 / 2, 3e-3 / 2]


def test_the_rate_rises_then_falls_to_nothing() -> None:
    from pretrain_backbone import rate_at

    rates = [rate_at(i / 1000, 0.05) for i in range(1001)]

    assert 0 < rates[0] < 0.05
    assert rates[50] == max(rates) == 1
    assert all(a < b for a, b in pairwise(rates[1:51]))
    assert all(a > b for a, b in pairwise(rates[50:]))
    assert rates[-1] == pytest.approx(0)
    assert rate_at(0.0, 0.0) == 1


def test_crops_are_parts_of_the_image_mirrored_half_the_time(images: ModuleType) -> None:
    torch.manual_seed(0)
    # Colours tell the place: red is x, green is y, both -1 to 1.
    place = (torch.arange(64) + 0.5) / 32 - 1
    image = torch.stack(
        [place.expand(64, 64), place[:, None].expand(64, 64), place.new_zeros(64, 64)]
    )

    crops = images.random_crop(image.expand(400, 3, 64, 64), 16, 0.25)

    # Pixel centres of the crop are 15/16 of its width apart, from first to last.
    width = (crops[:, 0, :, -1] - crops[:, 0, :, 0]).mean(1) / 2 * 16 / 15
    height = (crops[:, 1, -1] - crops[:, 1, 0]).mean(1) / 2 * 16 / 15
    area = (width * height).abs()
    assert area.min() > 0.2
    assert area.max() <= 1.05
    assert area.std() > 0.1
    assert 0.4 < (width < 0).float().mean() < 0.6
    assert (height > 0).all()
    middle = crops[:, :2, 7:9, 7:9].mean((2, 3))
    assert ((middle.abs() + torch.stack([width.abs(), height], 1)) < 1.05).all()  # within the image
    assert middle.std() > 0.1


def test_colours_change_within_the_strength_and_not_at_all_without(images: ModuleType) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(64, 3, 8, 8) * 0.2 + 0.4

    torch.testing.assert_close(images.colour_jitter(pictures, 0.0), pictures)
    changed = images.colour_jitter(pictures, 0.3)
    ratio = changed.mean((1, 2, 3)) / pictures.mean((1, 2, 3))
    assert 0.65 < ratio.min() < 0.8
    assert 1.2 < ratio.max() < 1.35


def test_images_are_normalised_as_the_other_examples_do(images: ModuleType) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    expected = to_tensors(picture, np.full((8, 8), IGNORE_INDEX))["pixel_values"]

    batch = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(images.normalise(batch)[0], expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_targets_tell_the_share_of_each_image(
    images: ModuleType, mixup: float, cutmix: float
) -> None:
    # Image i is of class i and holds the value i everywhere.
    values, one_hot = torch.arange(4.0), torch.eye(4)
    pictures = values[:, None, None, None].expand(4, 3, 16, 16)
    torch.manual_seed(0)
    shares = []
    for _ in range(50):
        mixed, targets = images.mix(pictures, one_hot, mixup, cutmix)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ values)
        is_pasted = bool((mixed == mixed.round()).all())
        assert is_pasted == (mixup == 0) or (mixup and cutmix)
        shares.append(targets[0, 0].item())

    assert np.std(shares) > 0.1
    assert images.mix(pictures, one_hot, 0.0, 0.0) == (pictures, one_hot)


def spoil(change: str, data: Path) -> None:
    path = data / "train.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if change == "no val":
        (data / "val.npz").unlink()
    elif change == "other names":
        arrays["name"] = np.array(["dark", "bright"])
    elif change == "label":
        arrays["label"] = arrays["label"] + 1
    elif change == "offset":
        arrays["offset"] = arrays["offset"][:-1]
    elif change == "no name":
        del arrays["name"]
    elif change == "damaged":
        arrays["data"] = np.where(np.arange(len(arrays["data"])) < 300, 0, arrays["data"])
    np.savez(path, **{k: v.astype(v.dtype) for k, v in arrays.items()})


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("no val", [], "no split val or validation"),
        ("other names", [], "the two splits have different class names"),
        ("label", [], "class ids run from 1 to 2, but there are 2 names"),
        ("offset", [], "`offset` needs one place per label"),
        ("no name", [], "no ['name'] among"),
        ("damaged", [], "`image 0`: cannot be decoded"),
        ("", ["--batch_size", 33], "--batch_size 33: there are only 32 training images"),
        ("", ["--config", "no/such"], "--config no/such: "),
        ("", ["--data", "no/such"], "--data no/such: no such folder"),
        ("", ["--epochs", 0], "--epochs: expected more than 0"),
        ("", ["--jitter", 2], "--jitter: expected 0 to 1"),
        ("", ["--max_minutes", -1], "--max_minutes: expected more than 0"),
        ("", ["--learning_rate", 1e30, "--ema", 0], "lower the learning rates"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    change: str,
    options: list[Any],
    message: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    data = make_npz(tmp_path / "data")
    spoil(change, data)
    out = tmp_path / "out"

    with pytest.raises(SystemExit) as stopped:
        run(
            monkeypatch,
            "--data",
            data,
            "--config",
            config,
            "--output_dir",
            out,
            *OPTIONS,
            *options,
        )

    assert stopped.value.code not in (None, 0)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not (out / "model.safetensors").exists()


def test_a_checkpoint_of_other_options_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_npz(tmp_path / "data")
    options = [
        "--data",
        data,
        "--config",
        config,
        "--output_dir",
        tmp_path / "out",
        *OPTIONS,
    ]
    run(monkeypatch, *options)
    before = saved(tmp_path / "out")

    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *options, "--resume_from_checkpoint", "--mixup", 0.3)

    assert "mixup was 0.2 in that run and is 0.3 in this one" in str(stopped.value.code)
    assert equal(before, saved(tmp_path / "out"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    from pretrain_setup import write_atomically

    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
