"""Reads identities, cameras and splits from file names, from sub-folders or from a CSV file."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torchreid_snloss.data.folder_files import files_below, is_image, natural_order, single_folders

__all__ = ["LAYOUTS", "FolderImage", "FoundImages", "finds_a_camera", "left_out_words", "read_folder"]

_SPLITS = {
    "train": ("train", "bounding_box_train", "image_train", "training"),
    "query": ("query", "image_query", "probe"),
    "gallery": ("gallery", "bounding_box_test", "image_test", "test"),
}
_NO_PEOPLE = {name for names in _SPLITS.values() for name in names} | {"val", "valid", "validation"}
_COLUMNS = {
    "path": ("path", "image_path", "img_path", "filename", "file", "image"),
    "identity": ("identity", "pid", "person_id", "person", "label", "id"),
    "camera": ("camera", "camera_id", "camid", "cam"),
    "split": ("split", "set", "subset"),
}
# c1, cam1, cam_1, camera-1, and c1s1 as in Market-1501; not the c3 within a word or a checksum.
_CAMERA = re.compile(r"(?<![a-z0-9])c(?:am(?:era)?)?[-_ ]?(\d+)(?![a-rt-z0-9])", re.IGNORECASE)
_IDENTITY = re.compile(r"(-?[^_]+)_(.*)", re.DOTALL)
_LONGEST_HEADER = 100_000
LAYOUTS = ("auto", "market", "people", "csv")
"""How the images of a folder may be named; `auto` finds out which it is."""

_WORDS = {"market": "names as in Market-1501", "people": "a folder for each person"}


@dataclass(frozen=True)
class FolderImage:
    """An image of the folder.

    Attributes:
        path: The file.
        identity: The name of its identity.
        camera: The name of its camera; None if it is not known.
        split: `train`, `query`, `gallery`, or empty if the folder is not split.
        name: The part of the path in which a camera may stand.
    """

    path: str
    identity: str
    camera: str | None = None
    split: str = ""
    name: str = ""


@dataclass
class FoundImages:
    """What was found in a folder.

    Attributes:
        layout: How the images are stored, in words.
        images: The images, in the natural order of their paths.
        left_out: How many files are left out, by the reason.
    """

    layout: str
    images: list[FolderImage] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def finds_a_camera(pattern: str) -> bool:
    """Whether it is a word that needs no pattern, or a regular expression with one group."""
    try:
        return pattern in ("auto", "none") or re.compile(pattern).groups == 1
    except re.error:
        return False


def read_folder(path: str, layout: str, camera: str, junk: Collection[str]) -> FoundImages:
    """Reads what a folder holds.

    Args:
        path: The folder, or a CSV file.
        layout: `market`, `people` or `csv`, or `auto` to see which one it is.
        camera: `auto`, `none`, or a regular expression whose group is the camera.
        junk: Identities that are left out.

    Raises:
        ValueError: If the layout is not clear, or there are no images in it.
    """
    if os.path.isfile(path):
        if layout not in ("auto", "csv"):
            raise ValueError(f"{path!r} is a file, but data.folder.layout {layout} needs a folder")
        found = _read_table(path)
    elif not os.path.isdir(path):
        raise ValueError(f"there is no folder {path!r}; data.folder.path is relative to data.root")
    else:
        found = _read_folder(path, layout)
    unwanted = {_number(name) for name in junk}
    kept = [image for image in found.images if _number(image.identity) not in unwanted]
    if len(kept) < len(found.images):
        found.left_out["of junk identities"] = len(found.images) - len(kept)
    found.images = sorted(
        _with_cameras(path, kept, camera, found.left_out), key=lambda image: natural_order(image.path)
    )
    if not found.images:
        raise ValueError(f"no images found in {path!r}{left_out_words(found.left_out)}")
    return found


def _read_folder(path: str, layout: str) -> FoundImages:
    folders = single_folders(path, _NO_PEOPLE)
    tables, others = _tables(folders) if layout in ("auto", "csv") else ([], [])
    if len(tables) > 1:
        raise ValueError(
            f"{path!r} has {len(tables)} CSV files with columns for path and identity, "
            f"{', '.join(map(os.path.basename, tables))}: name one with data.folder.path, or set data.folder.layout"
        )
    if tables:
        return _read_table(tables[0])
    if layout == "csv":
        columns = " and ".join(f"{name} ({', '.join(_COLUMNS[name])})" for name in ("path", "identity"))
        raise ValueError(f"{path!r} has no CSV file with a column for {columns}")
    found = _read_files(folders[-1], layout)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        found.layout += f" (no columns for path and identity in {os.path.basename(others[0])}{more})"
    return found


def left_out_words(left_out: Counter[str]) -> str:
    """The files that are left out, with the reasons; empty if there are none."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
    return f"; files left out: {reasons}" if reasons else ""


def _number(identity: str) -> str:
    """An identity, without leading zeros if it is a number."""
    return re.sub(r"^(-?)0+(?=\d+$)", r"\1", identity)


def _read_files(folder: str, layout: str) -> FoundImages:
    left_out: Counter[str] = Counter()
    files = []
    for parts in files_below(folder, left_out):
        if any(part.startswith(".") for part in parts):
            left_out["hidden"] += 1
        elif not is_image(parts[-1]):
            left_out[f"that are no images ({os.path.splitext(parts[-1])[1] or 'no ending'})"] += 1
        else:
            files.append(parts)
    splits = _split_folders(folder)
    split_of = {name: split for split, name in splits.items()}
    inside: list[tuple[str, str, tuple[str, ...]]] = []
    for parts in files:
        if not splits:
            inside.append((os.path.join(folder, *parts), "", parts))
        elif parts[0] in split_of and len(parts) > 1:
            inside.append((os.path.join(folder, *parts), split_of[parts[0]], parts[1:]))
        else:
            left_out[f"outside {', '.join(splits.values())}"] += 1
    auto = layout == "auto"
    if auto:
        layout = _layout_of(folder, [parts for *_, parts in inside])
    if layout == "people":
        _check_people(folder, {parts[0] for *_, parts in inside if len(parts) > 1}, splits, auto)
    words = _WORDS[layout] + (f" in {', '.join(splits.values())}" if splits else "")
    found = FoundImages(words, left_out=left_out)
    for path, split, parts in inside:
        if layout == "people" and len(parts) > 1:
            found.images.append(FolderImage(path, parts[0], split=split, name="/".join(parts[1:])))
        elif layout == "people":
            left_out["in no person's folder"] += 1
        elif match := _IDENTITY.fullmatch(os.path.splitext(parts[-1])[0]):
            found.images.append(FolderImage(path, match[1], split=split, name=match[2]))
        else:
            left_out["without an identity in the name"] += 1
    return found


def _split_folders(folder: str) -> dict[str, str]:
    """The sub-folders that are splits; empty unless there are at least two, one of them for testing."""
    names = {entry.name.lower(): entry.name for entry in os.scandir(folder) if entry.is_dir()}
    found: dict[str, str] = {}
    for split, known in _SPLITS.items():
        present = [names[name] for name in known if name in names]
        if present:
            found[split] = present[0]
    return found if "gallery" in found and len(found) > 1 else {}


def _check_people(folder: str, people: Collection[str], splits: Mapping[str, str], auto: bool) -> None:
    """Refuses parts of a split, and cameras, in place of people, who may have such names in a layout asked for."""
    if auto and people and all(map(_CAMERA.fullmatch, people)):
        raise ValueError(
            f"{folder!r} has the folders {', '.join(sorted(people)[:3])}, which are named as cameras are: set "
            "data.folder.layout to people (a folder for each person) or market (the identity is what stands before the "
            "first _ in a file's name), or use a CSV file"
        )
    parts = {name.lower(): name for name in people if name.lower() in _NO_PEOPLE}
    if parts and splits and (auto or len(parts) == len(people)):
        raise ValueError(
            f"{folder!r} has {', '.join(sorted(parts.values()))} within {', '.join(splits.values())}: put the folders "
            "train, query and gallery beside each other; if they are people's names, set data.folder.layout people"
        )
    if parts and (auto or len(parts) == len(people)):
        present = {split for split, names in _SPLITS.items() if parts.keys() & set(names)}
        missing = next(split for split in ("gallery", "query", "train") if split not in present)
        raise ValueError(
            f"{folder!r} with {', '.join(sorted(parts.values()))} has no {missing} images: put them into a folder "
            f"{missing}, or don't split it at all; if they are people's names, set data.folder.layout people"
        )


def _layout_of(folder: str, files: Sequence[tuple[str, ...]]) -> str:
    direct = [parts[0] for parts in files if len(parts) == 1]
    if not direct or len(direct) * 10 < len(files):  # some that lie beside the people's folders
        return "people"
    named = [name for name in direct if (match := _IDENTITY.fullmatch(name)) and _CAMERA.search(match[2])]
    if len(direct) == len(files) and len(named) * 2 > len(files):
        return "market"
    example = next((name for name in direct if name not in named), direct[0])
    raise ValueError(
        f"{folder!r} has {len(direct)} images directly in it, such as {example!r}, of which {len(named)} have names as "
        f"0001_c1_01.jpg, and {len(files) - len(direct)} in sub-folders: set data.folder.layout to market (the "
        "identity is what stands before the first _) or people (a folder for each person), or use a CSV file"
    )


def _with_cameras(
    folder: str, images: Sequence[FolderImage], pattern: str, left_out: Counter[str]
) -> Iterator[FolderImage]:
    """Finds the camera in the name of each image that has none, and leaves out those that a pattern does not match."""
    if pattern == "none":
        yield from (replace(image, camera=None) for image in images)
        return
    search = _CAMERA if pattern == "auto" else re.compile(pattern)
    # A CSV file may name the cameras in another way than the files' names.
    in_table = pattern == "auto" and any(image.camera for image in images)
    matches = [None if in_table else search.search(image.name) for image in images]
    cameras = [image.camera or (match and match[1]) for image, match in zip(images, matches)]
    without = [image.path for image, camera in zip(images, cameras) if not camera]
    if pattern == "auto" and 0 < len(without) < len(images):
        raise ValueError(
            f"{folder!r}: {len(without)} of {len(images)} images have no camera in "
            f"{'the CSV file' if in_table else 'their name'}, such as {without[0]!r}: "
            "set data.folder.camera to a regular expression with the camera as group, such as 'c(\\d+)', to leave out "
            "the files that it does not match, or to none if no camera is known"
        )
    for image, camera in zip(images, cameras):
        if camera or pattern == "auto":
            yield replace(image, camera=camera and _number(camera))
        else:
            left_out["that data.folder.camera does not match"] += 1


def _tables(folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """The CSV files in the folders that have the columns, and those that don't."""
    entries = [entry for folder in folders for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)]
    files = [e.path for e in entries if e.name.lower().endswith(".csv") and e.name[0] != "." and e.is_file()]
    tables = [file for file in files if {"path", "identity"} <= _columns(file).keys()]
    return tables, [file for file in files if file not in tables]


def _columns(file: str) -> dict[str, str]:
    """What the columns of a CSV file are called, by what they hold."""
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        header = stream.readline(_LONGEST_HEADER)
        names = next(csv.reader([header], delimiter=_delimiter(header)), [])
    lower = {name.strip().lower(): name for name in names}
    return {what: lower[name] for what, known in _COLUMNS.items() for name in known[::-1] if name in lower}


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _read_table(file: str) -> FoundImages:
    columns = _columns(file)
    if missing := [name for name in ("path", "identity") if name not in columns]:
        raise ValueError(f"{file!r} has no column for {missing[0]}: {' or '.join(_COLUMNS[missing[0]])}")
    chosen = ", ".join(f"{what} in {name.strip()}" for what, name in columns.items() if name.strip().lower() != what)
    found = FoundImages(f"the CSV file {os.path.basename(file)}" + (f" ({chosen})" if chosen else ""))
    splits = {name: split for split, names in _SPLITS.items() for name in (*names, split)}
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        header = stream.readline()
        stream.seek(0)
        reader = csv.DictReader(stream, delimiter=_delimiter(header), strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:  # such as a quote without its pair, which would take all rows up to the next one
            raise ValueError(f"{file!r} can't be read after row {reader.line_num}: {error}") from error
        for line, row in rows:
            cells = {what: (row[name] or "").strip() for what, name in columns.items()}
            split = splits.get(cells.get("split", "").lower(), "")
            if not cells["path"] or not cells["identity"]:
                found.left_out["in rows without path or identity"] += 1
            elif not is_image(cells["path"]):
                found.left_out[f"that are no images ({os.path.splitext(cells['path'])[1] or 'no ending'})"] += 1
            elif "split" in columns and not split:
                raise ValueError(
                    f"{file!r}, row {line}: a split must be train, query or gallery, got {cells['split']!r}"
                )
            else:
                path = os.path.join(os.path.dirname(file), cells["path"])
                camera, name = cells.get("camera") or None, os.path.basename(path)
                found.images.append(FolderImage(path, cells["identity"], camera, split, name))
    return found
