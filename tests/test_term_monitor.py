"""A metric term that does nothing is reported; one that works, or has done its work, is not reported as that."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Tiny, make_datamanager, make_engine
from torch import Tensor, nn
from torchreid import losses

from torchreid_snloss import FIDILoss, HAP2SLoss, ImageMetricEngine, SNLoss
from torchreid_snloss.engine.term_monitor import TermMonitor


class Wide(Tiny):
    """Its features are 2048 that come out of a batch norm, about 60 apart."""

    def __init__(self, num_classes: int = 16) -> None:
        super().__init__(num_classes)
        self.head = nn.Sequential(nn.Linear(256, 2048), nn.BatchNorm1d(2048))
        self.classifier = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Any:
        features = self.head(self.norm(self.convolution(x)).relu().flatten(1))
        return (self.classifier(features), features) if self.training else features


class Dead(Tiny):
    """No ReLU of it is active, so that all features are 0."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.norm.bias, -100.0)


class InParts(Wide):
    """Several features and logits per image, and logits that do not follow from the features, as in PCB."""

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return super().forward(x)
        logits, features = super().forward(x)
        return [logits, logits], [features[:, :1024] * 1.0, features[:, 1024:] * 1.0]


def reports(
    datamanager: Any, folder: Path, capsys: pytest.CaptureFixture[str], epochs: int, *args: Any, **options: Any
) -> list[str]:
    """The lines on terms that do nothing in a run."""
    training = make_engine(ImageMetricEngine, datamanager, *args, **options)
    capsys.readouterr()
    training.run(save_dir=str(folder), max_epoch=epochs, print_freq=1)
    lines = capsys.readouterr().out.splitlines()
    names = {
        name for line in lines if line.startswith("epoch: [") for name in re.findall(r"([a-z_ ]+) [\d.]+ \(", line)
    }
    assert names >= {"time", "data"}
    assert all(name.isidentifier() for name in names), "what is measured is not shown"
    return [line for line in lines if re.match(r"(\*\*|=>) loss_", line)]


@pytest.mark.parametrize(
    ("model", "options", "measure"),
    [
        (Wide, {}, "its gradient on the features is at most .* of softmax's"),
        (Wide, {"amp": "bf16"}, "its gradient on the features is at most .* of softmax's"),
        (Wide, {"weight_x": 0}, "features moved as far as they differ would change it by at most .* of that"),
        (Wide, {"micro_batch": 16}, "features moved as far as they differ would change it by at most .* of that"),
        (InParts, {}, "features moved as far as they differ would change it by at most .* of that"),
    ],
    ids=["softmax", "bf16", "alone", "micro-batches", "parts"],
)
def test_fidi_on_features_far_apart(
    model: type[nn.Module],
    options: dict[str, Any],
    measure: str,
    datamanager: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = reports(
        datamanager, tmp_path, capsys, 3, model(), criterion=FIDILoss(beta=1.5, normalize=False), lr=1e-3, **options
    )
    assert len(found) == 1
    # Every u is 0: each of an anchor's 3 positives adds C, each of its 28 negatives 0.
    value = math.log(1.05 / 0.05) * 3 / 31
    assert re.match(rf"\*\* loss_m does nothing in epoch 1: its value is (\S+), and {measure}\. ", found[0])
    assert float(re.findall(r"value is (\S+),", found[0])[0]) == pytest.approx(value, rel=1e-3)
    assert float(re.findall(r"at most (\S+) of", found[0])[0]) < 1e-3
    assert "Try loss.fidi.normalize True, or a smaller loss.fidi.beta" in found[0]


def test_a_triplet_loss_at_its_margin(datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    triplet = losses.TripletLoss(margin=0.3)
    (found,) = reports(datamanager, tmp_path, capsys, 2, Dead(), criterion=triplet)
    assert found.startswith("** loss_m does nothing in epoch 1: its value is 0.3, ")
    assert found.endswith("Try a smaller learning rate or a larger weight_x, since the features are at one point")


class Near(Tiny):
    """All features within a ten-thousandth of one point."""

    def forward(self, x: Any) -> Any:
        features = 1 + 1e-4 * self.norm(self.convolution(x)).flatten(1)
        return (self.classifier(features), features) if self.training else features


@pytest.mark.parametrize("weight_x", [0, 1])
@pytest.mark.parametrize("criterion", [losses.TripletLoss(margin=0.3), HAP2SLoss(normalize=False), FIDILoss()], ids=str)
def test_a_collapse_is_told_once_for_any_loss(
    criterion: Any, weight_x: float, datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(
        ImageMetricEngine, datamanager, Near(), criterion=criterion, weight_x=weight_x, weight_m=1.0, lr=1e-6
    )
    for _ in range(2):  # in each run
        training.run(save_dir=str(tmp_path), max_epoch=3)
        assert capsys.readouterr().out.count("** The features collapse to one point: their mean distance is ") == 1


def test_features_that_differ_have_not_collapsed(
    datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_engine(ImageMetricEngine, datamanager, criterion=SNLoss()).run(save_dir=str(tmp_path), max_epoch=1)
    assert "collapse" not in capsys.readouterr().out


def test_two_terms_without_softmax(datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    criteria = {"triplet": losses.TripletLoss(), "fidi": FIDILoss(beta=50.0, normalize=False)}
    weights = {"triplet": 1e-6, "fidi": 1.0}  # weights do not count without softmax
    (found,) = reports(datamanager, tmp_path, capsys, 2, criterion=criteria, weight_m=weights, weight_x=0)
    assert found.startswith("** loss_fidi does nothing in epoch 1")


@pytest.mark.parametrize(
    "criterion",
    [
        SNLoss(),
        HAP2SLoss(),
        HAP2SLoss(sigma=1.0, margin=None, normalize=False),
        FIDILoss(),
        FIDILoss(beta=0.1, normalize=False),
        losses.TripletLoss(),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"weight_x": 0}, {"weight_m": 0}, {"amp": "fp16"}], ids=str)
def test_a_healthy_run(
    criterion: Any,
    options: dict[str, Any],
    datamanager: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reports(datamanager, tmp_path, capsys, 2, criterion=criterion, **options) == []


def test_nothing_is_left_to_learn(reid_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datamanager = make_datamanager(reid_data, transforms=[])
    found = reports(
        datamanager, tmp_path, capsys, 20, criterion=HAP2SLoss(margin=0.0, sigma=100.0), optimizer="adam", lr=1e-2
    )
    assert len(found) == 1
    assert re.match(
        r"=> loss_m no longer does anything from epoch \d+ on, nothing is left to learn: its value is 0, ", found[0]
    )


@pytest.mark.parametrize("options", [{}, {"amp": "bf16"}, {"amp": "fp16"}, {"micro_batch": 8}, {"memory_size": 40}])
def test_weights_and_random_states_are_the_same_to_the_bit(
    options: dict[str, Any], datamanager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for monitored in (True, False):
        if not monitored:
            monkeypatch.setattr(TermMonitor, "measure", lambda *_: {})
        training = make_engine(ImageMetricEngine, datamanager, criterion=SNLoss(), optimizer="adam", **options)
        training.run(save_dir=str(tmp_path / str(monitored)), max_epoch=2, print_freq=100)
        results.append((training.model.state_dict(), torch.get_rng_state()))
    (weights, state), (expected, expected_state) = results
    assert torch.equal(state, expected_state)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_softmax_that_overflows_makes_no_term_look_small(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = TermMonitor({"m": HAP2SLoss()})
    monitor.start_epoch(1)
    features = torch.randn(8, 4, requires_grad=True)
    measured = monitor.measure({"m": features.square().sum()}, 1e30 * features.sum(), features, features, None)
    values = {"loss_m": 1.0, **{name: float(value) for name, value in measured.items()}}
    monitor.record(values)
    monitor.end_epoch(1)
    assert set(values) == {"loss_m"}
    assert capsys.readouterr().out == ""


def test_command_line_and_a_resumed_run(train: Callable[..., Done]) -> None:
    dead = ("loss.name", "fidi", "loss.fidi.beta", 50, "test.ranks", "[1]")
    code, out, err = train(*dead, "train.max_epoch", 2)
    assert code == 0, err
    assert out.count("** loss_m does nothing in epoch 1: its value is ") == out.count("loss_m does nothing") == 1
    code, out, err = train(*dead, "train.max_epoch", 3, "model.resume", "auto")
    assert code == 0, err
    assert out.count("** loss_m does nothing in epoch 3: its value is ") == 1
