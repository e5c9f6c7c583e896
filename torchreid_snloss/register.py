"""Registers the plugin with torchreid. This is the only module that changes torchreid."""

from __future__ import annotations

import contextlib
import functools
import glob
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torchreid import data, engine, losses, metrics, models, utils

from torchreid_snloss import evaluation, rerank
from torchreid_snloss.backbones import build_timm_model, is_timm, with_own_input
from torchreid_snloss.data import (
    IdentitySampler,
    ImageFolder,
    SyntheticPedestrians,
    SyntheticTracklets,
    glob_in_folder,
    replace_functions,
    search_in_file_name,
    with_checked_items,
    with_distinct_names,
    with_optional_training_folder,
)
from torchreid_snloss.data.items import telling_of_own_reading
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.data.sampler import check_torchreids_sampler
from torchreid_snloss.engine import ENGINES
from torchreid_snloss.losses import LOSSES

__all__ = ["register"]

_IMAGE_DATASETS: dict[str, Any] = vars(data.datasets)["__image_datasets"]
_VIDEO_DATASETS: dict[str, Any] = vars(data.datasets)["__video_datasets"]
_OUR_IMAGE_DATASETS: dict[str, type] = {"synthetic": SyntheticPedestrians, "folder": ImageFolder}


@functools.cache  # caches a successful call only; a call that raised an error can be repeated
def register() -> None:
    """Adds this package's losses, engines, sampler and data sets to torchreid. Calling it again does nothing.

    Afterwards, both in PyPI's layout (`torchreid.reid.*`) and in upstream's (`torchreid.*`):

    - `torchreid.losses` and `torchreid.engine` have the classes, `SNLoss`, `ImageSNEngine` and so on;
    - `torchreid.models.build_model` takes `loss='sn'`, `'hap2s'` and `'fidi'`, and the models `'timm/...'`, for which
      further keywords go to `build_timm_model`;
    - `torchreid.utils.FeatureExtractor` takes `'timm/...'` too, with the model's own image size, mean and standard
      deviation where none are given;
    - data managers take `train_sampler='IdentitySampler'` and the datasets `'synthetic'`, `'synthetic_video'` and
      `'folder'`, which is `torchreid_snloss.data.ImageFolder`;
    - `torchreid.metrics.evaluate_rank` is `torchreid_snloss.evaluation.evaluate_rank` where torchreid has no compiled
      one, and torchreid's where it has; within `capture_rankings()` either notes mINP as well;
    - `torchreid.utils.re_ranking` is `torchreid_snloss.rerank.re_ranking`;
    - torchreid's data sets take any folder name as it is, and do not find wildcards, identities or cameras in it;
    - data sets check their items, so that what can't be trained or tested with raises a ValueError that names it;
    - torchreid's samplers raise a ValueError that says what they lack where they would fail without a reason;
    - torchreid prints a line for a data set whose `__getitem__` it does not call since there are several sources;
    - in this package's test runs data sets need no training images, and torchreid's don't need their training folder;
    - `torchreid.utils.visualize_ranked_results` draws queries whose files have the same name into different pictures;
    - data sets read images by `torchreid_snloss.data.readable.read_image`, which raises an error for a file that
      torchreid would try to read again forever.

    What torchreid had keeps its behaviour otherwise. Evaluation and re-ranking give its results, in less time and
    memory.

    Raises:
        RuntimeError: if torchreid has something else by one of these names.

    Whatever it raises, torchreid is as it was before.
    """
    classes = [(losses, loss) for loss in LOSSES.values()] + [(engine, cls) for cls in ENGINES.values()]
    _check_names_are_free(classes)
    with contextlib.ExitStack() as undo:
        for module, cls in classes:
            _set(undo, module, cls.__name__, cls)
        for name, dataset in _OUR_IMAGE_DATASETS.items():
            _add_dataset(undo, data.register_image_dataset, _IMAGE_DATASETS, name, dataset)
        _add_dataset(undo, data.register_video_dataset, _VIDEO_DATASETS, "synthetic_video", SyntheticTracklets)
        build_model = _with_our_models(models.build_model)
        _set(undo, models, "build_model", build_model)
        extractor = utils.FeatureExtractor
        _set(undo, sys.modules[extractor.__module__], "build_model", build_model)  # imported there by name
        _set(undo, extractor, "__init__", with_own_input(extractor.__init__))
        build_train_sampler = _with_our_sampler(data.sampler.build_train_sampler)
        _set(undo, data.sampler, "build_train_sampler", build_train_sampler)
        _set(undo, data.datamanager, "build_train_sampler", build_train_sampler)  # imported there by name
        compiled = metrics.rank.IS_CYTHON_AVAI
        evaluate_rank = evaluation.capturing(metrics.rank.evaluate_rank) if compiled else evaluation.evaluate_rank
        _set(undo, metrics, "evaluate_rank", evaluate_rank)
        _set(undo, metrics.rank, "evaluate_rank", evaluate_rank)
        tools = sys.modules[utils.read_image.__module__]
        for module in (tools, utils, sys.modules[data.ImageDataset.__module__]):  # imported there by name
            _set(undo, module, "read_image", read_image)
        _set(undo, utils, "re_ranking", rerank.re_ranking)
        _set(undo, sys.modules[engine.Engine.__module__], "re_ranking", rerank.re_ranking)  # by name too
        for module in _torchreids_modules():
            for name, theirs, changed in (
                ("glob", glob, {"glob": glob_in_folder}),
                ("re", re, {"compile": search_in_file_name}),
            ):
                if getattr(module, name, None) is theirs:
                    _set(undo, module, name, replace_functions(theirs, **changed))
        base = data.datasets.dataset.Dataset
        _set(undo, base, "__init__", with_checked_items(base.__init__))
        _set(undo, base, "__add__", telling_of_own_reading(base.__add__))
        _set(undo, base, "check_before_run", with_optional_training_folder(base.check_before_run))
        visualize = with_distinct_names(utils.visualize_ranked_results)
        for module in (utils, sys.modules[engine.Engine.__module__]):  # imported there by name
            _set(undo, module, "visualize_ranked_results", visualize)
        data.sampler.AVAI_SAMPLERS.append(IdentitySampler.__name__)
        undo.pop_all()


def _check_names_are_free(classes: list[tuple[Any, type]]) -> None:
    for module, cls in classes:
        if hasattr(module, cls.__name__):
            raise RuntimeError(f"{module.__name__} has a {cls.__name__} already, this package can't add its own")
    if IdentitySampler.__name__ in data.sampler.AVAI_SAMPLERS:
        raise RuntimeError("torchreid has a sampler named IdentitySampler already, this package can't add its own")
    ours = [*((name, _IMAGE_DATASETS) for name in _OUR_IMAGE_DATASETS), ("synthetic_video", _VIDEO_DATASETS)]
    for name, datasets in ours:
        if name in datasets:
            raise RuntimeError(
                f"torchreid has a data set named {name!r} already, this package can't add its own: register the other "
                "under another name"
            )


def _torchreids_modules() -> list[Any]:
    """The modules of torchreid's own data sets."""
    names = {dataset.__module__ for dataset in (*_IMAGE_DATASETS.values(), *_VIDEO_DATASETS.values())}
    return [sys.modules[name] for name in sorted(names) if name.startswith(f"{data.datasets.__name__}.")]


_NOTHING = object()


def _set(undo: contextlib.ExitStack, module: Any, name: str, value: Any) -> None:
    before = getattr(module, name, _NOTHING)
    setattr(module, name, value)
    undo.callback(*((delattr, module, name) if before is _NOTHING else (setattr, module, name, before)))


def _add_dataset(
    undo: contextlib.ExitStack, add: Callable[[str, Any], None], datasets: dict[str, Any], name: str, dataset: type
) -> None:
    add(name, dataset)
    undo.callback(datasets.pop, name)


def _with_our_models(build_model: Any) -> Any:
    @functools.wraps(build_model)
    def build(name: str, num_classes: int, loss: str = "softmax", *args: Any, **kwargs: Any) -> Any:
        # 'triplet' is what makes torchreid's models return (logits, features) in training.
        builder = build_timm_model if is_timm(name) else build_model
        return builder(name, num_classes, "triplet" if loss in LOSSES else loss, *args, **kwargs)

    return build


def _with_our_sampler(build_train_sampler: Any) -> Any:
    signature = inspect.signature(build_train_sampler)

    @functools.wraps(build_train_sampler)
    def build(data_source: Any, train_sampler: str, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(data_source, train_sampler, *args, **kwargs)
        call.apply_defaults()
        if train_sampler == IdentitySampler.__name__:
            return IdentitySampler(data_source, call.arguments["batch_size"], call.arguments["num_instances"])
        names = ("batch_size", "num_instances", "num_cams", "num_datasets")
        check_torchreids_sampler(data_source, train_sampler, **{name: call.arguments[name] for name in names})
        return build_train_sampler(data_source, train_sampler, *args, **kwargs)

    return build
