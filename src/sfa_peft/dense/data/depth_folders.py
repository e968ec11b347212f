# SPDX-License-Identifier: Apache-2.0
"""NYUv2 and KITTI as they are distributed, and as the depth papers' lists of files name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfa_peft.dense.data.depth import DepthMap
from sfa_peft.dense.data.files import read_depth
from sfa_peft.dense.data.splits import Found, PairFolder, SubSplit
from sfa_peft.errors import SFAError

NYU_SCALE, KITTI_SCALE = 1000.0, 256.0  # Stored units per metre.
NYU_SIZE = (480, 640)
# What BTS leaves of an image of NYUv2: rows 7 to 473 and columns 7 to 631, counted from 0.
NYU_FRAME = (slice(7, 474), slice(7, 632))


def within_frame(values: NDArray[Any]) -> NDArray[Any]:
    """Return a copy of an image or depth of NYUv2 that is 0 in the frame of some white pixels."""
    inside = np.zeros_like(values)
    inside[NYU_FRAME] = values[NYU_FRAME]
    return inside


def read_framed_depth(path: Path) -> DepthMap:
    """Return the depth of a test file of NYUv2, of its size 0 in the frame; see ``read_depth``."""
    metres = read_depth(path, NYU_SCALE)
    return within_frame(metres) if metres.shape == NYU_SIZE else metres


@dataclass(frozen=True)
class _Listed:
    # Names the list of a split may have, and where its images and its depth may be, first wins.
    names: tuple[str, ...]
    images: tuple[str, ...]
    depths: tuple[str, ...]
    read: Callable[[Path], DepthMap]


# Not one place for both splits: the scenes of NYUv2's two have files of the same names.
_NYU = {
    "train": _Listed(
        ("nyudepthv2_train_files_with_gt.txt", "nyu_train.txt", "train_list.txt"),
        ("", "sync", "train"),
        ("", "sync", "train"),
        partial(read_depth, scale=NYU_SCALE),
    ),
    "test": _Listed(
        ("nyudepthv2_test_files_with_gt.txt", "nyu_test.txt", "test_list.txt"),
        ("", "official_splits/test", "test"),
        ("", "official_splits/test", "test"),
        read_framed_depth,
    ),
}
_KITTI_IMAGES = ("", "raw", "raw_data", "kitti_raw", "input")
_KITTI_DEPTHS = (
    "",
    "data_depth_annotated",
    "data_depth_annotated/train",
    "data_depth_annotated/val",
    "gt_depth",
)
_KITTI = {
    split: _Listed(
        (
            f"eigen_{split}_files_with_gt.txt",
            f"kitti_eigen_{split}.txt",
            f"{split}_list.txt",
            f"eigen_benchmark/{split}_list.txt",
        ),
        _KITTI_IMAGES,
        _KITTI_DEPTHS,
        partial(read_depth, scale=KITTI_SCALE),
    )
    for split in ("train", "test")
}


def nyuv2(folder: Path) -> Found[DepthMap]:
    """Read NYU Depth V2, the labelled Matlab file or the folders of PNG files.

    * ``nyu_depth_v2_labeled.mat`` with ``splits.mat`` beside it: 795 and 654 images. Needs h5py and
      scipy. Depth is ``rawDepths``, as measured, and images have a black frame: what BTS's script
      makes the test files of the other layout from.
    * Lists of files, ``nyudepthv2_train_files_with_gt.txt`` and ``..._test_...``, as BTS and
      MIM-Depth have them: image, depth (16-bit PNG, millimetres) and focal length per line,
      relative to the folder, or to ``sync`` and ``official_splits/test`` in it.

    What lies in the black frame of test images counts as not measured, so that both layouts are
    scored on the same pixels whatever the crop.

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
        if not 0 <= min(train + test) <= max(train + test) < len(images):
            raise SFAError(f"`{folder / 'splits.mat'}`: numbers beyond the {len(images)} images")
        return Found({"train": SubSplit(images, train), "test": SubSplit(images, test)})
    return _by_lists(folder, _NYU)


def kitti(folder: Path) -> Found[DepthMap]:
    """Read KITTI by Eigen's split.

    ``eigen_train_files_with_gt.txt`` and ``eigen_test_files_with_gt.txt`` (BTS) or
    ``train_list.txt`` and ``test_list.txt`` (MIM-Depth, also in ``eigen_benchmark``) have image,
    depth, and maybe the focal length per line. Images are relative to the folder or ``raw`` in it,
    depth (16-bit PNG, metres times 256, 0 where no laser point fell) to the folder or
    ``data_depth_annotated``, with or without ``train`` and ``val``. A line with ``None`` for the
    depth is left out and reported.

    Args:
        folder: With the lists in it.

    Returns:
        ``train`` and ``test``, and which listed files are missing.

    Raises:
        SFAError: If a list is missing or has other lines.
    """
    return _by_lists(folder, _KITTI)


class NyuLabelled:
    """The 1449 images of ``nyu_depth_v2_labeled.mat`` and their raw depth, read one at a time.

    ``depths`` in the same file have their holes filled in; published scores do not count there.
    Image and depth are 0 in the frame, see :func:`within_frame`.

    Args:
        path: The file.

    Raises:
        SFAError: If h5py is not installed or the file is not what its name says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            images, depths = (
                file[name].shape if name in file else None for name in ("images", "rawDepths")
            )
        upright = NYU_SIZE[::-1]  # Matlab stores columns first
        if not images or images != (images[0], 3, *upright) or depths != (images[0], *upright):
            raise SFAError(
                f"`{path}`: expected images (N, 3, 640, 480) and rawDepths (N, 640, 480), got "
                f"{images} and {depths}"
            )
        self._length = int(images[0])

    def __len__(self) -> int:
        """Return the number of images."""
        return self._length

    def name(self, index: int) -> str:
        """Return file and number of image ``index``, counted from 0."""
        return f"`{self.path}`, image {index}"

    def __getitem__(self, index: int) -> tuple[Image.Image, DepthMap]:
        """Read image ``index`` and its depth in metres; raises SFAError if the file is damaged."""
        try:
            # Opened anew: an open HDF5 file must not go along into a loader's worker process.
            with self._open() as file:
                image, depth = file["images"][index], file["rawDepths"][index]
        except OSError as error:
            raise SFAError(f"{self.name(index)}: cannot be read: {error}") from error
        upright = within_frame(np.ascontiguousarray(image.transpose(2, 1, 0)))
        metres = within_frame(np.ascontiguousarray(depth.T).astype(np.float32))
        return Image.fromarray(upright), metres

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
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise SFAError(f"`{path}` needs scipy: pip install 'sfa-peft[data]'") from error
    try:
        content = loadmat(path)
        train, test = (np.asarray(content[name]).ravel() for name in ("trainNdxs", "testNdxs"))
    except (OSError, ValueError, KeyError, MatReadError) as error:
        raise SFAError(
            f"`{path}`: cannot read the split (trainNdxs, testNdxs) of NYUv2: {error!r}; it is a "
            "file of its own on the data set's page"
        ) from error
    # Matlab counts from 1.
    return (train.astype(int) - 1).tolist(), (test.astype(int) - 1).tolist()


def _by_lists(folder: Path, lists: dict[str, _Listed]) -> Found[DepthMap]:
    found: Found[DepthMap] = Found({})
    for split, places in lists.items():
        listed = next((folder / n for n in places.names if (folder / n).is_file()), None)
        if listed is None:
            raise SFAError(
                f"`{folder}`: no list of the {split} files; expected one of {places.names}"
            )
        pairs = []
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"`{listed}`, line {number}"
            words = line.split()
            if len(words) not in (2, 3):
                raise SFAError(f"{where}: expected image, depth (and focal length), got {line!r}")
            image = _resolve(folder, words[0], places.images)
            depth = _resolve(folder, words[1], places.depths)
            if words[1] == "None":
                found.notes.append(f"{where}: no depth for `{words[0]}`")
            elif image is None or depth is None:
                found.missing.append(f"{where}: `{words[image is not None]}` is missing")
            else:
                pairs.append((image, depth))
        if not pairs:
            raise SFAError(
                f"`{listed}`: none of its files is in `{folder}` or, there, in "
                f"{places.images[1:]} and {places.depths[1:]}"
            )
        found.splits[split] = PairFolder(pairs, places.read)
    return found


def _resolve(folder: Path, name: str, roots: Sequence[str]) -> Path | None:
    # Some of the published lists begin their paths with a slash, and MIM-Depth's with the folder
    # of the annotations, but without the `train` or `val` that KITTI's archive has in it.
    name = name.lstrip("/")
    within = name.removeprefix("data_depth_annotated/")
    tried = (folder / root / part for part in dict.fromkeys((name, within)) for root in roots)
    return next((path for path in tried if path.is_file()), None)
