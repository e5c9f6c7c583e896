"""The command line `torchreid-snloss-features`: features of images, or of a test set, in a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torchreid import utils as reid_utils

from torchreid_snloss.cli import add_config_arguments, command_parser
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine.extraction import SplitFeatures, extract, normalized
from torchreid_snloss.engine.testing import same_draws
from torchreid_snloss.inference.images import image_loader, list_images
from torchreid_snloss.inference.trained import (
    TestModel,
    check_output,
    load_trained_model,
    settings_for_test,
    write_output,
)
from torchreid_snloss.loading import load_data
from torchreid_snloss.run.entry import run_command
from torchreid_snloss.run.screen import Screen
from torchreid_snloss.settings import Settings

__all__ = ["description_of", "main"]

_PROGRAM = "torchreid-snloss-features"
_DESCRIPTION = """Extract features with a trained model, as its test does, and write them to a file: of the images that
--images names, or of the query and gallery images of data.targets. The weights are those of model.load_weights or
model.resume. The file is for numpy.load: features, paths, for a data set also pids, camids, splits and datasets; and
about, a text in JSON."""
_KEYS = ("model.name", "data.height", "data.width", "data.norm_mean",
         "data.norm_std", "test.flip", "test.normalize_feature", "test.dist_metric")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        the exit code, as of `torchreid_snloss.cli.main`.
    """
    return run_command(_PROGRAM, lambda: _parser().parse_args(argv), _write_features, ends_process=argv is None)


def description_of(settings: Settings, checkpoint: Path | str) -> dict[str, Any]:
    """What a program must know of a model to use it or its features: values of config keys, and the version."""
    from torchreid_snloss import __version__

    values = {key: settings.values[key] for key in _KEYS}
    return {"torchreid-snloss": __version__, "model.load_weights": str(checkpoint), **values}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(_PROGRAM, _DESCRIPTION)
    parser.add_argument(
        "--images",
        metavar="PATH",
        help="a folder of images, with its sub-folders; a text file with a path on each line, relative to the file; or "
        "an image. Without it, the test sets",
    )
    parser.add_argument("--output", default="features.npz", metavar="FILE", help="the file; default: features.npz")
    add_config_arguments(parser)
    return parser


def _write_features(args: argparse.Namespace) -> int:
    settings = settings_for_test(args)
    if args.images and settings.data_type == "video":
        raise ConfigError("--images takes images, and data.type is video: leave --images out for the test sets")
    check_output(args.output, ".npz")
    with contextlib.redirect_stdout(cast(TextIO, Screen(sys.stdout))):
        reid_utils.set_random_seed(settings.seed)  # by which some of torchreid's data sets are split
        if args.images:
            loaders = {("", "images"): image_loader(settings, list_images(args.images))}
        else:
            splits = load_data(settings).test_loader.items()
            loaders = {(name, split): loader for name, both in splits for split, loader in both.items()}
        network, checkpoint = load_trained_model(settings)
        model = TestModel(settings, network)
        found = {key: _extract(settings, model, loader, *key) for key, loader in loaders.items()}
        arrays = _arrays(found, known=not args.images)
        arrays["about"] = np.array(json.dumps(description_of(settings, checkpoint)))
        write_output(args.output, lambda stream: np.savez(stream, **arrays))  # type: ignore[arg-type]
    number, dimension = arrays["features"].shape
    length = "of length 1" if settings.normalize_feature else "not normalised"
    print(f'=> {number:,} features of {dimension:,} numbers, {length}, are in "{args.output}"')
    return 0


@torch.no_grad()
def _extract(settings: Settings, model: TestModel, loader: Any, dataset: str, split: str) -> SplitFeatures:
    name = f"{split} images of {dataset}" if dataset else "images"
    with same_draws():  # of a tracklet's frames, as in a test
        found = extract(model, loader, model.features_of, name, lambda: None, f"{split} features")
    return normalized(found) if settings.normalize_feature else found


def _arrays(found: Mapping[tuple[str, str], SplitFeatures], known: bool) -> dict[str, NDArray[Any]]:
    """The arrays of the file, with a row for each image.

    Args:
        found: the features by data set and split.
        known: whether identities and cameras are known.
    """
    parts = list(found.values())
    arrays: dict[str, NDArray[Any]] = {
        "features": torch.cat([part.features for part in parts]).numpy(),
        "paths": np.array([path for part in parts for path in part.paths], dtype=np.str_),
    }
    if known:
        arrays["pids"] = np.concatenate([part.pids for part in parts])
        arrays["camids"] = np.concatenate([part.camids for part in parts])
        sizes = [len(part.paths) for part in parts]
        for column, name in enumerate(("datasets", "splits")):
            arrays[name] = np.repeat([key[column] for key in found], sizes)
    return arrays


if __name__ == "__main__":
    raise SystemExit(main())
