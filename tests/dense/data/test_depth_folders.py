# SPDX-License-Identifier: Apache-2.0
"""NYUv2 and KITTI, from small files in their own layouts."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.data.load import load_dense
from sfa_peft.dense.metrics.depth import DepthMetrics
from sfa_peft.errors import SFAError, SFAWarning


def _pair(image: Path, depth: Path, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 65536, (6, 8)).astype(np.uint16)
    stored[0] = 0
    for path in (image, depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(image)
    Image.fromarray(stored).save(depth)
    return stored


@pytest.fixture
def nyu(tmp_path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    stored: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for split, root, begin in (("train", "sync", "/"), ("test", "official_splits/test", "")):
        lines = []
        for n in range(3):
            image, depth = f"kitchen/rgb_{n:05d}.jpg", f"kitchen/sync_depth_{n:05d}.png"
            root_dir = tmp_path / root
            stored[split].append(_pair(root_dir / image, root_dir / depth, n + len(split)))
            lines.append(f"{begin}{image} {begin}{depth} 518.8579")
        name = f"nyudepthv2_{split}_files_with_gt.txt"
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path, stored


@pytest.fixture
def kitti(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    drive, stored, lines = "2011_09_26_drive_0057_sync", [], []
    for n in range(3):
        image = f"2011_09_26/{drive}/image_02/data/{n:010d}.png"
        depth = f"{drive}/proj_depth/groundtruth/image_02/{n:010d}.png"
        where = tmp_path / "data_depth_annotated" / ("val" if n == 2 else "train") / depth
        stored.append(_pair(tmp_path / "raw" / image, where, n))
        lines.append(f"{image} {depth} 721.5377")
    (tmp_path / "eigen_train_files_with_gt.txt").write_text("\n".join(lines))
    lines[1] = lines[1].split()[0] + " None 721.5377"
    (tmp_path / "eigen_test_files_with_gt.txt").write_text("\n".join(lines))
    return tmp_path, stored


def test_nyu_by_lists_is_millimetres_by_split(nyu) -> None:
    folder, stored = nyu

    data = load_dense("depth", folder, dataset_format="nyuv2")

    assert data.validation is None
    assert data.class_names == ()
    for split in ("train", "test"):
        pairs = data.pick(split)
        assert len(pairs) == 3
        for index, expected in enumerate(stored[split]):
            image, depth = pairs[index]
            assert image.size == (8, 6)
            assert depth.dtype == np.float32
            np.testing.assert_array_equal(depth, (expected / 1000.0).astype(np.float32))
            assert (depth[0] == 0).all()


def test_kitti_by_eigens_split_is_metres_times_256(kitti) -> None:
    folder, stored = kitti

    with pytest.warns(SFAWarning, match=r"1 left out.*test.*line 2: no depth for `2011"):
        data = load_dense("depth", folder, dataset_format="kitti")

    assert (len(data.train), len(data.pick("test"))) == (3, 2)
    for index, expected in enumerate(stored):
        depth = data.train[index][1]
        np.testing.assert_array_equal(depth, (expected / 256.0).astype(np.float32))
    np.testing.assert_array_equal(data.pick("test")[1][1], data.train[2][1])
    assert "None" not in "".join(data.skipped)


@pytest.mark.parametrize("place", ["", "eigen_benchmark"])
def test_kitti_takes_the_lists_of_mim_depth(place: str, tmp_path: Path) -> None:
    """Two columns, a slash, and annotations without the `train` or `val` of KITTI's archive."""
    drive, stored = "2011_09_26_drive_0057_sync", {}
    (tmp_path / place).mkdir(exist_ok=True)
    for split, number, subset in (("train", 116, "train"), ("test", 69, "val")):
        image = f"raw_data/2011_09_26/{drive}/image_02/data/{number:010d}.png"
        depth = f"{drive}/proj_depth/groundtruth/image_02/{number:010d}.png"
        annotated = tmp_path / "data_depth_annotated" / subset / depth
        stored[split] = _pair(tmp_path / image, annotated, number)
        line = f"/{image} /data_depth_annotated/{depth}\n"
        (tmp_path / place / f"{split}_list.txt").write_text(line)

    data = load_dense("depth", tmp_path, dataset_format="kitti")

    for split, expected in stored.items():
        depth = data.pick(split)[0][1]
        np.testing.assert_array_equal(depth, (expected / 256.0).astype(np.float32))


def test_listed_files_that_are_missing_stop_or_are_counted(kitti) -> None:
    folder, _ = kitti
    next((folder / "raw").rglob("0000000000.png")).unlink()

    with pytest.raises(SFAError, match=r"2 files cannot be used.*line 1: `2011_09_26/.*missing"):
        load_dense("depth", folder, dataset_format="kitti")
    with pytest.warns(SFAWarning, match="3 left out"):
        data = load_dense("depth", folder, dataset_format="kitti", on_error="skip")
    assert (len(data.train), len(data.pick("test"))) == (2, 1)


def test_a_list_that_is_missing_foreign_or_of_another_place_is_named(nyu) -> None:
    folder, _ = nyu
    listed = folder / "nyudepthv2_test_files_with_gt.txt"

    listed.write_text("a.jpg b.png 1\n")
    with pytest.raises(SFAError, match="none of its files is in"):
        load_dense("depth", folder, dataset_format="nyuv2", on_error="skip")
    listed.write_text("only_one_word\n")
    with pytest.raises(SFAError, match="line 1: expected image, depth"):
        load_dense("depth", folder, dataset_format="nyuv2")
    listed.unlink()
    with pytest.raises(SFAError, match="no list of the test files"):
        load_dense("depth", folder, dataset_format="nyuv2")


def test_a_depth_file_of_eight_bits_is_refused_when_it_is_come_to(nyu) -> None:
    folder, _ = nyu
    Image.new("L", (8, 6)).save(folder / "sync/kitchen/sync_depth_00001.png")

    data = load_dense("depth", folder, dataset_format="nyuv2")

    with pytest.raises(SFAError, match=r"sync_depth_00001\.png`: expected depth as 16-bit"):
        data.train[1]
    with pytest.warns(SFAWarning, match=r"1 left out, first: train, pair 1: `.*00001\.png"):
        skipped = load_dense("depth", folder, dataset_format="nyuv2", on_error="skip")
    assert len(skipped.train) == 2


def _labelled(folder: Path, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    h5py = pytest.importorskip("h5py")
    scipy_io = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 480, 640, 3), np.uint8)  # upright
    raw = rng.integers(600, 9990, (count, 480, 640)) / 1000
    raw = np.where(rng.random(raw.shape) < 0.2, 0, raw).astype(np.float32)  # holes
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        # As Matlab writes (H, W, 3, N): h5py sees the axes the other way round.
        file["images"] = images.transpose(0, 3, 2, 1)
        file["rawDepths"] = raw.transpose(0, 2, 1)
        file["depths"] = np.where(raw == 0, 5, raw).astype(np.float32).transpose(0, 2, 1)
    scipy_io.savemat(
        folder / "splits.mat",
        {"trainNdxs": np.array([[1], [3], [5]]), "testNdxs": np.array([[2], [4]])},
    )
    return images, raw


# Pixel by pixel: what BTS keeps of an image.
FRAME = np.array([[7 <= row < 474 and 7 <= col < 632 for col in range(640)] for row in range(480)])


def test_the_matlab_file_gives_raw_depth_upright_in_its_frame(tmp_path: Path) -> None:
    images, raw = _labelled(tmp_path)

    data = load_dense("depth", tmp_path, dataset_format="nyuv2")

    for split, numbers in (("train", (0, 2, 4)), ("test", (1, 3))):
        pairs = pickle.loads(pickle.dumps(data.pick(split)))  # as a loader's worker gets it
        assert len(pairs) == len(numbers)
        for index, number in enumerate(numbers):
            image, depth = pairs[index]
            np.testing.assert_array_equal(np.asarray(image), images[number] * FRAME[..., None])
            np.testing.assert_array_equal(depth, raw[number] * FRAME)


def _extracted(labelled: Path, folder: Path) -> Path:
    """Write the test images of a Matlab file as the script of BTS does, but without JPEG's loss."""
    h5py = pytest.importorskip("h5py")
    scene = folder / "official_splits" / "test" / "kitchen"
    scene.mkdir(parents=True)
    lines = []
    with h5py.File(labelled / "nyu_depth_v2_labeled.mat") as file:
        for number in (1, 3):
            metres = file["rawDepths"][number].T
            Image.fromarray((metres * 1000.0).astype(np.uint16)).save(scene / f"d{number}.png")
            black = np.zeros((480, 640, 3), np.uint8)
            black[7:474, 7:632, :] = file["images"][number].T[7:474, 7:632, :]
            Image.fromarray(black).save(scene / f"i{number}.png")
            lines.append(f"kitchen/i{number}.png kitchen/d{number}.png 518.8579")
    for name in ("nyudepthv2_test_files_with_gt.txt", "nyudepthv2_train_files_with_gt.txt"):
        (folder / name).write_text("\n".join(lines))
    (folder / "sync").symlink_to(folder / "official_splits" / "test")
    return folder


@pytest.mark.parametrize("metric", [DepthMetrics.nyu, partial(DepthMetrics, 10.0)])
def test_both_layouts_of_nyu_score_the_same_pixels(metric, tmp_path: Path) -> None:
    for name in ("mat", "files"):
        (tmp_path / name).mkdir()
    _, raw = _labelled(tmp_path / "mat")
    _extracted(tmp_path / "mat", tmp_path / "files")
    from_mat, from_files = (
        load_dense("depth", tmp_path / name, dataset_format="nyuv2").pick("test")
        for name in ("mat", "files")
    )

    scores = []
    for pairs in (from_mat, from_files):
        counting = metric()
        for image, depth in (pairs[0], pairs[1]):
            counting.update(1 + np.asarray(image, np.float32)[None, ..., 0] / 50, depth[None])
        scores.append(counting.compute())

    for index, number in enumerate((1, 3)):
        for _, depth in (from_mat[index], from_files[index]):
            np.testing.assert_array_equal(depth > 0, FRAME & (raw[number] > 0))
    # Files hold whole millimetres, rounded down.
    assert scores[0] == pytest.approx(scores[1], rel=2e-3)


def test_a_matlab_file_that_is_damaged_or_another_is_named(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    _labelled(tmp_path)
    (tmp_path / "splits.mat").write_bytes(b"nothing")
    with pytest.raises(SFAError, match=r"splits\.mat`: cannot read the split"):
        load_dense("depth", tmp_path, dataset_format="nyuv2")

    _labelled(tmp_path)
    labelled = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(labelled, "w") as file:
        file["images"] = np.zeros((2, 3, 640, 480), np.uint8)
        file["depths"] = np.ones((2, 640, 480))
    with pytest.raises(SFAError, match=r"rawDepths \(N, 640, 480\), got \(2, .*\) and None"):
        load_dense("depth", tmp_path, dataset_format="nyuv2")
    with h5py.File(labelled, "a") as file:
        file["rawDepths"] = np.ones((2, 640, 480))
    with pytest.raises(SFAError, match=r"splits\.mat`: numbers beyond the 2 images"):
        load_dense("depth", tmp_path, dataset_format="nyuv2")
    labelled.write_bytes(b"MATLAB 5.0")
    with pytest.raises(SFAError, match="cannot read this Matlab file"):
        load_dense("depth", tmp_path, dataset_format="nyuv2")


def test_without_h5py_the_error_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    _labelled(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)

    with pytest.raises(SFAError, match=r"needs h5py: pip install 'sfa-peft\[data\]'"):
        load_dense("depth", tmp_path, dataset_format="nyuv2")
