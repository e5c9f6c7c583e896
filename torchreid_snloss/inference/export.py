"""The command line `torchreid-snloss-export`: a trained model as ONNX, checked on real images."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from torchreid_snloss.cli import add_config_arguments, command_parser
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine.extraction import extract_batch, first_files, lengths
from torchreid_snloss.errors import ExportError, text_of
from torchreid_snloss.inference.features import description_of
from torchreid_snloss.inference.images import image_loader, list_images
from torchreid_snloss.inference.trained import check_output, load_trained_model, settings_for_test, write_output
from torchreid_snloss.loading import load_data
from torchreid_snloss.run.entry import run_command
from torchreid_snloss.run.screen import Screen
from torchreid_snloss.settings import Settings

__all__ = ["TestGraph", "export_onnx", "main"]

_PROGRAM = "torchreid-snloss-export"
_DESCRIPTION = """Export a trained model to ONNX with what its test does to features: the mean with the mirror image if
test.flip is set, and length 1 if the test normalises. The file is checked against torch on real images before it is
written, and holds image size, mean and standard deviation as metadata. The weights are those of model.load_weights or
model.resume. It needs onnx and onnxruntime: pip install 'torchreid-snloss[onnx]'."""
_OPSET = 17  # that of onnxruntime 1.13 and later
_CHECKED = 8  # images
_TOLERANCE = 1e-3  # of the length of a feature
_LONGEST = 500  # characters of an error of torch's or onnxruntime's


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        the exit code, as of `torchreid_snloss.cli.main`; 1 if the model can't be exported or computes something else.
    """
    return run_command(_PROGRAM, lambda: _parser().parse_args(argv), _export, ends_process=argv is None)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(_PROGRAM, _DESCRIPTION)
    parser.add_argument("--output", default="model.onnx", metavar="FILE", help="the file; default: model.onnx")
    parser.add_argument(
        "--batch", type=_batch, metavar="N", help="the number of images in a batch; default: any number"
    )
    parser.add_argument(
        "--images",
        metavar="PATH",
        help=f"a folder, a text file with a path on each line, or an image: {_CHECKED} of these images are for the "
        "check. Without it, query images of data.targets",
    )
    add_config_arguments(parser)
    return parser


def _batch(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"must be from 1 to 65536, got {text!r}")
    return int(text)


def _export(args: argparse.Namespace) -> int:
    for name in ("onnx", "onnxruntime"):
        _import(name)
    settings = settings_for_test(args, use_gpu=False)
    if settings.data_type == "video":
        raise ConfigError("only models of images can be exported, and data.type is video")
    check_output(args.output, ".onnx")
    with contextlib.redirect_stdout(cast(TextIO, Screen(sys.stdout))):
        images = _images(settings, args.images)
        model, checkpoint = load_trained_model(settings)
        onnx_bytes, difference = export_onnx(settings, model, images, args.batch, checkpoint)
        write_output(args.output, lambda stream: stream.write(onnx_bytes))
    images_at_a_time = {None: "any number of images", 1: "one image at a time"}.get(args.batch, f"{args.batch} images")
    print(
        f'=> "{args.output}" takes {images_at_a_time}, {settings.height} pixels high and {settings.width} wide; on '
        f"{len(images)} images its features differ from torch's by at most {difference:.0e} of their length"
    )
    return 0


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the export needs {name}, which can't be imported ({text_of(error)}): pip install 'torchreid-snloss[onnx]'"
        ) from error


def _images(settings: Settings, place: str | None) -> Tensor:
    """Some of the images, spread over all of them: (images, 3, height, width)."""
    if place:
        paths = list_images(place)
    else:
        try:
            test_sets = load_data(settings).test_loader.values()
        except ConfigError as error:
            raise ConfigError(f"{error}; name images for the check by --images") from error
        paths = [path for splits in test_sets for path in first_files(splits["query"])]
    number = min(len(paths), _CHECKED)
    chosen = [paths[index * len(paths) // number] for index in range(number)]
    dataset = image_loader(settings, chosen).dataset
    batch: Tensor = default_collate([dataset[index]["img"] for index in range(number)])
    return batch


class TestGraph(nn.Module):
    """A model with what its test does to features.

    Args:
        model: the model, in evaluation mode.
        flip: whether the feature is the mean over the image and its mirror image.
        normalize: whether features get length 1.
    """

    __test__ = False  # no class of tests for pytest

    def __init__(self, model: nn.Module, flip: bool, normalize: bool) -> None:
        super().__init__()
        self.model, self.flip, self.normalize = model, flip, normalize

    def forward(self, images: Tensor) -> Tensor:
        features = extract_batch(self.model, images, self.flip)
        return features / lengths(features) if self.normalize else features


@torch.no_grad()
def export_onnx(
    settings: Settings, model: nn.Module, images: Tensor, batch: int | None = None, checkpoint: Path | str = ""
) -> tuple[bytes, float]:
    """Exports a model to ONNX, with `images` as input and `features` as output, and compares it with torch.

    Args:
        settings: the settings of its test, which also become the metadata.
        model: the model, in evaluation mode, on the CPU.
        images: (images, 3, height, width), at least one, to compare on.
        batch: how many images the exported model takes at a time; None: any number.
        checkpoint: the model's, for the metadata; empty for pretrained weights.

    Returns:
        the file's content, and the largest difference of a feature relative to its length.

    Raises:
        ExportError: if torch can't export the model, onnxruntime can't run it, or the features differ.
    """
    graph = TestGraph(model, settings.flip, settings.normalize_feature).eval()
    name = settings.model_name
    hint = " for batches of any size (--batch 1 exports for one image)" if batch is None else ""
    with _named_errors(f"torch can't export {name} to ONNX{hint}"):
        content = _onnx_bytes(graph, torch.zeros(batch or 2, *images.shape[1:]), batch is None)
    expected = graph(images)
    onnx = importlib.import_module("onnx")
    with _named_errors(f"onnx rejects the model of {name}"):
        proto = onnx.load_model_from_string(content)
        about = {**description_of(settings, checkpoint), "feature_dim": expected.shape[1], "input": _INPUT}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        onnx.helper.set_model_props(proto, texts)
        onnx.checker.check_model(proto)
        content = proto.SerializeToString()
    with _named_errors(f"onnxruntime can't run the model of {name}"):
        features = _run(content, images, batch)
    difference = float(((features - expected).norm(dim=1) / lengths(expected)[:, 0]).max())
    if not difference <= _TOLERANCE:  # NaN, too
        raise ExportError(
            f"{name} as ONNX computes other features than torch: the largest difference is {difference:.1e} of a "
            f"feature's length, and may be {_TOLERANCE:.0e}"
        )
    return content, difference


_INPUT = "images: (batch, 3, height, width), float32, RGB: (pixel / 255 - mean) / std, resized by Pillow, bilinear"


def _onnx_bytes(graph: nn.Module, example: Tensor, any_batch: bool) -> bytes:
    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"], "opset_version": _OPSET}
    if any_batch:
        options["dynamic_axes"] = {"images": {0: "batch"}, "features": {0: "batch"}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # from torch 2.5 on; it needs onnxscript
        options["dynamo"] = False
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, whose constants the check on images is for
        path = Path(folder, "model.onnx")
        torch.onnx.export(graph, (example,), str(path), **options)
        return path.read_bytes()


def _run(content: bytes, images: Tensor, batch: int | None) -> Tensor:
    """The features by onnxruntime. If any batch is possible, the first image is on its own."""
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    rows = []
    starts = range(0, len(images), batch) if batch else [0, 1]
    for start, end in itertools.pairwise([*starts, len(images)]):
        part = images[start:end]
        if len(part):
            padding = part[-1:].expand((batch or len(part)) - len(part), -1, -1, -1)
            (features,) = session.run(None, {"images": torch.cat([part, padding]).numpy()})
            rows.append(torch.from_numpy(features[: len(part)]))
    return torch.cat(rows)


@contextlib.contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Within it any error becomes an `ExportError`; torch, onnx and onnxruntime have dozens of classes."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"{what}: {text_of(error, _LONGEST)}") from error


if __name__ == "__main__":
    raise SystemExit(main())
