"""Changes to torchreid's models that papers use: last stride 1, an embedding, a batch-norm neck."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchreid_snloss.deprecation import renamed
from torchreid_snloss.losses import check_integer

__all__ = ["ModelWithHead", "set_last_stride"]

__getattr__ = renamed(__name__, {"Headed": "torchreid_snloss.heads.ModelWithHead"})


def set_last_stride(model: nn.Module, stride: int) -> None:
    """Sets the stride of the last stage of a ResNet, `layer4`, in place.

    With stride 1 in place of 2, the feature map is twice as high and twice as wide. Source: Sun et al., "Beyond Part
    Models" (PCB), ECCV 2018; Luo et al., "Bag of Tricks", CVPRW 2019.

    Args:
        model: A torchreid or timm model with a `layer4` whose first block has stride 2.
        stride: The new stride, >= 1.

    Raises:
        TypeError: If the stride is not an integer.
        ValueError: If the stride is below 1, or the model has no such stage.
    """
    check_integer("last_stride", stride, at_least=1)
    model = getattr(model, "backbone", model)  # of a timm model
    stage = getattr(model, "layer4", None)
    strided = [pair for pair in stage.named_modules() if _has_stride_2(pair[1])] if isinstance(stage, nn.Module) else []
    if not isinstance(stage, nn.Module) or not strided:
        raise ValueError(f"last_stride needs a model with a layer4 of stride 2, but {type(model).__name__} has none")
    for name, module in strided:
        parent, _, own = name.rpartition(".")
        if stride == 1 and not isinstance(module, nn.Conv2d) and own != "pool":
            # As timm builds a stage of stride 1; the `pool` of a Res2Net's block, which has padding, stays.
            setattr(stage.get_submodule(parent), own, nn.Identity())
        else:
            setattr(module, "stride", (stride, stride))  # noqa: B010 - nn.Module declares no stride


def _has_stride_2(module: nn.Module) -> bool:
    layers = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)
    known = isinstance(module, layers) or type(module).__name__ == "BlurPool2d"  # timm's
    return known and getattr(module, "stride", None) in (2, (2, 2))


class ModelWithHead(nn.Module):
    """A torchreid model with a new head: pooled features, embedding, neck, classifier.

    In training mode the model returns `(logits, features)`, where the features are those before the neck, which the
    metric loss is computed on. In evaluation mode it returns the features after the neck.

    The state dict uses the names of the torchreid model. So torchreid's `FeatureExtractor` and
    `load_pretrained_weights` load the backbone from its checkpoints, and ImageNet weights and torchreid's checkpoints
    load into it. A checkpoint does not store the last stride.

    Args:
        model: A torchreid model with one linear `classifier`, built with `loss="triplet"`. It is modified in place.
        num_classes: The number of training identities.
        embedding: The widths of linear layers after the pooled features, with batch norm and ReLU between them
            (1024, 128 in the HAP2S paper). No layers if empty.
        bnneck: Whether a batch norm without bias precedes the classifier, which then has no bias either (Luo et al.,
            "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPRW 2019).
        logits_only: Whether to return only the logits in training mode, for a softmax loss.

    Raises:
        TypeError: If a width is not an integer.
        ValueError: If the model has no linear `classifier`, or a width is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        embedding: Sequence[int] = (),
        bnneck: bool = False,
        logits_only: bool = False,
    ) -> None:
        super().__init__()
        classifier = getattr(model, "classifier", None)
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f"an embedding or a neck needs a model with one linear classifier, got {type(model).__name__}"
            )
        widths = [classifier.in_features, *(check_integer("embedding", width, at_least=1) for width in embedding)]
        layers: list[nn.Module] = []
        for width_in, width in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        self.base = model
        self.base.classifier = nn.Identity()
        self.embedding = nn.Sequential(*layers[:-2])  # no batch norm and ReLU after the last linear layer
        self.neck = nn.BatchNorm1d(widths[-1]) if bnneck else nn.Identity()
        self.classifier = nn.Linear(widths[-1], num_classes, bias=not bnneck)
        self.logits_only = logits_only
        for layer in self.embedding:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                nn.init.zeros_(layer.bias)
        if isinstance(self.neck, nn.BatchNorm1d):
            bias = self.neck.bias.detach()
            del self.neck.bias
            self.neck.register_buffer("bias", bias)  # torchreid's open_all_layers makes every parameter trainable
        nn.init.normal_(self.classifier.weight, std=0.001)
        if self.classifier.bias is not None:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Any:
        output = self.base(images)
        # The base is in evaluation mode, and returns features alone, while torchreid trains only other layers.
        features = self.embedding(output[1] if isinstance(output, tuple) else output)
        neck_features = self.neck(features)
        if not self.training:
            return neck_features
        logits = self.classifier(neck_features)
        return logits if self.logits_only else (logits, features)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state dict, in which the weights of the torchreid model have their own names, without `base.`."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(f"{prefix}base.")]:
            state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch calls this method before it loads the children, so it can put `base.` back.
        own = {name for name, _ in self.named_children()}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.split(".")[0] not in own:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
