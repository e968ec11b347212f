# SPDX-License-Identifier: Apache-2.0
"""NYUv2 and KITTI as they are distributed, and as the depth papers' lists of files name them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfa_peft.dense.data.depth import DepthMap
from sfa_peft.dense.data.files import read_depth
from sfa_peft.dense.data.splits import Found, PairFolder, SubSplit
from sfa_peft.errors import SFAError

NYU_SCALE, KITTI_SCALE = 1000.0, 256.0  # Stored units per metre.

_NYU_LISTS = {
    "train": ("nyudepthv2_train_files_with_gt.txt", "nyu_train.txt", "train_list.txt"),
    "test": ("nyudepthv2_test_files_with_gt.txt", "nyu_test.txt", "test_list.txt"),
}
_NYU_ROOTS = ("", "sync", "train", "official_splits/test", "test")
_KITTI_LISTS = {
    "train": ("eigen_train_files_with_gt.txt", "kitti_eigen_train.txt"),
    "test": ("eigen_test_files_with_gt.txt", "kitti_eigen_test.txt"),
}
_KITTI_IMAGES = ("", "raw", "raw_data", "kitti_raw", "input")
_KITTI_DEPTHS = (
    "",
    "data_depth_annotated",
    "data_depth_annotated/train",
    "data_depth_annotated/val",
    "gt_depth",
)


def nyuv2(folder: Path) -> Found[DepthMap]:
    """Read NYU Depth V2, the labelled Matlab file or the folders of PNG files.

    * ``nyu_depth_v2_labeled.mat`` with ``splits.mat`` beside it: 795 and 654 images. Needs h5py and
      scipy.
    * Lists of files, ``nyudepthv2_train_files_with_gt.txt`` and ``..._test_...``, as BTS and
      MIM-Depth have them: image, depth (16-bit PNG, millimetres) and focal length per line,
      relative to the folder, or to ``sync`` and ``official_splits/test`` in it.

    Args:
        folder: With either in it; the Matlab file is taken where there are both.

    Returns:
        ``train`` and ``test``, and which listed files are missing.

    Raises:
        SFAError: If neither is there or one cannot be read.
    """
    labelled = folder / "nyu_depth_v2_labeled.mat"
    if labelled.is_file():
        train, test = _nyu_indices(folder / "splits.mat")
        images = NyuLabelled(labelled)
        return Found({"train": SubSplit(images, train), "test": SubSplit(images, test)})
    return _by_lists(folder, _NYU_LISTS, (_NYU_ROOTS, _NYU_ROOTS), NYU_SCALE)


def kitti(folder: Path) -> Found[DepthMap]:
    """Read KITTI by Eigen's split.

    ``eigen_train_files_with_gt.txt`` and ``eigen_test_files_with_gt.txt`` have image, depth and
    focal length per line. Images are relative to the folder or ``raw`` in it, depth (16-bit PNG,
    metres times 256, 0 where no laser point fell) to the folder or ``data_depth_annotated``, with
    or without ``train`` and ``val``. A line with ``None`` for the depth is left out and reported.

    Args:
        folder: With the lists in it.

    Returns:
        ``train`` and ``test``, and which listed files are missing.

    Raises:
        SFAError: If a list is missing or has other lines.
    """
    return _by_lists(folder, _KITTI_LISTS, (_KITTI_IMAGES, _KITTI_DEPTHS), KITTI_SCALE)


class NyuLabelled:
    """The 1449 images of ``nyu_depth_v2_labeled.mat``, read one at a time.

    Args:
        path: The file.

    Raises:
        SFAError: If h5py is not installed or the file is not what its name says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            shapes = [file[name].shape if name in file else None for name in ("images", "depths")]
        images, depths = shapes
        if images is None or depths is None or images != (depths[0], 3, *depths[1:]):
            raise SFAError(
                f"`{path}`: expected images (N, 3, W, H) and depths (N, W, H), got {images} and "
                f"{depths}"
            )
        self._length = int(images[0])

    def __len__(self) -> int:
        """Return the number of images."""
        return self._length

    def __getitem__(self, index: int) -> tuple[Image.Image, DepthMap]:
        """Read image ``index`` and its depth in metres; raises SFAError if the file is damaged."""
        try:
            # Opened anew: an open HDF5 file must not go along into a loader's worker process.
            with self._open() as file:
                image, depth = file["images"][index], file["depths"][index]
        except OSError as error:
            raise SFAError(f"`{self.path}`: cannot read image {index}: {error}") from error
        # Matlab stores columns first: (3, W, H) is an image on its side.
        upright = np.ascontiguousarray(image.transpose(2, 1, 0))
        return Image.fromarray(upright), np.ascontiguousarray(depth.T).astype(np.float32)

    def _open(self) -> Any:
        try:
            import h5py
        except ImportError as error:
            raise SFAError(
                f"`{self.path}` needs h5py: pip install 'sfa-peft[data]', or unpack it into PNG "
                "files"
            ) from error
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise SFAError(f"`{self.path}`: cannot read this Matlab file: {error}") from error


def _nyu_indices(path: Path) -> tuple[list[int], list[int]]:
    from scipy.io import loadmat

    try:
        content = loadmat(path)
        # Matlab counts from 1.
        both = [np.asarray(content[name]).ravel() - 1 for name in ("trainNdxs", "testNdxs")]
    except (OSError, ValueError, KeyError) as error:
        raise SFAError(
            f"`{path}`: cannot read the split (trainNdxs, testNdxs) of NYUv2: {error!r}; it is a "
            "file of its own on the data set's page"
        ) from error
    return both[0].astype(int).tolist(), both[1].astype(int).tolist()


def _by_lists(
    folder: Path,
    lists: dict[str, tuple[str, ...]],
    roots: tuple[Sequence[str], Sequence[str]],
    scale: float,
) -> Found[DepthMap]:
    found: Found[DepthMap] = Found({})
    for split, names in lists.items():
        listed = next((folder / name for name in names if (folder / name).is_file()), None)
        if listed is None:
            raise SFAError(f"`{folder}`: no list of the {split} files; expected one of {names}")
        pairs = []
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"`{listed}`, line {number}"
            words = line.split()
            if len(words) not in (2, 3):
                raise SFAError(f"{where}: expected image, depth (and focal length), got {line!r}")
            image, depth = (_resolve(folder, *pair) for pair in zip(words, roots, strict=False))
            if words[1] == "None":
                found.notes.append(f"{where}: no depth for `{words[0]}`")
            elif image is None or depth is None:
                found.missing.append(f"{where}: `{words[image is not None]}` is missing")
            else:
                pairs.append((image, depth))
        if not pairs:
            raise SFAError(
                f"`{listed}`: none of its files is in `{folder}` or in {[r for r in roots[0] if r]}"
            )
        found.splits[split] = PairFolder(pairs, partial(read_depth, scale=scale))
    return found


def _resolve(folder: Path, name: str, roots: Sequence[str]) -> Path | None:
    # Some of the published lists begin their paths with a slash.
    tried = (folder / root / name.lstrip("/") for root in roots)
    return next((path for path in tried if path.is_file()), None)
