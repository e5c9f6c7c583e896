"""Loaders whose batches travel as uint8 and are transformed as a whole, on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from torchreid_snloss import device
from torchreid_snloss.data.batch_transforms import Resize, Step, batched
from torchreid_snloss.data.box_transforms import Patch
from torchreid_snloss.data.decoded import DECODED, DecodedDataset, collate
from torchreid_snloss.data.draws import Draws, image_keys

__all__ = ["BatchLoader", "loader_like", "use_batch_transforms"]


def use_batch_transforms(datamanager: Any, seed: int, use_gpu: bool) -> None:
    """Replaces the training and test loaders of a data manager by some that transform whole batches on the device.

    Their batches are as before, but for the device of `img`. The training loader's workers live through all epochs.
    The loader of unlabelled target images, `train_loader_t`, stays as it is.

    Args:
        datamanager: a data manager of torchreid.
        seed: the seed of the random transforms, which the training loop sets again at each epoch.
        use_gpu: whether to transform the batches on the GPU.

    Raises:
        ValueError: for a transform that can't be done on a batch, which is named, and for a loader that makes its
            batches in another way than torchreid's.
    """
    datamanager.train_loader = _batch_loader(datamanager.train_loader, seed, use_gpu, trains=True)
    for split in datamanager.test_loader.values():
        for name, loader in split.items():
            split[name] = _batch_loader(loader, seed, use_gpu, trains=False)


def _batch_loader(loader: Any, seed: int, use_gpu: bool, trains: bool) -> BatchLoader:
    if isinstance(loader, BatchLoader):
        raise ValueError("data.batch_transforms: the data manager has batch transforms already")
    if loader.batch_size is None or loader.collate_fn is not default_collate:
        what = "a batch_sampler" if loader.batch_size is None else f"the collate_fn {loader.collate_fn!r}"
        raise ValueError(f"data.batch_transforms needs loaders as torchreid makes them, but one has {what}; use False")
    for_each, resize, rest = batched(loader.dataset.transform)
    options = {
        **_options(loader),
        "collate_fn": collate,
        "persistent_workers": trains and loader.num_workers > 0,
        # Workers that live on draw their seed once in a run, which must not change the other random numbers.
        "generator": torch.Generator(),
    }
    return BatchLoader(
        DecodedDataset(loader.dataset, for_each, resize.of_large, seed),
        BatchTransforms(resize, rest, use_gpu),
        trains=trains,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        **options,
    )


def _options(loader: Any) -> dict[str, Any]:
    """The options of a loader, but for those that say what a batch holds."""
    names = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "timeout", "persistent_workers", "generator")
    return {name: getattr(loader, name) for name in (*names, "prefetch_factor", "multiprocessing_context")}


class BatchTransforms:
    """The steps of a data set's transform, for batches.

    Args:
        resize: the first step.
        steps: the others.
        use_gpu: whether to do them on the GPU.
    """

    def __init__(self, resize: Resize, steps: Sequence[Step], use_gpu: bool) -> None:
        self._resize, self._steps, self._use_gpu = resize, steps, use_gpu

    def start_epoch(self) -> None:
        """Forgets what the steps remember of earlier batches."""
        for step in self._steps:
            if isinstance(step, Patch):
                step.start_epoch()

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], seed: int, epoch: int) -> dict[str, Any]:
        """Transforms the images of a batch from `collate`.

        Args:
            batch: the batch.
            seed: the seed of the run.
            epoch: the epoch.

        Returns:
            the batch as torchreid's loaders have it, with `img` on the device: (batch, 3, height, width) for images,
            (batch, frames, 3, height, width) for tracklets.
        """
        batch = dict(batch)
        decoded = batch.pop(DECODED)
        sizes, shape = decoded["sizes"], decoded["shape"]
        frames = len(sizes) // shape[0]
        index, earlier = (np.repeat(decoded[key], frames) for key in ("index", "copy"))
        draws = Draws(image_keys(seed, epoch, index, earlier, np.tile(np.arange(frames), shape[0])))
        images = self._resize.of_sizes(device.to_device(decoded["pixels"], self._use_gpu), sizes)
        for number, step in enumerate(self._steps):
            images = step(images, draws.of(str(number)))  # a transform may be there twice
        return {"img": images.view(*shape, *images.shape[1:]), **batch}


class BatchLoader(DataLoader[dict[str, Any]]):
    """A loader whose batches are transformed as a whole, on the device, when they are taken.

    Args:
        dataset: the data set.
        transforms: what is done to a batch.
        trains: whether each pass is an epoch of its own; test images, and frames of tracklets, stay the same.
        **options: the options of torch's `DataLoader`.
    """

    dataset: DecodedDataset

    def __init__(self, dataset: DecodedDataset, transforms: BatchTransforms, *, trains: bool, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.transforms, self.trains = transforms, trains
        self._epoch_is_set = True

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Sets what the random numbers of the next pass follow from; without it, a training pass is another epoch."""
        self.dataset.start_epoch(seed, epoch)
        self._epoch_is_set = True

    def end_workers(self) -> None:
        """Ends persistent workers; the next pass starts others.

        Left to themselves, they end with the process, where torch may wait five seconds for each if memory is pinned.
        """
        running: Any = self._iterator
        if running is not None:
            running._shutdown_workers()  # an error's traceback may keep it from being collected
            self._iterator = None

    def __iter__(self) -> Any:
        seed, epoch = self.dataset.epoch
        if self.trains and not self._epoch_is_set:
            epoch += 1
            self.dataset.start_epoch(seed, epoch)
        self._epoch_is_set = False
        self.transforms.start_epoch()
        return _Transformed(super().__iter__(), self.transforms, seed, epoch)


class _Transformed:
    """The transformed batches of an iterator of torch's; all other attributes are those of the iterator."""

    def __init__(self, batches: Any, transforms: BatchTransforms, seed: int, epoch: int) -> None:
        self._batches, self._transforms, self._of = batches, transforms, (seed, epoch)

    def __iter__(self) -> _Transformed:
        return self

    def __next__(self) -> dict[str, Any]:
        return self._transforms(next(self._batches), *self._of)

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def loader_like(loader: Any, dataset: Any, **options: Any) -> Any:
    """A loader of the same kind as another, and with its options.

    Args:
        loader: torch's `DataLoader`, or a `BatchLoader`, whose transforms are used.
        dataset: what to load.
        **options: the options of the `DataLoader` that say what a batch holds.
    """
    options = {**_options(loader), **options}
    if isinstance(loader, BatchLoader):
        return BatchLoader(dataset, loader.transforms, trains=loader.trains, **options)
    return DataLoader(dataset, **options)
