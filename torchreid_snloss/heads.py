"""What papers put around a backbone and torchreid's factory lacks: last stride 1, an embedding, a batch-norm neck."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchreid_snloss.losses import check_integer

__all__ = ["ModelWithHead", "set_last_stride"]


def set_last_stride(model: nn.Module, stride: int) -> None:
    """Sets the stride of a ResNet's last stage, ``layer4``, in place: 1 keeps its features twice as high and wide.

    Sun et al., "Beyond Part Models" (PCB), ECCV 2018; Luo et al., "Bag of Tricks", CVPRW 2019.

    Args:
        model: one of torchreid's with a ``layer4`` whose first block strides.
        stride: >= 1.

    Raises:
        TypeError, ValueError: for a stride that is none, and a model without such a stage.
    """
    check_integer("last_stride", stride, at_least=1)
    stage = getattr(model, "layer4", None)
    strided = [m for m in stage.modules() if _strides(m)] if isinstance(stage, nn.Module) else []
    if not strided:
        raise ValueError(f"last_stride takes a model with a layer4 of stride 2, {type(model).__name__} has none")
    for module in strided:
        setattr(module, "stride", (stride, stride))  # noqa: B010 - of several classes


def _strides(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)) and module.stride in (2, (2, 2))


class ModelWithHead(nn.Module):
    """A torchreid model with another head: ``features -> embedding -> neck -> classifier``.

    In training it gives ``(logits, features)`` with the features before the neck, for the metric loss; in testing the
    features after it. Its state dict has the model's own names, so that torchreid's ``FeatureExtractor`` and
    ``load_pretrained_weights`` load the backbone from its checkpoints (which do not say its ``last_stride``), and it
    loads ImageNet weights and theirs.

    Args:
        model: one of torchreid's with one linear ``classifier``, built with ``loss="triplet"``. It is changed.
        num_classes: training identities.
        embedding: widths of linear layers after the pooled features, with batch norm and ReLU between them (HAP2S:
            1024, 128); empty: none.
        bnneck: a batch norm without a bias before a classifier without one (Luo et al., "Bag of Tricks and a Strong
            Baseline for Deep Person Re-identification", CVPRW 2019).
        logits_only: give the logits alone in training, for a softmax loss.

    Raises:
        ValueError: for another model, or a width that is no integer >= 1.
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
                f"an embedding or a neck takes a model with one linear classifier, not {type(model).__name__}"
            )
        widths = [classifier.in_features, *(check_integer("embedding", width, at_least=1) for width in embedding)]
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise(widths):
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        self.base = model
        self.base.classifier = nn.Identity()
        self.embedding = nn.Sequential(*layers[:-2])  # the last one is the embedding itself
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
            self.neck.register_buffer("bias", bias)  # torchreid opens every parameter for training
        nn.init.normal_(self.classifier.weight, std=0.001)
        if self.classifier.bias is not None:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Any:
        output = self.base(images)
        # The base is in eval mode while torchreid trains other layers alone.
        features = self.embedding(output[1] if isinstance(output, tuple) else output)
        after = self.neck(features)
        if not self.training:
            return after
        logits = self.classifier(after)
        return logits if self.logits_only else (logits, features)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """torch's, with the model's names for its own."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        start = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(f"{start}base.")]:
            state[start + key.removeprefix(f"{start}base.")] = state.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch calls it before it loads the children.
        own = {name for name, _ in self.named_children()}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.split(".")[0] not in own:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
