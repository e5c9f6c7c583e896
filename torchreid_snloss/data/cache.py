"""Decoded images in memory that all workers and processes of a machine share."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from torchreid_snloss import distributed
from torchreid_snloss.data.decoded import decode_array
from torchreid_snloss.data.items import files_of
from torchreid_snloss.data.readable import UnreadableImageError, decode
from torchreid_snloss.errors import text_of
from torchreid_snloss.progress import progress

__all__ = ["CacheError", "ImageCache", "available_memory", "cache_images"]

Pixels = npt.NDArray[np.uint8]
Places = Mapping[str, tuple[int, int, int]]


class CacheError(OSError):
    """There is no room for the decoded images, or no way to share them."""


class ImageCache:
    """Decoded images by their paths, in memory without a name that ends with the last process that uses it.

    Nothing has to be removed after a crash, and the size of `/dev/shm`, which containers keep small, does not limit it.

    Args:
        places: where the values of each image start, its height and its width, by its path.
        process: the number of the process that made the memory.
        file: the number of the memory's file there.
        writable: whether images may be put in.

    Raises:
        CacheError: if the memory of that process can't be opened.
    """

    def __init__(self, places: Places, process: int, file: int, writable: bool = False) -> None:
        self._of = (places, process, file)
        self._places = places
        size = sum(height * width * 3 for _, height, width in places.values())
        try:
            with open(f"/proc/{process}/fd/{file}", "r+b" if writable else "rb") as memory:
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                self._values = np.frombuffer(mmap.mmap(memory.fileno(), size, access=access), dtype=np.uint8)
        except OSError as error:
            raise CacheError(
                f"data.cache ram: can't map the memory of process {process}: {text_of(error)}; set it to off"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, self._of  # for a worker that is spawned

    @property
    def address(self) -> tuple[Places, int, int]:
        """The first arguments of another cache with the same memory, in any process of the machine."""
        return self._of

    def get(self, path: str) -> Pixels | None:
        """The image as uint8 (height, width, 3), or None if it is not one of the cache's."""
        place = self._places.get(path)
        if place is None:
            return None
        start, height, width = place
        return self._values[start : start + height * width * 3].reshape(height, width, 3)

    @classmethod
    def filled(cls, paths: Iterable[str], threads: int) -> ImageCache:
        """Makes a cache and decodes all images into it.

        Args:
            paths: the files.
            threads: how many to decode at a time.

        Raises:
            CacheError: if there is not enough memory.
            UnreadableImageError: for a file that can't be read.
        """
        places, size = _places_of(paths)
        _check_room(len(places), size)
        if not hasattr(os, "memfd_create"):
            raise CacheError("data.cache ram needs Linux; set it to off")
        file = os.memfd_create("torchreid_snloss images")  # closed with the process
        try:
            os.posix_fallocate(file, 0, max(size, 1))  # here rather than when a page is first used
        except OSError as error:
            os.close(file)
            raise CacheError(f"data.cache ram: can't take {_shown(size)}: {text_of(error)}; set it to off") from error
        try:
            made = cls(places, os.getpid(), file, writable=True)

            def put(path: str) -> None:
                image, room = decode_array(path), made.get(path)
                if room is None or image.shape != room.shape:
                    raise UnreadableImageError(
                        f"can't read the image {path!r}: it is not of the size that its file says"
                    )
                room[:] = image

            with ThreadPoolExecutor(max(threads, 1)) as pool:
                for _ in progress("decoding", pool.map(put, places), "image", len(places)):
                    pass
            done = cls(places, os.getpid(), file)
        except BaseException:
            os.close(file)
            raise
        weakref.finalize(done, os.close, file)
        return done


def cache_images(loaders: Iterable[Any], threads: int) -> None:
    """Decodes all images of some loaders, once for each machine.

    All processes call it together.

    Args:
        loaders: loaders with batch transforms.
        threads: how many images to decode at a time.

    Raises:
        CacheError: if there is not enough memory.
        UnreadableImageError: for a file that can't be read.
        PeerError: if the function raised on another process.
    """
    datasets = [loader.dataset for loader in loaders]
    machines = distributed.broadcast_object(distributed.gather_objects(_machine()))
    maker = machines.index(_machine())
    paths = (path for dataset in datasets for item in dataset.data for path in files_of(item))
    make = lambda: ImageCache.filled(paths, threads) if distributed.rank() == maker else None  # noqa: E731
    made = distributed.main_process_first(make)
    address = None if made is None else made.address
    addresses: list[Any] = distributed.broadcast_object(distributed.gather_objects(address))
    cache = distributed.main_process_first(lambda: made or ImageCache(*addresses[maker]))
    for dataset in datasets:
        dataset.cache = cache


def _machine() -> tuple[str, ...]:
    """What processes have in common that see each other in `/proc`."""
    found = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text())
    return tuple(found)


def _places_of(paths: Iterable[str]) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Where each image's values go, from the sizes in the files' headers, and how many values there are."""
    places: dict[str, tuple[int, int, int]] = {}
    end = 0
    for path in dict.fromkeys(paths):
        try:
            if not os.path.isfile(path):  # such as a pipe, which Pillow would wait for
                raise OSError
            with Image.open(path) as file:
                width, height = file.size
        except Exception:  # `decode` raises an error that names the file
            width, height = decode(path).size
        places[path] = end, height, width
        end += height * width * 3
    return places, end


def _check_room(number: int, size: int) -> None:
    available = available_memory()
    has = "" if available is None else f"; {_shown(available)} are available"
    print(f"=> data.cache ram: {number:,} decoded images take {_shown(size)} of shared memory{has}")
    if available is not None and size > available:
        raise CacheError(
            f"data.cache ram needs {_shown(size)} for {number:,} decoded images, but only {_shown(available)} of "
            "memory are available: set data.cache off"
        )


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def available_memory(root: Path = Path("/")) -> int | None:
    """The bytes of memory that this process can still get, by the system and by its control groups; None if unknown.

    Args:
        root: the folder with the `proc` and `sys` of the system.
    """
    known = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        known.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":  # version 2
                known += _left_in_groups(root / "sys/fs/cgroup", group, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                folder = root / "sys/fs/cgroup/memory"
                known += _left_in_groups(folder, group, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(known, default=None)


def _left_in_groups(folder: Path, group: str, most: str, used: str) -> Iterator[int]:
    """The bytes that a control group and those around it leave, for each that has a limit.

    A container sees its own group as `folder`, and may name it by a path that it does not see.
    """
    for part in (PurePosixPath(group), *PurePosixPath(group).parents):
        here = folder / str(part).lstrip("/")
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limit, now = (int((here / name).read_text()) for name in (most, used))
            files = 0  # which the system gives up for others
            for line in (here / "memory.stat").read_text().splitlines():
                name, value = line.split()
                files = int(value) if name in ("inactive_file", "total_inactive_file") else files
            yield max(0, limit - now + files)
