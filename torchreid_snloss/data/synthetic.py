"""The dataset ``synthetic``: drawn people on disk, in Market-1501 layout, made on first use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torchreid import data

from torchreid_snloss.data.pedestrians import Camera, Person, draw, make_camera, make_person, make_twin
from torchreid_snloss.progress import progress

__all__ = ["SyntheticPedestrians", "SyntheticTracklets", "make_pedestrians"]

_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
_NUM_CAMERAS = 6
_IMAGES_A_CAMERA = 2
_FRAMES = 8


class SyntheticPedestrians(data.datasets.Market1501):
    """Drawn people, for trying out losses without a download. Not real people, and no measure of real accuracy.

    An identity is its clothes, proportions, hair and bag; every fifth identity is the one before it with one small
    detail changed. Six cameras differ in light, colour cast, background and viewpoint, images in pose, position,
    scale, occlusion and noise.

    Statistics: 120 training identities with 6 to 10 images; 100 others with 8 images to test, of which 2 are queries.
    The first use writes about 1,750 images of 64 x 128 to ``<root>/synthetic-v1``, in seconds; later ones read them.
    """

    dataset_dir = "synthetic-v1"
    dataset_url = None

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        directory = Path(root).expanduser().absolute() / self.dataset_dir
        if not directory.exists():
            make_pedestrians(directory)
        super().__init__(root=root, **kwargs)

    def process_dir(self, dir_path: str, relabel: bool = False) -> list[tuple[str, int, int]]:
        # Sorted, since the order of a folder's files differs between machines.
        return sorted(super().process_dir(dir_path, relabel=relabel))


class SyntheticTracklets(data.VideoDataset):
    """The drawn people as video: a tracklet is a person under a camera, of 8 frames.

    60 training identities under 3 to 5 cameras, 40 others under 4 to test, whose first tracklet is the query. The first
    use writes about 3,200 images to ``<root>/synthetic-video-v1``.
    """

    dataset_dir = "synthetic-video-v1"

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        directory = Path(root).expanduser().absolute() / self.dataset_dir
        if not directory.exists():
            make_pedestrians(directory, num_train_pids=60, num_test_pids=40, frames=_FRAMES)
        train, query, gallery = (_tracklets(directory / "Market-1501-v15.09.15" / folder) for folder in _FOLDERS)
        labels = {pid: label for label, pid in enumerate(sorted({pid for _, pid, _ in train}))}
        train = [(paths, labels[pid], camid) for paths, pid, camid in train]
        super().__init__(train, query, gallery, **kwargs)


def _tracklets(folder: Path) -> list[tuple[tuple[str, ...], int, int]]:
    """Frames of an identity under a camera, ``0001_c3s1_000000_00.jpg`` and so on, in order."""
    frames: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.glob("*.jpg")):
        pid, camera, *_ = path.name.split("_")
        frames.setdefault((int(pid), int(camera[1]) - 1), []).append(str(path))
    return [(tuple(paths), pid, camid) for (pid, camid), paths in frames.items()]


def make_pedestrians(
    directory: str | Path, num_train_pids: int = 120, num_test_pids: int = 100, seed: int = 0, frames: int = 0
) -> None:
    """Draws people and writes them in Market-1501 layout.

    The same arguments give the same bytes with the same versions of NumPy and Pillow. The folder appears only once it
    is complete.

    Args:
        directory: to make; it holds ``Market-1501-v15.09.15/`` with ``bounding_box_train``, ``query`` and
            ``bounding_box_test``.
        num_train_pids: training identities.
        num_test_pids: identities in query and gallery, other people than in training.
        seed: of everything random.
        frames: of a tracklet, for video: an identity has so many images under each of its cameras, and of those to test
            the first one's are the query; 0: no video, two images under a camera, and a query each from two cameras.

    Raises:
        FileExistsError: if ``directory`` exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists already")
    directory.parent.mkdir(parents=True, exist_ok=True)
    print(f"=> Drawing the synthetic pedestrians into {directory}")
    cameras = [make_camera(np.random.default_rng([seed, 1, camera])) for camera in range(_NUM_CAMERAS)]
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as unfinished:
        made = Path(unfinished) / "made"
        folders = {name: made / "Market-1501-v15.09.15" / name for name in _FOLDERS}
        for folder in folders.values():
            folder.mkdir(parents=True)
        people = _people(num_train_pids + num_test_pids, seed)
        for pid, person in progress("drawing", people, "person", num_train_pids + num_test_pids):
            _write_person(folders, pid, person, cameras, seed, pid <= num_train_pids, frames)
        try:
            made.rename(directory)
        except OSError:
            if not directory.exists():  # it does where another process was faster
                raise


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
        for frame in range(frames or _IMAGES_A_CAMERA):
            if is_train:
                folder = folders["bounding_box_train"]
            else:  # a query from each of two cameras, the rest is gallery
                is_query = order == 0 if frames else order < 2 and frame == 0
                folder = folders["query" if is_query else "bounding_box_test"]
            image = draw(person, cameras[camera], rng)
            image.save(folder / f"{pid:04d}_c{camera + 1}s1_{frame:06d}_00.jpg", quality=90)
