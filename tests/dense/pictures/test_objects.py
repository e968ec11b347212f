# SPDX-License-Identifier: Apache-2.0
"""Sheets of objects: boxes where they are, one colour per object, names and scores, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.pictures.objects import ObjectPicture, object_sheet, paint_masks
from sfa_peft.dense.pictures.sheets import class_palette
from sfa_peft.errors import SFAError

Figure = pytest.importorskip("matplotlib.figure").Figure

NAMES = ("disc", "box")
RGB = np.full((16, 16, 3), 250, np.uint8)
BOXES = np.array([[2.0, 3.0, 9.0, 8.0], [1.0, 1.0, 5.0, 15.0]], np.float32)


def masks() -> np.ndarray:
    both = np.zeros((2, 16, 16), bool)
    both[0, 2:8, 2:8] = True
    both[1, 5:12, 5:12] = True
    return both


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects figures as they are written."""
    figures: list[Any] = []
    savefig = Figure.savefig

    def keep(self: Any, *args: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_crowds_are_dashed_or_a_rim_and_say_so(tmp_path: Path, drawn: list[Any]) -> None:
    crowds = np.array([True, False])
    boxes = ObjectPicture(RGB, np.array([1, 0]), boxes=BOXES, crowds=crowds)
    object_sheet([[boxes]], ("boxes",), tmp_path / "a.png", class_names=NAMES)
    (axis,) = drawn[0].axes
    assert [patch.get_linestyle() for patch in axis.patches] == ["--", "-"]
    assert [text.get_text() for text in axis.texts] == ["box (crowd)", "disc"]

    picture = ObjectPicture(RGB, np.array([1, 0]), masks=masks(), crowds=crowds)
    painted = paint_masks(picture, [np.zeros(3), np.zeros(3)])
    assert (painted[3, 3] == RGB[3, 3]).all()  # inside the crowd
    assert (painted[2, 2] == 0).all()  # its rim
    assert (painted[9, 9] != RGB[9, 9]).all()


def test_boxes_names_and_scores_are_where_they_belong(tmp_path: Path, drawn: list[Any]) -> None:
    truth = ObjectPicture(RGB, np.array([1, 0]), boxes=BOXES)
    guess = ObjectPicture(RGB, np.array([1, 0]), boxes=BOXES, scores=np.array([0.91, 0.5]))

    path = object_sheet(
        [[RGB, truth, guess]], ("input", "truth", "SFA"), tmp_path / "a.png", class_names=NAMES
    )

    image, true, predicted = drawn[0].axes
    assert not image.patches
    assert [t.get_text() for t in true.texts] == ["box", "disc"]
    assert [t.get_text() for t in predicted.texts] == ["disc 0.50", "box 0.91"]  # surest on top
    # Pixel 2 spans 1.5 to 2.5 on matplotlib's axes: its left edge, a box's 2, lies at 1.5.
    assert true.patches[0].get_bbox().extents.tolist() == [1.5, 2.5, 8.5, 7.5]
    # The second box begins at the image's top: its name is written inside.
    assert [t.get_verticalalignment() for t in true.texts] == ["bottom", "top"]
    *boxes, frame = true.patches  # the truth is framed, what models found is not
    assert frame.get_bbox().extents.tolist() == [0, 0, 1, 1]
    assert len(predicted.patches) == len(boxes)
    colours = [tuple(p.get_edgecolor()[:3]) for p in boxes]
    assert colours == [tuple(class_palette(255)[2 + c] / 255) for c in (1, 0)]
    with Image.open(path) as written:
        assert written.width > written.height
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_masks_have_a_colour_each_and_change_nothing_outside() -> None:
    picture = ObjectPicture(RGB, np.array([0, 0]), masks=masks())

    painted = paint_masks(picture, [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])

    outside = ~masks().any(0)
    np.testing.assert_array_equal(painted[outside], RGB[outside])
    red, blue = painted[4, 4].astype(int), painted[9, 9].astype(int)
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert painted[6, 6, 2] > painted[6, 6, 0]  # the later object is on top
    assert painted[2, 4, 0] < painted[4, 4, 0]  # the rim is darker
    assert (RGB == 250).all()


def test_a_sheet_of_masks_names_every_object_with_a_pixel(tmp_path: Path, drawn: list[Any]) -> None:
    three = np.concatenate([masks(), np.zeros((1, 16, 16), bool)])
    picture = ObjectPicture(RGB, np.array([0, 0, 1]), masks=three, scores=np.array([0.3, 0.2, 0.1]))
    nothing = ObjectPicture(RGB, np.zeros(0, int), masks=np.zeros((0, 16, 16), bool))

    object_sheet([[picture, nothing]], ("truth", "SFA"), tmp_path / "a.png", class_names=NAMES)

    full, empty = drawn[0].axes
    assert [t.get_text() for t in full.texts] == ["disc 0.20", "disc 0.30"]
    assert not empty.texts
    shown = full.images[0].get_array()
    assert len({tuple(shown[4, 4]), tuple(shown[9, 9])}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": RGB[..., 0]}, "expected uint8 .H, W, 3."),
        ({"image": RGB / 255}, "expected uint8 .H, W, 3., got float64"),
        ({"boxes": None}, "objects need boxes or masks"),
        ({"boxes": BOXES[:1]}, "boxes of 2 objects: expected .2, 4., got .1, 4."),
        ({"masks": masks()[:, :8]}, "masks of 2 objects: expected .2, 16, 16."),
        ({"scores": np.ones(3)}, "scores of 2 objects: expected .2,., got .3,."),
    ],
)
def test_objects_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"image": RGB, "classes": np.array([0, 1]), "boxes": BOXES} | options

    with pytest.raises(SFAError, match=message):
        ObjectPicture(**given)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    unnamed = ObjectPicture(RGB, np.array([0, 2]), boxes=BOXES)

    with pytest.raises(SFAError, match="class ids 0 to 2, but 2 class names"):
        object_sheet([[unnamed]], ("truth",), path, class_names=NAMES)
    with pytest.raises(SFAError, match="each row needs 2 pictures"):
        object_sheet([[RGB]], ("input", "truth"), path, class_names=NAMES)
    with pytest.raises(SFAError, match="or an ObjectPicture, got ndarray"):
        object_sheet([[RGB[..., 0]]], ("input",), path, class_names=NAMES)
    assert not path.exists()
