"""Loads the data of a run's settings: torchreid's data manager, with the training set and the loaders of the config."""

from __future__ import annotations

import os
from typing import Any

from torchreid import data

from torchreid_snloss.config import ConfigError
from torchreid_snloss.data import (
    FolderOptions,
    UnreadableImageError,
    add_label_noise,
    add_outliers,
    check_labels,
    explain,
    folder_options,
    for_test_run,
    hold_out,
    keep_fraction,
    left_out_images,
    name_unreadable_images,
    set_training_items,
    stable_order,
    test_run,
    unknown_dataset,
    use_batch_transforms,
)
from torchreid_snloss.data.cache import CacheError, cache_images
from torchreid_snloss.data.fingerprint import OUTLIERS
from torchreid_snloss.data.readable import all_loaders, test_loaders
from torchreid_snloss.register import register
from torchreid_snloss.settings import Settings, imagedata_kwargs, sampler_kwargs, videodata_kwargs

__all__ = ["load_data", "register_for_run", "share_decoded"]


def register_for_run() -> None:
    """`register()` for a run.

    Raises:
        ConfigError: If a script has taken a name of this package.
    """
    try:
        register()
    except RuntimeError as error:
        raise ConfigError(str(error)) from error


def load_data(settings: Settings) -> Any:
    """Builds the data manager without checking it; each process runs the check itself."""
    register_for_run()
    for note in settings.notes:
        print(note)
    for key, names in (("data.sources", settings.sources), ("data.targets", settings.targets)):
        if not (settings.evaluate and key == "data.sources") and (
            problem := unknown_dataset(key, names, settings.data_type)
        ):
            raise ConfigError(problem)
    image = settings.data_type == "image"
    where = f"data.sources {list(settings.sources)}, data.targets {list(settings.targets)}, data.root {settings.root!r}"
    keywords = imagedata_kwargs(settings) if image else videodata_kwargs(settings)
    if settings.evaluate:
        keywords = for_test_run(keywords)
    try:
        with folder_options(FolderOptions.from_config(settings.values)), test_run(settings.evaluate) as no_training:
            datamanager = (data.ImageDataManager if image else data.VideoDataManager)(**keywords)
        if no_training or keywords["sources"] != list(settings.sources):
            unused = ", ".join(no_training or settings.sources)
            print(f"=> the training images of {unused} are not loaded: a test does not need them")
            datamanager.sources, datamanager._num_train_pids = list(settings.sources), 0
        for line in left_out_images(datamanager):
            print(line)
        if not settings.evaluate:
            check_labels(datamanager)
            _change_training_set(settings, datamanager)
        name_unreadable_images(datamanager)
        if settings.values["data.batch_transforms"]:
            use_batch_transforms(datamanager, settings.seed, settings.use_gpu)
        return datamanager
    except (ConfigError, UnreadableImageError):
        raise
    except OSError as error:
        raise ConfigError(
            f"the data is not there, and can't be downloaded or made ({where}): {explain(error)}"
        ) from error
    except (Exception, SystemExit) as error:  # a data set may be a user's own code
        raise ConfigError(f"can't load the data ({where}): {explain(error)}") from error


def share_decoded(settings: Settings, datamanager: Any) -> None:
    """Decodes all images into shared memory, if `data.cache` says so. All processes call it together."""
    if settings.values["data.cache"] != "off":
        loaders = (test_loaders if settings.evaluate else all_loaders)(datamanager)
        try:
            cache_images(loaders, settings.values["data.workers"])
        except CacheError as error:
            raise ConfigError(str(error)) from error


def _change_training_set(settings: Settings, datamanager: Any) -> None:
    """A stable order first, which all that is drawn relies on.

    Then fewer identities and those held out, so that what they choose by has right labels and whole images.
    """
    seed, options = settings.seed, sampler_kwargs(settings)
    set_training_items(datamanager, stable_order(datamanager.train_loader.dataset.train), **options)
    if settings.train_fraction < 1:
        kept = keep_fraction(datamanager.train_loader.dataset.train, settings.train_fraction, seed)
        set_training_items(datamanager, kept, **options)
    if settings.val_fraction > 0:
        hold_out(datamanager, settings.val_fraction, seed, settings.held_out_only, settings.val_fold, **options)
    items = datamanager.train_loader.dataset.train
    if settings.label_noise > 0:
        items = add_label_noise(items, settings.label_noise, seed)
    if settings.outliers > 0:
        try:
            items = add_outliers(items, settings.outliers, seed, os.path.join(settings.save_dir, OUTLIERS))
        except UnreadableImageError:
            raise
        except OSError as error:
            raise ConfigError(f"data.save_dir {settings.save_dir!r} can't be written to: {error}") from error
    if settings.label_noise > 0 or settings.outliers > 0:
        set_training_items(datamanager, items, **options)
