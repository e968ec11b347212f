# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_peft.dense import Objects, Preprocessing, TaskSpec, decode_mask, write_predictions
from sfa_peft.dense.data.coco import CocoSplit
from sfa_peft.dense.prediction import output
from sfa_peft.dense.prediction.spec import Pretrained, attach_spec
from sfa_peft.errors import SFAError

NAMES = ("sky", "road")
IDS = np.array([[0, 1, 1], [1, 1, 1]])
METRES = np.array([[0.0, 1.2345, 2.0], [10.0, 20.5, 30.0]], np.float32)
OBJECTS = {
    "scores": np.array([0.9, 0.6]),
    "labels": np.array([1, 0]),
    "boxes": np.array([[1.0, -0.5, 3.0, 2.0], [0.0, 0.0, 1.0, 1.0]]),
}


def write(monkeypatch, tmp_path, task, result, **options):
    """Write what a model is made to answer for each of two pictures."""
    spec = TaskSpec(task, "none", {}, Pretrained("a", "b", "c"), Preprocessing("keep"), NAMES)
    model = torch.nn.Linear(1, 1).eval()
    attach_spec(model, spec)
    monkeypatch.setattr(output, "predict", lambda model, images, **_: [result for _ in images])
    files = []
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (3, 2), (9, 99, 199)).save(tmp_path / name)
        files.append(tmp_path / name)
    return write_predictions(model, files, tmp_path / "out", **options)


def stored(path):
    return np.asarray(Image.open(path))


def test_class_ids_are_written_as_they_are(monkeypatch, tmp_path):
    content = write(monkeypatch, tmp_path, "semantic_segmentation", IDS)
    out = tmp_path / "out"
    assert json.loads((out / "predictions.json").read_text()) == content
    assert stored(out / "a.png").dtype == np.uint8
    assert np.array_equal(stored(out / "b.png"), IDS)
    assert [image["classes"] for image in content["images"]] == ["a.png", "b.png"]
    assert content["images"][0]["shares"] == {
        "sky": pytest.approx(1 / 6),
        "road": pytest.approx(5 / 6),
    }
    assert stored(out / "a_overlay.png").shape == (2, 3, 3)


@pytest.mark.parametrize(("metres", "scale"), [(METRES, 1000), (4 * METRES, 256)])
def test_depth_is_written_with_the_finest_scale_that_fits(metres, scale, monkeypatch, tmp_path):
    content = write(monkeypatch, tmp_path, "depth_estimation", metres)
    assert content["images"][1]["depth_scale"] == scale
    found = stored(tmp_path / "out" / "b.png")
    assert found.dtype == np.uint16
    np.testing.assert_allclose(found / scale, metres, atol=0.51 / scale)
    assert found[0, 0] == 0


def test_boxes_are_a_data_set_that_is_read_again(monkeypatch, tmp_path):
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    content = write(monkeypatch, tmp_path, "object_detection", OBJECTS)
    assert [a["score"] for a in content["annotations"]] == [0.9, 0.6, 0.9, 0.6]
    split = CocoSplit(tmp_path / "out" / "predictions.json", tmp_path, with_masks=False)
    image, objects = split[1]
    assert image.size == (3, 2)
    assert isinstance(objects, Objects)
    assert objects.boxes.tolist() == [[1, 0, 3, 2], [0, 0, 1, 1]]  # within the picture
    assert [split.class_names[i] for i in objects.classes] == ["road", "sky"]


def test_masks_are_written_as_run_lengths(monkeypatch, tmp_path):
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    masks = np.array([IDS == 1, IDS == 0])
    content = write(monkeypatch, tmp_path, "instance_segmentation", OBJECTS | {"masks": masks})
    entries = content["annotations"][:2]
    for entry, mask in zip(entries, masks, strict=True):
        assert np.array_equal(decode_mask(entry["segmentation"], 2, 3), mask)
        assert entry["area"] == mask.sum()
    json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_pictures_to_look_at_can_be_left_out(monkeypatch, tmp_path):
    done = []
    write(monkeypatch, tmp_path, "semantic_segmentation", IDS, overlays=False, tell=done.append)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.png", "b.png", "predictions.json"]
    assert done == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]


def test_two_pictures_of_one_name_are_refused_before_anything_is_written(tmp_path):
    model = torch.nn.Linear(1, 1).eval()
    spec = TaskSpec("depth_estimation", "n", {}, Pretrained("a", "b", "c"), Preprocessing("keep"))
    attach_spec(model, spec)
    with pytest.raises(SFAError, match=r"x/a\.png, y/a\.jpg: results are named"):
        write_predictions(model, ["x/a.png", "b.png", "y/a.jpg"], tmp_path / "out")
    with pytest.raises(SFAError, match="no pictures"):
        write_predictions(model, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
