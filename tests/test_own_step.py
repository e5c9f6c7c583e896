"""Softmax and triplet in this package's step: the same values as in torchreid's own engines, and its options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Tiny, make_engine
from torch import Tensor
from torchreid import data, engine, losses, models

import torchreid_snloss
from torchreid_snloss import ImageMetricEngine, VideoMetricEngine
from torchreid_snloss.checkpoint import load_checkpoint
from torchreid_snloss.data import SyntheticTracklets, make_pedestrians

LOSSES = ["softmax", "triplet", "triplet beside softmax"]


class Honest(Tiny):
    """Returns logits alone if it is built for softmax, as torchreid's models do."""

    def __init__(self, num_classes: int = 16, loss: str = "triplet", **_: Any) -> None:
        super().__init__(num_classes)
        self.loss = loss

    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        return outputs[0] if self.training and self.loss == "softmax" else outputs


class Parts(Honest):
    """Several logits and features for each image, as PCB has."""

    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        if not self.training:
            return outputs
        if self.loss == "softmax":
            return [outputs, 2 * outputs]
        logits, features = outputs
        return [logits, 2 * logits], [features, features.tanh()]


@pytest.fixture
def in_float64() -> Iterator[None]:
    """So that Adam, which divides by the size of a gradient, does not enlarge its last digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torchreid_snloss.register()
    root = tmp_path_factory.mktemp("video")
    make_pedestrians(root / SyntheticTracklets.dataset_dir, num_train_pids=10, num_test_pids=5, frames=3)
    return data.VideoDataManager(
        root=str(root), sources="synthetic_video", height=64, width=32, batch_size_train=8, batch_size_test=5,
        seq_len=2, num_instances=2, train_sampler="IdentitySampler", use_gpu=False, workers=0,
    )  # fmt: skip


def pair_of_engines(kind: str, loss: str, datamanager: Any, model: type[Honest], **options: Any) -> tuple[Any, Any]:
    """Ours and torchreid's, for the same model."""
    own, softmax, triplet = {
        "image": (ImageMetricEngine, engine.ImageSoftmaxEngine, engine.ImageTripletEngine),
        "video": (VideoMetricEngine, engine.VideoSoftmaxEngine, engine.VideoTripletEngine),
    }[kind]
    classes = datamanager.num_train_pids
    ours, theirs = model(classes), model(classes, loss="softmax" if loss == "softmax" else "triplet")
    theirs.load_state_dict(ours.state_dict())
    if loss == "softmax":
        of_ours, of_theirs = {"criterion": {}}, {}
    else:
        options["weight_x"] = 0 if loss == "triplet" else 0.5
        of_ours, of_theirs = {"criterion": losses.TripletLoss(0.4), "weight_m": 0.7}, {"margin": 0.4, "weight_t": 0.7}
    return (
        make_engine(own, datamanager, ours, **of_ours, **options),
        make_engine(softmax if loss == "softmax" else triplet, datamanager, theirs, **of_theirs, **options),
    )


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("kind", "loss", "model", "smooth"),
    [
        *[("image", loss, Honest, smooth) for loss in LOSSES for smooth in (True, False)],
        *[("video", loss, Honest, True) for loss in LOSSES],
        *[("image", loss, Parts, True) for loss in LOSSES],
    ],
)
def test_losses_and_weights_of_a_few_steps_are_torchreids(
    kind: str, loss: str, model: type[Honest], smooth: bool, optimizer: str, datamanager: Any, request: Any
) -> None:
    manager = request.getfixturevalue("videos") if kind == "video" else datamanager
    ours, theirs = pair_of_engines(kind, loss, manager, model, optimizer=optimizer, label_smooth=smooth)
    before = [p.detach().clone() for p in ours.model.parameters()]
    for batch in [*manager.train_loader, *manager.train_loader][:4]:
        batch = {**batch, "img": batch["img"].double()}
        shown, expected = ours.forward_backward(batch), theirs.forward_backward(batch)
        their_names = {"loss": "loss_x", "loss_t": "loss_m"}
        expected = {their_names.get(name, name): value for name, value in expected.items()}
        assert shown == pytest.approx(expected, rel=1e-6)
    for (name, weight), theirs_weight in zip(ours.model.named_parameters(), theirs.model.parameters()):
        torch.testing.assert_close(weight, theirs_weight, rtol=0, atol=1e-6, msg=name)
    moved = [(p - b).abs().max() for p, b in zip(ours.model.parameters(), before)]
    assert max(moved) > 1e-3
    for buffer, theirs_buffer in zip(ours.model.buffers(), theirs.model.buffers()):
        torch.testing.assert_close(buffer, theirs_buffer)


def test_several_outputs_of_pcb_are_torchreids(datamanager: Any, batch: dict[str, Any]) -> None:
    batch = {"img": batch["img"][:8], "pid": batch["pid"][:8]}
    built = {loss: models.build_model("pcb_p4", 16, loss=loss, pretrained=False) for loss in ("triplet", "softmax")}
    built["softmax"].load_state_dict(built["triplet"].state_dict())
    ours = make_engine(ImageMetricEngine, datamanager, built["triplet"], criterion={})
    theirs = make_engine(engine.ImageSoftmaxEngine, datamanager, built["softmax"])
    for training in (ours, theirs):
        training.model.dropout.p = 0.0
    shown, expected = ours.forward_backward(batch), theirs.forward_backward(batch)
    assert shown["loss_x"] == pytest.approx(expected["loss"], rel=1e-6)
    assert shown["acc"] == expected["acc"]
    for weight, theirs_weight in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(weight, theirs_weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_x": 0}, "weight_x must be at least 0 and not 0, got weight_x=0"),
        ({"weight_m": {"sn": 1.0}}, r"weight_m must have the criteria's names \[\], got"),
        ({"memory_size": 8}, "a memory needs a metric loss"),
    ],
)
def test_what_softmax_alone_does_not_take(options: dict[str, Any], words: str, datamanager: Any) -> None:
    with pytest.raises(ValueError, match=words):
        make_engine(ImageMetricEngine, datamanager, criterion={}, **options)


# ---- the command line ----


@pytest.fixture
def train(train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command line in this process, with a model that knows what loss it is built for."""
    monkeypatch.setitem(vars(models)["__model_factory"], "tiny", Honest)
    return lambda *options: train("test.ranks", "[1]", "train.optim", "sgd", "train.lr", 0.01, *options)


def weights(folder: str, epoch: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(Path(folder, "model", f"model.pth.tar-{epoch}"))["state_dict"]
    return state


def shown_terms(out: str) -> set[str]:
    """The losses in the progress line."""
    return set(re.findall(r"\b(loss\w*) \d", out))


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (["loss.name", "softmax"], {"loss_x"}),
        (["loss.name", "softmax", "loss.softmax.label_smooth", False, "train.fixbase_epoch", 1], {"loss_x"}),
        (["loss.name", "softmax", "model.neck", "bnneck", "model.embedding", "[16]"], {"loss_x"}),
        (["loss.name", "triplet", "loss.triplet.weight_t", 0.5, "loss.triplet.margin", 0.1], {"loss_m"}),
        (["loss.name", "triplet", "loss.triplet.weight_x", 1, "model.neck", "bnneck"], {"loss_m", "loss_x"}),
    ],
)
def test_own_step_trains_as_torchreids_engine_does(
    options: list[Any], terms: set[str], train: Callable[..., Done]
) -> None:
    options = [*options, "train.max_epoch", 2, "data.save_dir"]
    theirs, ours = train(*options, "theirs"), train(*options, "ours", "train.own_step", True)
    assert (theirs.code, ours.code) == (0, 0), ours.err
    assert shown_terms(ours.out) == terms
    their_names = {"loss_m": "loss_t", "loss_x": "loss" if "softmax" in options else "loss_x"}
    assert shown_terms(theirs.out) == {their_names[name] for name in terms}
    one, other = weights("ours", 2), weights("theirs", 2)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("loss", "option", "value"),
    [
        ("softmax", "train.amp", "bf16"),
        ("triplet", "train.amp", "bf16"),
        ("softmax", "train.micro_batch", 8),
        ("triplet", "train.micro_batch", 4),
    ],
)
def test_options_of_this_packages_step(loss: str, option: str, value: Any, train: Callable[..., Done]) -> None:
    done = train("loss.name", loss, option, value, "train.max_epoch", 1)
    assert done.code == 0, done.err
    assert shown_terms(done.out) == {"loss_x" if loss == "softmax" else "loss_m"}
    assert "mAP:" in done.out


class BreaksInItsSecondStep(Honest):
    steps = 0

    def forward(self, x: Tensor) -> Any:
        self.steps += self.training
        return super().forward(x * torch.inf if self.training and self.steps == 2 else x)


@pytest.mark.parametrize(("loss", "term"), [("softmax", "loss_x"), ("triplet", "loss_m")])
def test_a_step_that_is_not_finite_is_skipped(
    loss: str, term: str, train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(models)["__model_factory"], "tiny", BreaksInItsSecondStep)
    done = train("loss.name", loss, "train.nonfinite", "skip", "train.max_epoch", 1)
    assert done.code == 0, done.err
    assert re.search(rf"\*\* Skipped: {term} is nan.* in epoch 1, step 2", done.out)


@pytest.mark.parametrize("loss", ["softmax", "triplet"])
@pytest.mark.parametrize("first", [False, True])
def test_a_run_resumes_in_the_other_engine(loss: str, first: bool, train: Callable[..., Done]) -> None:
    options = ["loss.name", loss, "train.max_epoch", 2, "data.save_dir"]
    assert train(*options, "whole", "train.own_step", first).code == 0
    done = train(*options, "resumed", "train.own_step", not first, "model.resume", "whole/model/model.pth.tar-1")
    assert done.code == 0, done.err
    assert f"train.own_step: {first} in the checkpoint, {not first} in the config, which is used" in done.out
    one, other = weights("whole", 2), weights("resumed", 2)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=name)
