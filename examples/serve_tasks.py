# SPDX-License-Identifier: Apache-2.0
"""Segmentation and depth from one backbone in memory, behind a small web server with a page.

Runs with no argument: trains two tiny adapters on rendered scenes first, under a minute on two
cores, and serves them on http://127.0.0.1:8000 ::

    pip install '.[serve]'
    python examples/serve_tasks.py

Adapters you have, of UperNet models on one SwinV2 (depth: one channel, the logarithm of metres)::

    python examples/serve_tasks.py --segmentation out/demo/sfa_20 --depth out/serve/depth

The page shows an uploaded picture with both results, and how long the switch of tasks and each
forward took. The same without the page::

    curl --data-binary @picture.jpg http://127.0.0.1:8000/predict
    curl -F picture=@picture.jpg http://127.0.0.1:8000/predict
"""

import argparse
import base64
import io
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve small machines
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import uvicorn
from common.arguments import DEFAULT_BACKBONE
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from PIL import Image
from serve_setup import (
    BadPictureError,
    build,
    paint_classes,
    paint_depth,
    read_picture,
    to_pixels,
    train_both,
)
from serve_web import LIMITS, make_guarded_app, read_upload
from starlette.requests import ClientDisconnect

from sfa_peft import SFAError
from sfa_peft.dense import CLASS_NAMES, render_scene
from sfa_peft.tasks import TaskBank

WAIT = 30.0  # seconds that a request may wait for others before it is told to come back
HERE = ("127.0.0.1", "localhost")  # names of this machine for itself


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segmentation", metavar="DIR", help="Adapter folder of the classes.")
    parser.add_argument("--depth", metavar="DIR", help="Adapter folder of the depth.")
    parser.add_argument(
        "--backbone",
        default=str(DEFAULT_BACKBONE),
        help="SwinV2 checkpoint that both were trained on: a folder or a Hub name.",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        default=64,
        help="Size of the crops that both were trained on; pictures are scaled to it.",
    )
    parser.add_argument(
        "--classes", help="json file with a list of class names, if not the rendered scenes'."
    )
    parser.add_argument("--output_dir", default="out/serve", help="Where adapters are trained to.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on, 0 for any.")
    parser.add_argument(
        "--names",
        nargs="*",
        default=[],
        help="Host names that the server is reached by, if others.",
    )
    parser.add_argument("--max_upload_mb", type=float, default=10.0, help="Largest picture, in MB.")
    args = parser.parse_args(argv)
    if (args.segmentation is None) != (args.depth is None):
        parser.error("give both --segmentation and --depth, or neither to train them")
    if args.image_size < 32 or args.image_size % 32:
        parser.error("--image_size: a multiple of 32 is needed")
    return args


def load_bank(args: argparse.Namespace) -> tuple[TaskBank, list[str]]:
    """Return a bank with both tasks, and the class names."""
    names = json.loads(Path(args.classes).read_text()) if args.classes else list(CLASS_NAMES)
    folders = (args.segmentation, args.depth)
    if args.segmentation is None:
        folders = train_both(Path(args.output_dir), args.backbone, args.image_size, names)
    segmentation, depth = (build(args.backbone, args.image_size, f) for f in folders)
    for what, model, channels in (("classes", segmentation, len(names)), ("depth", depth, 1)):
        if model.config.num_labels != channels:
            raise SFAError(
                f"{what}: the adapter's head has {model.config.num_labels} channels, {channels} "
                "are needed; is --classes right?"
            )
    bank = TaskBank(segmentation)  # SFA: one backbone in memory ...
    bank.add("segmentation", folders[0], segmentation)  # SFA: ... for two tasks
    bank.add("depth", folders[1], depth)
    for name in bank:
        bank.activate(name)  # the first time takes longest: not while somebody waits
    return bank, names


def predict(bank: TaskBank, names: list[str], data: bytes, image_size: int) -> dict:
    """Return pictures, legends and times of both tasks for an uploaded picture."""
    pixels = to_pixels(read_picture(data, 16 * image_size), image_size)
    results = {}
    # The task that is active goes first, which saves a switch.
    for name in sorted(bank.list(), key=lambda name: name != bank.active):
        start = time.perf_counter()
        with bank.activate(name, wait=WAIT) as task:  # SFA
            switched = time.perf_counter()
            logits = task(pixel_values=pixels).logits
            done = time.perf_counter()
        painted, legend = paint_depth(logits) if name == "depth" else paint_classes(logits, names)
        results[name] = {
            "image": to_data_url(painted),
            "legend": legend,
            "switch_ms": 1e3 * (switched - start),
            "forward_ms": 1e3 * (done - switched),
        }
    height, width = pixels.shape[-2:]
    return {"width": width, "height": height, "tasks": {n: results[n] for n in bank.list()}}


def to_data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def make_app(
    bank: TaskBank,
    names: list[str],
    *,
    image_size: int,
    max_bytes: int,
    hosts: Sequence[str] = HERE,
) -> FastAPI:
    page = (Path(__file__).parent / "serve_tasks.html").read_text(encoding="utf-8")
    app = make_guarded_app("Several tasks on one backbone", page, hosts)

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "tasks": bank.list()}

    @app.get("/tasks")
    def tasks() -> dict:
        memory = {n: {**vars(m), "total": m.total} for n, m in bank.memory().items()}
        return {"backbone_bytes": bank.backbone_bytes, "max_bytes": max_bytes, "tasks": memory}

    @app.get("/scene")
    def scene() -> Response:
        picture = Image.fromarray(render_scene(secrets.randbelow(2**31), image_size).image)
        return Response(to_png(picture), media_type="image/png")

    @app.post("/predict", response_model=None)
    async def upload(request: Request) -> dict | Response:
        try:
            data = await read_upload(request, max_bytes)
            return await run_in_threadpool(predict, bank, names, data, image_size)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; without it a traceback is printed
        except BadPictureError as error:
            raise HTTPException(415, str(error)) from error
        except SFAError as error:  # others keep the backbone busy
            raise HTTPException(503, str(error), {"Retry-After": "5"}) from error

    return app


def main() -> None:
    args = parse()
    bank, names = load_bank(args)
    total = sum(memory.total for memory in bank.memory().values())
    print(f"backbone {bank.backbone_bytes:,} bytes, both tasks {total:,} bytes")
    max_bytes, hosts = int(1e6 * args.max_upload_mb), [*HERE, args.host, *args.names]
    app = make_app(bank, names, image_size=args.image_size, max_bytes=max_bytes, hosts=hosts)
    uvicorn.run(app, host=args.host, port=args.port, **LIMITS)


if __name__ == "__main__":
    try:
        main()
    except SFAError as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from error
