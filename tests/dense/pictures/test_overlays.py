# SPDX-License-Identifier: Apache-2.0
import numpy as np
from PIL import Image

from sfa_peft.dense import class_palette
from sfa_peft.dense.pictures.depth import INVALID_COLOUR
from sfa_peft.dense.pictures.overlays import class_overlay, depth_picture, object_overlay

BLACK = Image.new("RGB", (40, 30))


def test_a_class_map_is_half_its_colour_and_half_the_picture():
    ids = np.arange(1200).reshape(30, 40) % 3
    found = np.asarray(class_overlay(BLACK, ids, 3)).astype(int)
    assert np.abs(found - class_palette(3)[ids] / 2).max() <= 1


def test_pixels_without_depth_are_grey_and_others_are_not():
    metres = np.linspace(0, 9, 1200, dtype=np.float32).reshape(30, 40)
    found = np.asarray(depth_picture(metres))
    grey = np.round(255 * np.array(INVALID_COLOUR)).astype(np.uint8)
    assert (found == grey).all(-1).sum() == 1
    assert depth_picture(np.zeros((4, 4), np.float32)).size == (4, 4)


def objects(**more):
    boxes = np.array([[5.0, 20.0, 150.0, 90.0]])
    return {"labels": np.array([1]), "scores": np.array([0.75]), "boxes": boxes, **more}


def test_a_box_is_drawn_in_the_colour_of_its_class():
    image = Image.new("RGB", (400, 300))
    found = np.asarray(object_overlay(image, objects(), ["car", "cat"]))
    colour = class_palette(255)[3]
    assert (found[90, 10:150] == colour).all()
    assert (found[60:85, 20:140] == 0).all()  # inside
    assert (np.asarray(image) == 0).all()  # the picture itself stays


def test_a_mask_is_painted_where_it_is():
    mask = np.zeros((1, 300, 400), bool)
    mask[0, 70:80, 100:120] = True
    image = Image.new("RGB", (400, 300))
    found = np.asarray(object_overlay(image, objects(masks=mask), ["car", "cat"]))
    assert np.array_equal(found[50:].max(-1) > 0, mask[0, 50:])


def test_a_small_picture_is_enlarged_with_its_objects():
    mask = np.zeros((1, 64, 100), bool)
    mask[0, 40:50, 60:70] = True
    near = {"labels": np.array([0]), "scores": np.array([0.5]), "boxes": np.array([[1.0, 1, 9, 9]])}
    found = np.asarray(object_overlay(Image.new("RGB", (100, 64)), near | {"masks": mask}, ["car"]))
    assert found.shape == (256, 400, 3)
    large = mask[0].repeat(4, 0).repeat(4, 1)
    assert np.array_equal(found[100:].max(-1) > 0, large[100:])
