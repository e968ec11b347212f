# SPDX-License-Identifier: Apache-2.0
"""Pictures: files appear whole, palettes, and errors."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.pictures.sheets import class_palette, contact_sheet, curve_plot
from sfa_peft.errors import SFAError

pytest.importorskip("matplotlib")

NAMES = ("sky", "road", "car")


def _row(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (16, 16))
    truth[0, 0] = 255
    return [rng.integers(0, 256, (16, 16, 3), np.uint8), truth, truth.astype(np.uint8)]


def test_a_contact_sheet_shows_the_class_colours(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.png"
    rows = [[np.zeros((4, 4, 3), np.uint8), np.full((4, 4), c)] for c in range(3)]

    written = contact_sheet(rows, ("input", "truth"), path, class_names=NAMES)

    assert written == path
    colours = {tuple(c) for c in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}
    assert {tuple(c) for c in class_palette(3)[:3]} <= colours
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_a_sheet_of_several_methods_with_ignored_pixels_is_drawn(tmp_path: Path) -> None:
    path = contact_sheet(
        [_row(0), _row(1)], ("input", "truth", "SFA"), tmp_path / "a.png", class_names=NAMES
    )

    with Image.open(path) as image:
        assert image.width > image.height


def test_curves_with_gaps_are_drawn(tmp_path: Path) -> None:
    curves = {"SFA": ([1, 2, 3], [0.1, math.nan, 0.3]), "LoRA": ([1, 3], [0.2, 0.2])}

    path = curve_plot(curves, tmp_path / "c.pdf", xlabel="step", ylabel="mIoU", title="Scenes")

    assert path.read_bytes().startswith(b"%PDF")


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    path = tmp_path / "c.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)

    with pytest.raises(OSError, match="disk full"):
        curve_plot({"a": ([1], [1])}, path, xlabel="x", ylabel="y")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules

    curve_plot({"a": ([1], [1])}, tmp_path / "c.png", xlabel="x", ylabel="y")

    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("num_classes", [1, 8, 12, 150, 255])
def test_a_palette_tells_the_classes_apart_and_leaves_the_rest_white(num_classes: int) -> None:
    palette = class_palette(num_classes)

    assert palette.shape == (256, 3)
    assert len(np.unique(palette[: num_classes + 1], axis=0)) == num_classes + 1
    assert (palette[num_classes:] == 255).all()
    np.testing.assert_array_equal(palette, class_palette(num_classes))


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(SFAError, match="needs 2 pictures"):
        contact_sheet([_row(0)], ("input", "truth"), path, class_names=NAMES)
    with pytest.raises(SFAError, match="a picture is"):
        contact_sheet([[np.zeros((4, 4))]], ("input",), path, class_names=NAMES)
    with pytest.raises(SFAError, match="no curves"):
        curve_plot({}, path, xlabel="x", ylabel="y")
    with pytest.raises(SFAError, match="2 x values and 1 y"):
        curve_plot({"a": ([1, 2], [1])}, path, xlabel="x", ylabel="y")
    with pytest.raises(SFAError, match="1 to 255"):
        class_palette(256)
