"""timm's models as torchreid's: `timm/<name>` in `model.name` and in `torchreid.models.build_model`."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from torchreid_snloss.errors import text_of

__all__ = [
    "InputSettings",
    "TimmModel",
    "build_timm_model",
    "convert_sync_batchnorm",
    "fill_input",
    "input_settings",
    "is_timm",
    "with_own_input",
]

_PREFIX = "timm/"
_LONGEST = 300  # characters of an error of timm's


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """What images a model takes.

    Attributes:
        height: The height in pixels.
        width: The width in pixels.
        norm_mean: What is subtracted from red, green and blue, which lie in [0, 1].
        norm_std: What they are divided by.
        sized: Whether the model is built for one image size, and takes it as `img_size`.
    """

    height: int = 256
    width: int = 128
    norm_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    norm_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    sized: bool = False


def is_timm(name: str) -> bool:
    """Whether a model's name is that of a timm model, `timm/...`."""
    return name.startswith(_PREFIX)


def input_settings(name: str) -> InputSettings:
    """The image size and normalisation that a model was pretrained with.

    Args:
        name: The name of one of torchreid's models, all of which have the same, or `timm/<name>`. The name may have a
            tag, as `vit_tiny_patch16_224.augreg_in21k`, or be a source: `local-dir:<folder>`, `hf-hub:<repository>`.

    Raises:
        ValueError: If timm is not installed, or does not know the name.
    """
    return _timm_settings(name) if is_timm(name) else InputSettings()


@functools.cache  # an error is not cached
def _timm_settings(name: str) -> InputSettings:
    timm, model = _import_timm(name), name.removeprefix(_PREFIX)
    source, _, place = model.partition(":")
    loaders = {"hf-hub": "load_model_config_from_hf", "local-dir": "load_model_config_from_path"}
    if source not in loaders and not timm.is_model(model):
        raise ValueError(_unknown(timm, model))
    try:
        if source in loaders:
            config = getattr(importlib.import_module("timm.models._hub"), loaders[source])(place)[0]
        else:
            config = timm.models.get_pretrained_cfg(model, allow_unregistered=False).to_dict()
        data = timm.data.resolve_data_config(pretrained_cfg=config)
    except Exception as error:  # a file, a folder or the Hub, whose client has many classes
        tags = [known for known in timm.list_pretrained(f"{model.split('.')[0]}.*") if "." in model]
        hint = f"; it has {', '.join(tags)}" if tags else ""
        raise ValueError(f"{name}: {text_of(error, _LONGEST).rstrip('.')}{hint}") from error
    _, height, width = data["input_size"]
    sized = bool(config.get("fixed_input_size"))
    return InputSettings(int(height), int(width), tuple(data["mean"]), tuple(data["std"]), sized)


def _import_timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"{name} needs timm, which can't be imported ({text_of(error)}): pip install 'torchreid-snloss[timm]'"
        ) from error


def _unknown(timm: Any, model: str) -> str:
    names = timm.list_models()
    guesses = difflib.get_close_matches(model.split(".")[0], names, n=3)
    hint = f", did you mean {' or '.join(_PREFIX + guess for guess in guesses)}?" if guesses else ""
    return f"timm has no model {model!r}{hint or ':'} timm.list_models() lists its {len(names):,} models"


def fill_input(name: str, section: MutableMapping[str, Any]) -> list[str]:
    """Replaces None by the model's own settings in the section `data` of a config, in place.

    Args:
        name: The name of the model, as for `input_settings`.
        section: The values of `height`, `width`, `norm_mean` and `norm_std`, among others.

    Returns:
        A line about what was filled in for a timm model.

    Raises:
        ValueError: As `input_settings` does.
    """
    own = input_settings(name)
    values = {"height": own.height, "width": own.width, "norm_mean": [*own.norm_mean], "norm_std": [*own.norm_std]}
    filled = {key: value for key, value in values.items() if section[key] is None}
    section.update(filled)
    if not filled or not is_timm(name):
        return []
    return [f"=> {', '.join(f'data.{key} {value}' for key, value in filled.items())}: {name}'s own settings"]


class TimmModel(nn.Module):
    """A timm model with the interface of torchreid's models.

    In training mode it returns `(logits, features)`, or the logits alone for a softmax loss; in evaluation mode the
    features. They are the pooled ones that timm's own classifier would get, of shape (batch, `feature_dim`).

    Its layers are `backbone` and `classifier`, the names for `train.open_layers` and `train.new_layers`.

    Args:
        backbone: A timm model without a classifier, that is, built with `num_classes=0`.
        feature_dim: The dimension of its features.
        num_classes: The number of training identities.
        logits_only: Whether to return only the logits in training mode.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int, logits_only: bool = False) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.logits_only = logits_only
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        if not self.training:
            return features
        logits = self.classifier(features)
        return logits if self.logits_only else (logits, features)


def build_timm_model(
    name: str,
    num_classes: int,
    loss: str = "softmax",
    pretrained: bool = True,
    use_gpu: bool = True,
    img_size: tuple[int, int] | None = None,
    **options: Any,
) -> TimmModel:
    """Builds a timm model, as `torchreid.models.build_model` does after `register()`.

    Args:
        name: `timm/<name>`, as for `input_settings`.
        num_classes: The number of training identities.
        loss: `"softmax"` for logits alone in training, `"triplet"` for `(logits, features)`.
        pretrained: Whether timm loads its pretrained weights, from its cache, the Hugging Face Hub or a folder.
        use_gpu: Not used: the model is built on the CPU, as by torchreid.
        img_size: Height and width of the images in pixels. None: the model's own; within torchreid's
            `FeatureExtractor`, its `image_size`.
        **options: Further keywords of `timm.create_model`, such as `drop_path_rate`.

    Raises:
        ValueError: If timm is not installed, has no such model, or the model does not take this loss, these options or
            images of this size.
        OSError: If the pretrained weights can't be downloaded or loaded.
    """
    own = input_settings(name)
    if loss not in ("softmax", "triplet"):
        raise ValueError(f"{name} takes loss softmax or triplet, got {loss!r}")
    size = tuple(img_size or _extractor_size.get() or (own.height, own.width))
    if own.sized and size != (own.height, own.width):
        options["img_size"] = size
    model = name.removeprefix(_PREFIX)
    try:
        backbone = _import_timm(name).create_model(model, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # timm, safetensors and the Hub's client have many classes
        text = text_of(error, _LONGEST)
        if isinstance(error, TypeError) and "'img_size'" in text:
            raise ValueError(_refused(name, own, size)) from error
        if pretrained and not isinstance(error, (TypeError, AssertionError)):
            raise OSError(f"can't load the pretrained weights of {name}: {text.rstrip('.')}") from error
        raise ValueError(f"timm can't build {name}: {text}") from error
    try:
        with torch.no_grad():
            shape = backbone.eval()(torch.zeros(1, 3, *size)).shape
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{_refused(name, own, size)}: {text_of(error, _LONGEST)}") from error
    if len(shape) != 2:
        raise ValueError(f"{name} must give features of shape (batch, dimension), got {tuple(shape)}")
    return TimmModel(backbone.train(), shape[1], num_classes, logits_only=loss == "softmax")


def _refused(name: str, own: InputSettings, size: tuple[int, ...]) -> str:
    return (
        f"{name} does not take images of data.height {size[0]} and data.width {size[1]}, its own are {own.height} and "
        f"{own.width}"
    )


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replaces batch norm by `SyncBatchNorm` as torch's function does, but also right for timm's models and a neck.

    torch's function drops the activations within timm's `BatchNormAct2d`, and fails where a bias is a buffer.
    """
    if isinstance(model, TimmModel):
        model.backbone = importlib.import_module("timm.layers").convert_sync_batchnorm(model.backbone)
    elif isinstance(model, nn.modules.batchnorm._BatchNorm):
        bias = model._buffers.pop("bias", None)
        if bias is not None:
            model.register_parameter("bias", nn.Parameter(bias))
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if bias is not None:
            del model.bias
            model.register_buffer("bias", bias)
    else:
        for name, child in model.named_children():
            setattr(model, name, convert_sync_batchnorm(child))
    return model


_extractor_size: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("image size", default=None)


def with_own_input(init: Callable[..., None]) -> Callable[..., None]:
    """torchreid's `FeatureExtractor.__init__`, which builds a timm model for the size of its images.

    Of `image_size`, `pixel_mean` and `pixel_std`, those that are not given become the model's own, as in a config.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        name = call.arguments.get("model_name", "")
        if not is_timm(name):
            return init(*args, **kwargs)
        own = input_settings(name)
        given = {"image_size": (own.height, own.width), "pixel_mean": own.norm_mean, "pixel_std": own.norm_std}
        call.arguments = {**given, **call.arguments}
        size = call.arguments["image_size"]
        with _building_for(None if isinstance(size, int) else tuple(size)):
            return init(*call.args, **call.kwargs)

    return wrapped


@contextlib.contextmanager
def _building_for(size: tuple[int, int] | None) -> Iterator[None]:
    token = _extractor_size.set(size)
    try:
        yield
    finally:
        _extractor_size.reset(token)
