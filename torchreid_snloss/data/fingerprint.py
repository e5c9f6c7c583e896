"""What a checkpoint keeps of the training images, so that it is resumed on the same ones under the same labels."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, RandomSampler

from torchreid_snloss import distributed
from torchreid_snloss.data.items import files_of, training_items

__all__ = ["OUTLIERS", "check_same_on_all_ranks", "describe_batches", "difference", "fingerprint", "relative_names"]

OUTLIERS = "outliers"
"""The folder of patches in place of images, which lies elsewhere than the images."""


def relative_names(items: Sequence[Any]) -> list[tuple[str, ...]]:
    """The names of the images of each item, relative to the folder that holds those of its data set.

    They are the same wherever the data set lies, and have slashes on every system.
    """
    paths = [files_of(item) for item in items]
    folders: dict[Any, set[str]] = defaultdict(set)
    for item, frames in zip(items, paths):
        folders[_dataset(item)].update(map(os.path.dirname, frames))
    roots = {dataset: _root(of_it) for dataset, of_it in folders.items()}
    return [tuple(_relative(path, roots[_dataset(item)]) for path in frames) for item, frames in zip(items, paths)]


def _dataset(item: Any) -> Any:
    return item[3] if len(item) > 3 else 0


def _root(folders: set[str]) -> str:
    images = [folder for folder in folders if os.path.basename(folder) != OUTLIERS]
    try:
        return os.path.commonpath(images)
    except ValueError:  # there are none, or they have nothing in common
        return ""


def _relative(path: str, root: str) -> str:
    folder, name = os.path.split(path)
    if os.path.basename(folder) == OUTLIERS:
        return f"{OUTLIERS}/{name}"
    if root:
        path = path[len(root) :].lstrip(os.sep) if path.startswith(root) else os.path.relpath(path, root)
    return path.replace(os.sep, "/")


def fingerprint(items: Sequence[Any]) -> dict[str, Any]:
    """A short description of training items: which images they are, under which labels and cameras, in which order.

    Args:
        items: `(path of the image or paths of the tracklet, label, camera, data set)`.

    Returns:
        `images`: how many items; `labels`: each label with a digest of its items; `order`: a digest of their order.
    """
    of_label: dict[int, list[str]] = defaultdict(list)
    order = hashlib.blake2b(digest_size=8)
    for item, names in zip(items, relative_names(items)):
        line = "\t".join([str(_dataset(item)), str(item[2]), *sorted(names)])
        of_label[int(item[1])].append(line)
        order.update(f"{line}\n".encode(errors="surrogateescape"))
    return {
        "images": len(items),
        "labels": {label: _digest(lines) for label, lines in sorted(of_label.items())},
        "order": order.hexdigest(),
    }


def _digest(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(sorted(lines)).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def describe_batches(loader: Any, batch_size: int, sampler: Any) -> dict[str, Any]:
    """What the batches of an epoch follow from, next to the seed: the training images and how they are drawn.

    Args:
        loader: A training loader. If its data set has no list `train` as torchreid's, `images` is None.
        batch_size: Images in a batch of all processes.
        sampler: The sampler of these batches.
    """
    items = training_items(loader.dataset)
    images = None if items is None else fingerprint(items)
    drawn: dict[str, Any] = {"batch_size": batch_size, "sampler": type(sampler).__name__}
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        # torch's loader draws a number of its own before the sampler's seed.
        drawn["drawn_by"] = (
            "torch" if type(loader) is DataLoader and not hasattr(loader.batch_sampler, "draw") else "here"
        )
    if (instances := getattr(sampler, "num_instances", None)) is not None:
        drawn["num_instances"] = instances
    return {"images": images, **drawn}


def check_same_on_all_ranks(loader: Any) -> None:
    """Checks that all processes, which draw batches by their numbers, have the same training items in the same order.

    Raises:
        ValueError: If they do not, on all processes.
    """
    items = describe_batches(loader, 0, None)["images"]
    found = distributed.broadcast_object(distributed.gather_objects(items))
    for rank, other in enumerate(found):
        if other != found[0]:
            what = other and found[0] and difference(found[0], other, ("on rank 0", f"on rank {rank}"))
            raise ValueError(
                f"all processes must have the same training images and labels in the same order, but rank {rank} has "
                f"others than rank 0: {what or 'another order'}"
            )


def difference(before: Any, now: Any, names: tuple[str, str] = ("in the checkpoint", "in this run")) -> str:
    """What differs between two fingerprints, in words; empty if only the order does.

    Args:
        before: That of a checkpoint.
        now: That of a run.
        names: What they are called.
    """
    then, labels = before["labels"], now["labels"]
    if then == labels:
        return ""
    if sorted(then.values()) == sorted(labels.values()):
        moved = sum(labels.get(label) != digest for label, digest in then.items())
        return f"the same {now['images']} images, but {moved} of {len(labels)} identities have other labels"
    both = set(then.values()) & set(labels.values())
    return (
        f"{before['images']} images of {len(then)} identities {names[0]}, {now['images']} of {len(labels)} {names[1]}, "
        f"and {len(both)} identities have the same images from the same cameras"
    )
