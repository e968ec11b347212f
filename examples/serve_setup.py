# SPDX-License-Identifier: Apache-2.0
"""Models of `serve_tasks.py`, adapters trained in a minute, and pictures in and out."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from semantic_segmentation import Arguments, build_model
from torch.nn.functional import cross_entropy

import sfa_peft
from sfa_peft import SFAError
from sfa_peft.dense import Preprocessing, SceneDataset, TaskSpec, as_image, class_palette

SCENES, STEPS, BATCH = 256, 100, 8
MAX_PIXELS = 25_000_000  # to decode; of a JPEG, which can be decoded smaller, twice as many
MAX_SIDE = 20_000
# Two pictures at a time, each of which may take 130 MB for a moment; and always on the same two
# threads, since C libraries keep freed memory for the thread that had it.
DECODERS = ThreadPoolExecutor(2, "decoder")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Five colours of the viridis map, from near (bright) to far.
VIRIDIS = np.array([[253, 231, 37], [94, 201, 98], [33, 145, 140], [59, 82, 139], [68, 1, 84]])


class BadPictureError(ValueError):
    """The upload cannot be used as a picture."""


# --- models ------------------------------------------------------------------------------------


def build(backbone: str, image_size: int, folder: str | Path):
    """Return the plain UperNet that an adapter was trained on, its head sized as in the file."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            keys = [k for k in file.keys() if k.endswith("decode_head.classifier.weight")]  # noqa: SIM118
            shape = file.get_slice(keys[0]).get_shape() if keys else None
    except (OSError, SafetensorError) as error:
        raise SFAError(f"{path}: cannot be read as an adapter ({error})") from error
    if shape is None:
        raise SFAError(f"{path}: holds no UperNet head (modules_to_save=['decode_head'])")
    return build_model(_options(backbone, image_size, hidden_size=shape[1]), shape[0])


def _options(backbone: str, image_size: int, **more: int) -> Arguments:
    return Arguments(backbone=backbone, image_size=[image_size] * 2, **more)


def depth_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean distance of log depths, where there is a depth (not in the sky)."""
    known = batch["depth"] > 0
    return (logits[:, 0][known] - batch["depth"][known].log()).abs().mean()


def segmentation_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the cross entropy of classes."""
    return cross_entropy(logits, batch["labels"])


def train_both(
    out: Path, backbone: str, image_size: int, names: list[str], *, steps: int = STEPS
) -> tuple[Path, Path]:
    """Train a segmentation and a depth adapter on rendered scenes; return their folders.

    That of segmentation says what `sfa-peft predict` needs. This depth, a UperNet's logarithm of
    metres, is no task of the library's own, so that only the server can show it.
    """
    data = SceneDataset(SCENES, size=image_size, seed=0, with_depth=True)
    items = [data[i] for i in range(SCENES)]
    scenes = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    folders = (out / "segmentation", out / "depth")
    jobs = ((len(names), segmentation_loss), (1, depth_loss))
    for folder, (channels, loss) in zip(folders, jobs, strict=True):
        model = build_model(_options(backbone, image_size), channels)
        spec = describe(model, backbone, image_size, names) if loss is segmentation_loss else None
        train(model, scenes, loss, folder, steps)
        if spec is not None:
            spec.write(folder)
    return folders


def describe(model, backbone: str, image_size: int, names: list[str]) -> TaskSpec:
    """Return what a prediction needs to know of the segmentation model."""
    return TaskSpec.describe(
        model,
        task="semantic_segmentation",
        backbone="backbone",
        source=backbone,
        preprocessing=Preprocessing("cover", (image_size, image_size), size_divisor=32),
        class_names=names,
    )


def train(model, scenes, loss: Callable, folder: Path, steps: int) -> None:
    """Train a head and an SFA adapter and save both."""
    start = time.perf_counter()
    config = sfa_peft.SFAConfig(budget=0.1, modules_to_save=["decode_head"])  # SFA
    model = get_peft_model(model, config)
    selector = sfa_peft.SFASelector(model, total_steps=steps)  # SFA
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if "decode_head" in n], "lr": 6e-3},
        {"params": [p for n, p in trained.items() if "decode_head" not in n], "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        index = torch.randint(SCENES, (BATCH,), generator=generator)
        batch = {key: value[index] for key, value in scenes.items()}
        value = loss(model(pixel_values=batch["pixel_values"]).logits, batch)
        value.backward()
        optimizer.step()
        selector.step(optimizer)  # SFA
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"{folder.name}: step {step + 1} of {steps}, loss {value.item():.3f}")
    model.save_pretrained(folder)
    print(f"{folder.name}: saved in {folder} after {time.perf_counter() - start:.0f} s")


# --- pictures ----------------------------------------------------------------------------------


def read_picture(data: bytes, most: int) -> Image.Image:
    """Return an uploaded picture, upright, in RGB, made smaller where a side is above `most`.

    Raises:
        BadPictureError: If it is none, is damaged, or has too many pixels.
    """
    try:
        # Only formats that browsers show: the fewer decoders a stranger can reach, the better.
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        size = picture.size
        picture.draft("RGB", (2 * most, 2 * most))  # decodes a JPEG smaller, if it is one
        decoded = picture.width * picture.height
        if decoded > MAX_PIXELS or math.prod(size) > 2 * MAX_PIXELS or max(size) > MAX_SIDE:
            raise BadPictureError(
                f"{size[0]} x {size[1]} pixels; at most {MAX_PIXELS:,} are taken, and {MAX_SIDE:,} "
                "a side"
            )
        return DECODERS.submit(_small, picture, most).result()
    except BadPictureError:
        raise
    except UnidentifiedImageError as error:
        raise BadPictureError(f"not a picture of a known kind ({', '.join(FORMATS)})") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"the picture is damaged ({error})") from error


def _small(picture: Image.Image, most: int) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits, of which Pillow would take the lower ones
        picture = as_image(picture)
    elif picture.mode in ("1", "P"):  # cannot be averaged
        picture = picture.convert("RGB")
    picture.thumbnail((most, most), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return ImageOps.exif_transpose(picture).convert("RGB")


def to_pixels(picture: Image.Image, image_size: int) -> torch.Tensor:
    """Return a picture for the models, (1, 3, H, W): the shorter side scaled to `image_size`."""
    scale = image_size / min(picture.size)
    # Whole patches of the last stage, and squeezed where one side is over three times the other.
    width, height = (
        min(max(32, 32 * round(side * scale / 32)), 3 * image_size) for side in picture.size
    )
    array = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((array - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]


def paint_classes(logits: torch.Tensor, names: list[str]) -> tuple[Image.Image, list[dict]]:
    """Return the class map as a picture, and its legend: classes that occur, largest first."""
    classes = logits[0].argmax(0).numpy()
    palette = class_palette(len(names))
    counts = np.bincount(classes.ravel(), minlength=len(names))
    legend = [
        {
            "name": names[i],
            "colour": "#{:02x}{:02x}{:02x}".format(*palette[i]),
            "share": float(counts[i] / classes.size),
        }
        for i in np.argsort(-counts, kind="stable")
        if counts[i]
    ]
    return Image.fromarray(palette[classes]), legend


def paint_depth(logits: torch.Tensor) -> tuple[Image.Image, list[dict]]:
    """Return the depth map as a picture, bright is near, and its legend in metres."""
    depth = logits[0, 0].exp().numpy()
    near, far = float(depth.min()), float(depth.max())
    position = (np.log(depth) - np.log(near)) / max(np.log(far) - np.log(near), 1e-6)
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(position, stops, VIRIDIS[:, c]) for c in range(3)]
    legend = [
        {"name": f"{near * (far / near) ** s:.1f} m", "colour": "#{:02x}{:02x}{:02x}".format(*c)}
        for s, c in zip(stops, VIRIDIS, strict=True)
    ]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)), legend
