"""The engines on a real data manager. Also run under upstream's layout, by test_layouts.py."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, make_engine
from torch import nn
from torchreid import data, engine, losses, models, utils

import torchreid_snloss
from torchreid_snloss import FIDILoss, ImageFIDIEngine, ImageHAP2SEngine, ImageSNEngine, SNLoss
from torchreid_snloss.engine import LossEngine

ENGINES = [ImageSNEngine, ImageHAP2SEngine, ImageFIDIEngine]


@pytest.mark.parametrize("weight_x", [0, 1])
@pytest.mark.parametrize("cls", ENGINES)
def test_trains_and_the_loss_falls(cls: type[LossEngine], weight_x: float, datamanager: Any) -> None:
    options = {"beta": 0.1, "normalize": False} if cls is ImageFIDIEngine else {}  # features are ten apart
    training = make_engine(cls, datamanager, weight_x=weight_x, **options)
    batch = next(iter(datamanager.train_loader))
    steps = [training.forward_backward(batch) for _ in range(24)]
    terms = {"loss_m", "loss_x"} if weight_x else {"loss_m"}
    assert terms == {name for name in steps[0] if name.startswith("loss")}
    assert ("acc" in steps[0]) == bool(weight_x)
    for term in terms:
        assert steps[-1][term] < 0.95 * steps[0][term]


@pytest.mark.parametrize("cls", ENGINES)
def test_runs_to_results_and_a_checkpoint_that_loads(
    cls: type[LossEngine], datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(cls, datamanager)  # without a scheduler
    training.run(save_dir=str(tmp_path), max_epoch=2, print_freq=1)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("epoch: [2/2][3/3]", "loss_m", "loss_x", "acc", "mAP:", "Rank-1"))

    checkpoint = str(tmp_path / "model" / "model.pth.tar-2")
    torch.load(checkpoint, weights_only=True)
    resumed = make_engine(cls, datamanager)
    assert utils.resume_from_checkpoint(checkpoint, resumed.model, resumed.optimizer, resumed.scheduler) == 2
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_losses_keywords_reach_the_loss(datamanager: Any) -> None:
    training = make_engine(ImageSNEngine, datamanager, num_neighbors=3, squeeze="all", weight_m=0.5)
    loss = training.criteria.losses["m"]
    assert isinstance(loss, SNLoss)
    assert (loss.num_neighbors, loss.squeeze) == (3, "all")
    assert (training.weights, training.weight_x) == ({"m": 0.5}, 1)
    assert isinstance(make_engine(ImageFIDIEngine, datamanager, alpha=1.5).criteria.losses["m"], FIDILoss)


@pytest.mark.parametrize("smooth", [True, False])
def test_softmax_term_is_torchreids(smooth: bool, datamanager: Any) -> None:
    training = make_engine(ImageSNEngine, datamanager, label_smooth=smooth)
    logits, pids = torch.randn(32, 16, requires_grad=True), torch.randint(0, 16, (32,))
    theirs = losses.CrossEntropyLoss(16, use_gpu=False, label_smooth=smooth)
    torch.testing.assert_close(training.criterion_x(logits, pids), theirs(logits, pids))


def test_several_outputs_go_through_deep_supervision(datamanager: Any, batch: dict[str, Any]) -> None:
    class TwoHeads(Tiny):
        def forward(self, x: Any) -> Any:
            logits, features = super().forward(x)
            return [logits, logits], (features, 2 * features)

    one, model = Tiny(), TwoHeads()
    model.load_state_dict(one.state_dict())
    features = one(batch["img"])[1]
    options = {"beta": 0.1, "normalize": False}  # so that the two differ
    pair = [FIDILoss(**options)(scale * features, batch["pid"]).item() for scale in (1, 2)]
    result = make_engine(ImageFIDIEngine, datamanager, model, **options).forward_backward(batch)
    assert result["loss_m"] == pytest.approx(sum(pair) / 2, rel=1e-4)


def test_pcb_trains(datamanager: Any) -> None:
    pcb = models.build_model("pcb_p4", datamanager.num_train_pids, loss="hap2s", pretrained=False)
    batch = next(iter(datamanager.train_loader))
    batch = {"img": batch["img"][:8], "pid": batch["pid"][:8]}
    training = make_engine(ImageHAP2SEngine, datamanager, pcb)
    training.set_model_mode("train")
    assert {"loss_m", "loss_x", "acc"} <= set(training.forward_backward(batch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_m": 0, "weight_x": 0}, "not both 0, got weight_m=0, weight_x=0"),
        ({"weight_m": -1}, "at least 0 and not both 0, got weight_m=-1"),
        ({"scale": -1.0}, "scale must be greater than 0, got -1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, datamanager: Any) -> None:
    with pytest.raises(ValueError, match=words):
        make_engine(ImageSNEngine, datamanager, **options)


def test_a_base_between_needs_no_loss_and_its_keywords_show() -> None:
    class Base(LossEngine):
        def __init__(self, *args: Any, pooling_method: str = "avg", **options: Any) -> None:
            super().__init__(*args, **options)

    class Concrete(Base):
        loss_class = SNLoss

    assert {"pooling_method", "num_neighbors", "squeeze"} <= set(inspect.signature(Concrete).parameters)
    shown = inspect.signature(ImageSNEngine).parameters
    assert {"datamanager", "scale", "weight_m", "scheduler"} <= set(shown)
    assert "reduction" not in shown


def test_unknown_keyword_names_the_loss(datamanager: Any) -> None:
    with pytest.raises(TypeError, match=r"SNLoss.*margin"):
        make_engine(ImageSNEngine, datamanager, margin=0.3)


def test_model_without_features(datamanager: Any) -> None:
    softmax = models.build_model("osnet_x0_25", 16, loss="softmax", pretrained=False)
    with pytest.raises(ValueError, match="built with loss='softmax' and returns no features"):
        make_engine(ImageSNEngine, datamanager, softmax)
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 32, 16))
    with pytest.raises(TypeError, match=r"must return \(logits, features\), got Tensor"):
        make_engine(ImageSNEngine, datamanager, own).forward_backward(next(iter(datamanager.train_loader)))


@pytest.mark.parametrize("wrong", [{"a": 1}, None, []])
def test_model_with_something_else_for_features(wrong: Any, datamanager: Any, batch: dict[str, Any]) -> None:
    class Other(Tiny):
        def forward(self, x: Any) -> Any:
            return super().forward(x)[0], wrong

    with pytest.raises(
        TypeError, match=f"the model's features must be a tensor or several, got {type(wrong).__name__}"
    ):
        make_engine(ImageSNEngine, datamanager, Other()).forward_backward(batch)


def test_register_adds_and_changes_nothing() -> None:
    torchreid_snloss.register()
    build_model, build_train_sampler = models.build_model, data.sampler.build_train_sampler
    samplers = list(data.sampler.AVAI_SAMPLERS)
    torchreid_snloss.register()
    assert models.build_model is build_model
    assert data.datamanager.build_train_sampler is data.sampler.build_train_sampler is build_train_sampler
    assert list(data.sampler.AVAI_SAMPLERS) == samplers

    assert losses.SNLoss is SNLoss
    assert losses.HAP2SLoss is torchreid_snloss.HAP2SLoss
    assert losses.FIDILoss is FIDILoss
    assert [getattr(engine, cls.__name__) for cls in ENGINES] == ENGINES
    for name in ("sn", "hap2s", "fidi", "triplet", "softmax"):
        model = models.build_model("osnet_x0_25", 5, name, False)
        outputs = model.train()(torch.zeros(2, 3, 64, 32))
        assert isinstance(outputs, torch.Tensor) == (name == "softmax")
    with pytest.raises(KeyError, match="Unsupported loss: snn"):
        models.build_model("osnet_x0_25", 5, loss="snn", pretrained=False)(torch.zeros(2, 3, 64, 32))
    with pytest.raises(KeyError, match="Unknown model"):
        models.build_model("osnet", 5, loss="sn")

    items = [("x", i % 5, 0, 0) for i in range(40)]
    theirs = build_train_sampler(items, "RandomIdentitySampler", 8, 4)
    assert type(theirs) is data.sampler.RandomIdentitySampler
    ours = build_train_sampler(items, "IdentitySampler", batch_size=8, num_instances=2, num_cams=1)
    assert type(ours) is torchreid_snloss.IdentitySampler
    assert (ours.num_pids_per_batch, ours.num_instances) == (4, 2)
    with pytest.raises(AssertionError, match="train_sampler must be one of"):
        build_train_sampler(items, "NoSampler")
