# SPDX-License-Identifier: Apache-2.0
"""The served tasks as a browser or curl sees them, with adapters that were trained for 4 steps."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib
import io
import json
import re
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

from sfa_peft.dense import CLASS_NAMES, predict
from sfa_peft.errors import SFAError
from tests.processes import run_code

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 200_000
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """Import the script as Python does that runs it: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        for name in ("semantic_segmentation", "serve_setup", "serve_web", "serve_tasks"):
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("serve_tasks")


@pytest.fixture(scope="module")
def args(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve_setup.SCENES", 8)
        found = example.parse(["--output_dir", str(out)])
        folders = example.train_both(out, found.backbone, 64, list(CLASS_NAMES), steps=4)
    found.segmentation, found.depth = map(str, folders)
    return found


@pytest.fixture(scope="module")
def loaded(example: ModuleType, args: Any) -> Any:
    return example.load_bank(args)


@pytest.fixture(scope="module")
def client(example: ModuleType, loaded: Any) -> TestClient:
    bank, names = loaded
    app = example.make_app(bank, names, image_size=64, max_bytes=LIMIT)
    return TestClient(app, base_url=HERE)


def test_what_it_trained_predicts_without_it(args: Any) -> None:
    (classes,) = predict(args.segmentation, [Image.new("RGB", (70, 50), "teal")])
    assert classes.shape == (50, 70)
    assert classes.max() < len(CLASS_NAMES)


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

    pixels = to_pixels(read_picture(picture(), 1024), 64)
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
        (picture(8000, 8000, "GIF", "1")[:LIMIT], 415, "at most 25,000,000"),
        (picture(20_008, 8), 415, "20,000 a side"),
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


# --- strangers ---------------------------------------------------------------------------------


def call(app: Any, messages: list[dict]) -> list[dict]:
    """Run an app on what a server would tell it; return what it says."""
    said: list[dict] = []
    waiting = iter(messages)

    async def receive() -> dict:
        message = dict(next(waiting))
        await asyncio.sleep(message.pop("after", 0))
        return message

    async def send(message: dict) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1"}
    asyncio.run(app(scope, receive, send))
    return said


def test_an_upload_that_is_given_up_ends_without_an_error(client):
    part = {"type": "http.request", "body": b"\x89PNG", "more_body": True}
    said = call(client.app, [part, {"type": "http.disconnect"}])
    assert said[0]["status"] == 499


def test_an_upload_that_takes_too_long_is_given_up(client, monkeypatch):
    monkeypatch.setattr("serve_web.UPLOAD_SECONDS", 0.05)
    part = {"type": "http.request", "body": b"\x89PNG", "more_body": True}
    said = call(client.app, [part, {**part, "after": 30}])
    assert said[0]["status"] == 408


def test_a_form_with_a_file_is_as_good_as_the_bytes(client):
    data = picture(kind="JPEG")
    expected = client.post("/predict", content=data).json()["tasks"]
    field = ("title", (None, "a form field before the file"))
    for name in ("a.jpg", "b \xe9.jpg"):
        answer = client.post("/predict", files=[field, ("picture", (name, data))]).json()
        for task, found in answer["tasks"].items():
            assert found["image"] == expected[task]["image"]
    response = client.post("/predict", files=[field])
    assert response.status_code == 400
    assert "a form with a file" in response.json()["detail"]
    assert client.post("/predict", files={"picture": ("a.txt", b"hello")}).status_code == 415


@pytest.mark.parametrize("path", ["/", "/tasks", "/nowhere", "/predict"])
def test_every_answer_says_what_a_page_may_do(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_the_policy_allows_the_scripts_and_styles_of_the_page_and_no_others(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    inline = re.findall(r"<(script|style)[^>]*>(.*?)</\1>", response.text, re.DOTALL)
    assert len(inline) == 2
    for _, text in inline:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == 2
    assert not re.search(r"\son\w+=|\sstyle=", response.text)  # attributes, which no hash allows


def test_a_name_that_is_not_the_servers_is_refused(example, loaded, client):
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        response = client.get("/tasks", headers={"host": host})
        assert response.status_code == 400
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/tasks", headers={"host": "localhost:8000"}).status_code == 200
    own = example.make_app(*loaded, image_size=64, max_bytes=LIMIT, hosts=["depth.example"])
    assert TestClient(own, base_url="http://depth.example").get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_the_server_does_not_describe_itself(client, path):
    assert client.get(path).status_code == 404


def test_health_is_answered_while_the_backbone_is_in_use(client, loaded):
    with loaded[0].activate("depth"):
        response = client.get("/health")
    assert response.json() == {"status": "ok", "tasks": ["segmentation", "depth"]}


def test_uvicorn_gets_limits_and_the_names(example, loaded, monkeypatch):
    ran = {}
    monkeypatch.setattr(example, "load_bank", lambda _args: loaded)
    monkeypatch.setattr(example.uvicorn, "run", lambda app, **options: ran.update(options, app=app))
    monkeypatch.setattr(sys, "argv", ["serve_tasks.py", "--names", "depth.example"])
    example.main()
    app = ran.pop("app")
    assert TestClient(app, base_url="http://depth.example").get("/health").status_code == 200
    config = example.uvicorn.Config(app, **ran)  # which takes them all
    assert config.limit_concurrency == 32
    assert config.timeout_keep_alive == 5
    assert not config.server_header


def test_sixteen_bits_are_scaled_and_not_cut_off(example):
    from serve_setup import read_picture

    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    found = np.asarray(read_picture(buffer.getvalue(), 1024))[..., 0]
    assert np.abs(found.astype(int) - ramp // 257).max() <= 1


def test_a_picture_is_upright_and_made_smaller_on_the_way_in(example):
    from serve_setup import read_picture

    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    Image.new("RGB", (4000, 3000), (10, 200, 30)).save(buffer, "JPEG", exif=exif)
    found = read_picture(buffer.getvalue(), 1000)
    assert found.size == (750, 1000)
    assert np.abs(np.asarray(found).reshape(-1, 3).mean(0) - [10, 200, 30]).max() < 3


UPLOADS = """
import io, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, "examples")
from PIL import Image
from serve_setup import read_picture, to_pixels

def save(size, kind):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind)
    return buffer.getvalue()

def answer(data):
    return tuple(to_pixels(read_picture(data, 1024), 64).shape)

pictures = [save((5000, 4990), "PNG")] * 6 + [save((20_000, 1), "PNG")]
answer(save((64, 64), "PNG"))

def status(name):  # of this program's memory; getrusage counts that of the one that started it too
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

before = status("VmRSS")
with ThreadPoolExecutor(7) as pool:
    shapes = list(pool.map(answer, pictures))
assert shapes == [(1, 3, 64, 64)] * 6 + [(1, 3, 64, 192)], shapes
print((status("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_large_uploads_at_once_take_little_memory():
    done = run_code(UPLOADS, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 350  # MB; each picture alone has 100 MB
