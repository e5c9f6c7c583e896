"""The synthetic data sets `synthetic` and `synthetic_video`, in Market-1501 layout, generated on first use."""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from torchreid import data

from torchreid_snloss.data.pedestrians import Camera, Person, draw, make_camera, make_person, make_twin
from torchreid_snloss.progress import progress

if sys.platform != "win32":
    import fcntl

__all__ = ["SyntheticPedestrians", "SyntheticTracklets", "make_pedestrians"]

_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
_NUM_CAMERAS = 6
_IMAGES_PER_CAMERA = 2
_FRAMES_PER_TRACKLET = 8
_LOCK = ".lock"
_A_DAY = 86400  # seconds


class SyntheticPedestrians(data.datasets.Market1501):
    """Synthetic images of people, to try losses without a download. They say nothing about accuracy on real data.

    An identity has its own clothes, proportions, hair and bag. Every fifth identity is the previous one with one small
    detail changed. The six cameras differ in light, colour cast, background and viewpoint. The images differ in pose,
    position, scale, occlusion and noise.

    There are 120 training identities with 6 to 10 images each. 100 other identities with 8 images each are for testing,
    and 2 of the 8 images are queries. The first use takes some seconds and writes about 1,750 images, 64 pixels wide
    and 128 high, to `<root>/synthetic-v1`.
    """

    dataset_dir = "synthetic-v1"
    dataset_url = None

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        directory = Path(root).expanduser().absolute() / self.dataset_dir
        if not directory.exists():
            make_pedestrians(directory)
        super().__init__(root=root, **kwargs)

    def process_dir(self, dir_path: str, relabel: bool = False) -> list[tuple[str, int, int]]:
        # Sorted, because the order of the files in a folder depends on the file system.
        return sorted(super().process_dir(dir_path, relabel=relabel))


class SyntheticTracklets(data.VideoDataset):
    """Synthetic tracklets of people: one tracklet of 8 frames for each person and each camera that sees the person.

    60 training identities are seen by 3 to 5 cameras. 40 other identities, each seen by 4 cameras, are for testing, and
    the first tracklet of each is the query. The first use writes about 3,200 images to `<root>/synthetic-video-v1`.
    """

    dataset_dir = "synthetic-video-v1"

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        directory = Path(root).expanduser().absolute() / self.dataset_dir
        if not directory.exists():
            make_pedestrians(directory, num_train_pids=60, num_test_pids=40, frames=_FRAMES_PER_TRACKLET)
        train, query, gallery = (_tracklets(directory / "Market-1501-v15.09.15" / folder) for folder in _FOLDERS)
        labels = {pid: label for label, pid in enumerate(sorted({pid for _, pid, _ in train}))}
        train = [(paths, labels[pid], camid) for paths, pid, camid in train]
        super().__init__(train, query, gallery, **kwargs)


def _tracklets(folder: Path) -> list[tuple[tuple[str, ...], int, int]]:
    """The frames of each identity from each camera, `0001_c3s1_000000_00.jpg` and so on, in order."""
    frames: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.glob("*.jpg")):
        pid, camera, *_ = path.name.split("_")
        frames.setdefault((int(pid), int(camera[1]) - 1), []).append(str(path))
    return [(tuple(paths), pid, camid) for (pid, camid), paths in frames.items()]


def _lock(file: IO[bytes]) -> None:
    """Raises OSError if another process has the lock, or the system has none."""
    if sys.platform == "win32":
        raise OSError("no locks of this kind on Windows")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_pedestrians(
    directory: str | Path, num_train_pids: int = 120, num_test_pids: int = 100, seed: int = 0, frames: int = 0
) -> None:
    """Draws people and writes the images in Market-1501 layout.

    The same arguments give the same bytes with the same versions of NumPy and Pillow. The folder appears only when it
    is complete.

    Args:
        directory: The folder to create. It will hold `Market-1501-v15.09.15/` with `bounding_box_train`, `query` and
            `bounding_box_test`.
        num_train_pids: The number of training identities.
        num_test_pids: The number of identities in query and gallery, who are not in the training set.
        seed: The seed of everything random.
        frames: The number of frames in a tracklet, for video. Each camera that sees an identity then takes that many
            images, and for a test identity those of the first camera are the query. With 0 a camera takes two images
            of an identity, and for a test identity one image each from two cameras is a query.

    Raises:
        FileExistsError: If `directory` exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} already exists")
    directory.parent.mkdir(parents=True, exist_ok=True)
    print(f"=> Drawing the synthetic pedestrians into {directory}")
    cameras = [make_camera(np.random.default_rng([seed, 1, camera])) for camera in range(_NUM_CAMERAS)]
    with _unfinished(directory) as unfinished:
        made = unfinished / "made"
        folders = {name: made / "Market-1501-v15.09.15" / name for name in _FOLDERS}
        for folder in folders.values():
            folder.mkdir(parents=True)
        people = _people(num_train_pids + num_test_pids, seed)
        for pid, person in progress("drawing", people, "person", num_train_pids + num_test_pids):
            _write_person(folders, pid, person, cameras, seed, pid <= num_train_pids, frames)
        try:
            made.rename(directory)
        except OSError:
            if not directory.exists():  # it exists if another process was faster
                raise


@contextlib.contextmanager
def _unfinished(directory: Path) -> Iterator[Path]:
    """A hidden folder beside `directory`, which is removed in the end, after those of processes that were killed.

    A lock, which ends with its process, tells whether another one still draws into such a folder.
    """
    prefix = f".{directory.name}-"
    for folder in directory.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            if (folder / _LOCK).exists():
                with open(folder / _LOCK, "rb+") as file:
                    _lock(file)
                    shutil.rmtree(folder, ignore_errors=True)
            elif time.time() - folder.stat().st_mtime > _A_DAY:  # killed before there was a lock
                shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as name:
        folder = Path(name)
        with open(folder / f"{_LOCK}.new", "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(file)
                Path(file.name).rename(folder / _LOCK)  # nobody sees it before it is locked
            yield folder


def _people(number: int, seed: int) -> Iterator[tuple[int, Person]]:
    person: Person | None = None
    for pid in range(1, number + 1):
        rng = np.random.default_rng([seed, 2, pid])
        person = make_twin(person, rng) if person is not None and pid % 5 == 0 else make_person(rng)
        yield pid, person


def _write_person(
    folders: dict[str, Path], pid: int, person: Person, cameras: list[Camera], seed: int, is_train: bool, frames: int
) -> None:
    rng = np.random.default_rng([seed, 3, pid])
    seen_by = rng.permutation(_NUM_CAMERAS)[: rng.integers(3, 6) if is_train else 4]
    for order, camera in enumerate(seen_by):
        for frame in range(frames or _IMAGES_PER_CAMERA):
            if is_train:
                folder = folders["bounding_box_train"]
            else:
                is_query = order == 0 if frames else order < 2 and frame == 0
                folder = folders["query" if is_query else "bounding_box_test"]
            image = draw(person, cameras[camera], rng)
            image.save(folder / f"{pid:04d}_c{camera + 1}s1_{frame:06d}_00.jpg", quality=90)
