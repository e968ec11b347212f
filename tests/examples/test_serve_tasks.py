# SPDX-License-Identifier: Apache-2.0
"""The served tasks as a browser or curl sees them, with adapters that were trained for 4 steps."""

from __future__ import annotations

import base64
import importlib
import io
import json
import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from fastapi.testclient import TestClient

from sfa_peft.errors import SFAError

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 200_000


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """Import the script as Python does that runs it: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        for name in ("semantic_segmentation", "serve_setup", "serve_tasks"):
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("serve_tasks")


@pytest.fixture(scope="module")
def args(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve_setup.SCENES", 8)
        found = example.parse(["--output_dir", str(out)])
        folders = example.train_both(out, found.backbone, 64, 8, steps=4)
    found.segmentation, found.depth = map(str, folders)
    return found


@pytest.fixture(scope="module")
def loaded(example: ModuleType, args: Any) -> Any:
    return example.load_bank(args)


@pytest.fixture(scope="module")
def client(example: ModuleType, loaded: Any) -> TestClient:
    bank, names = loaded
    return TestClient(example.make_app(bank, names, image_size=64, max_bytes=LIMIT))


def picture(width: int = 64, height: int = 64, kind: str = "PNG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(array).resize((width, height)).convert(mode)
    image.save(buffer, kind)
    return buffer.getvalue()


def decode(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)),
        ({"width": 200, "height": 100, "kind": "JPEG"}, (128, 64)),
        ({"width": 64, "height": 640}, (64, 192)),
        ({"mode": "L"}, (64, 64)),
        ({"mode": "RGBA"}, (64, 64)),
        ({"mode": "P", "kind": "GIF"}, (64, 64)),
        ({"width": 8, "height": 8, "kind": "BMP"}, (64, 64)),
    ],
)
def test_a_picture_comes_back_as_classes_and_depth(client, options, size):
    response = client.post("/predict", content=picture(**options))
    assert response.status_code == 200
    answer = response.json()
    assert (answer["width"], answer["height"]) == size
    assert list(answer["tasks"]) == ["segmentation", "depth"]
    for task in answer["tasks"].values():
        assert decode(task["image"]).size == size
        assert task["switch_ms"] >= 0
        assert task["forward_ms"] > 0
        assert task["legend"]
    shares = [entry["share"] for entry in answer["tasks"]["segmentation"]["legend"]]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)


def test_a_picture_of_16_bits_is_seen_as_the_same_of_8(client):
    answers = []
    for array in (
        grey := np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64),
        grey.astype(np.uint16) * 257,
    ):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        tasks = client.post("/predict", content=buffer.getvalue()).json()["tasks"]
        answers.append([task["image"] for task in tasks.values()])
    assert answers[0] == answers[1]


def test_results_are_those_of_each_task_loaded_alone(example, args, loaded, client):
    from peft import PeftModel
    from serve_setup import build, read_picture, to_pixels

    pixels = to_pixels(read_picture(picture()), 64)
    bank, _ = loaded
    for name in ("segmentation", "depth"):
        folder = getattr(args, name)
        alone = PeftModel.from_pretrained(build(args.backbone, 64, folder), folder).eval()
        with torch.no_grad():
            assert torch.equal(bank.run(name, pixel_values=pixels).logits, alone(pixels).logits)


def test_requests_at_the_same_time_all_get_the_same_answer(client):
    data = picture()

    def ask(_: int) -> list[str]:
        tasks = client.post("/predict", content=data).json()["tasks"]
        return [task["image"] for task in tasks.values()]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(12)))
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "no picture"),
        (b"hello", 415, "not a picture of a known kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not a picture"),
        (picture()[:200], 415, "damaged"),
        (bytes(LIMIT + 1), 413, "larger than 200,000 bytes"),
        (picture(8000, 8000, "GIF", "1")[:LIMIT], 415, "at most 50,000,000"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(client, data, status, message):
    response = client.post("/predict", content=data)
    assert response.status_code == status
    assert message in response.json()["detail"]


def test_a_large_upload_is_cut_off_also_without_a_stated_length(client):
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10):
            sent += LIMIT // 4
            yield bytes(LIMIT // 4)

    assert client.post("/predict", content=chunks()).status_code == 413


def test_a_busy_backbone_says_come_back(example, loaded, client, monkeypatch):
    bank, _ = loaded
    monkeypatch.setattr(example, "WAIT", 0.05)
    with bank.activate("depth"):
        response = client.post("/predict", content=picture())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert "is using `depth`" in response.json()["detail"]
    assert client.post("/predict", content=picture()).status_code == 200


def test_the_page_needs_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "http:" not in response.text
    assert "https:" not in response.text
    assert "src=" not in response.text.lower().replace(".src =", "")


def test_memory_and_a_scene_can_be_asked_for(client, loaded):
    bank, _ = loaded
    answer = client.get("/tasks").json()
    assert answer["backbone_bytes"] == bank.backbone_bytes
    assert set(answer["tasks"]) == {"segmentation", "depth"}
    assert all(
        task["total"] > task["head"] > task["values"] > 0 for task in answer["tasks"].values()
    )
    scene = Image.open(io.BytesIO(client.get("/scene").content))
    assert scene.size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "somewhere"], "give both --segmentation and --depth"),
        (["--image_size", "50"], "a multiple of 32"),
    ],
)
def test_options_that_cannot_work_are_refused(example, capsys, options, message):
    with pytest.raises(SystemExit):
        example.parse(options)
    assert message in capsys.readouterr().err


def test_swapped_or_missing_adapters_are_named(example, args, tmp_path):
    swapped = ["--segmentation", args.depth, "--depth", args.segmentation]
    with pytest.raises(SFAError, match="classes: the adapter's head has 1 channels, 8 are needed"):
        example.load_bank(example.parse(swapped))
    missing = ["--segmentation", str(tmp_path), "--depth", args.depth]
    with pytest.raises(SFAError, match="cannot be read as an adapter"):
        example.load_bank(example.parse(missing))


def test_other_classes_are_read_from_a_file(example, args, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b"]))
    options = ["--segmentation", args.segmentation, "--depth", args.depth]
    with pytest.raises(SFAError, match="is --classes right"):
        example.load_bank(example.parse([*options, "--classes", str(tmp_path / "classes.json")]))


def test_help_says_what_it_does(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["serve_tasks.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "serve_tasks.py"), run_name="__main__")
    assert "Segmentation and depth from one backbone" in capsys.readouterr().out
