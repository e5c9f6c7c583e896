"""The engine's parts, each by itself: no engine, no data manager, no other part."""

from __future__ import annotations

import copy
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from torchreid_snloss import ImageSNEngine
from torchreid_snloss.checkpoint import load_checkpoint
from torchreid_snloss.engine.checkpointer import Checkpointer
from torchreid_snloss.engine.epoch_log import EpochLog
from torchreid_snloss.engine.event_writer import EventWriter
from torchreid_snloss.engine.monitor import CollapseMonitor
from torchreid_snloss.engine.options import NonFiniteError, TrainOptions
from torchreid_snloss.engine.random_state import random_states, seed_generators, set_random_states
from torchreid_snloss.engine.resumable_loader import ResumableLoader
from torchreid_snloss.engine.stopping import StopSignals
from torchreid_snloss.engine.testing import selecting_map
from torchreid_snloss.engine.update import Update, non_finite
from torchreid_snloss.record import read_record


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_second_one_interrupts(number: signal.Signals) -> None:
    stop = StopSignals()
    before = signal.getsignal(number)
    with stop.listening():
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.number == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert not stop.requested()


def test_an_epoch_from_its_middle() -> None:
    happened: list[Any] = []
    loader = ResumableLoader(DataLoader(range(6), batch_size=2), happened.append)  # type: ignore[arg-type]
    assert (len(loader), loader.batch_size) == (3, 2)

    def restore() -> bool:
        happened.append("restored")
        return True

    loader.start_epoch(seed=1, epoch=0, skip=2, restore_random_states=restore)
    for batch in loader:
        happened.append(batch.tolist())
    assert happened == ["restored", [4, 5], 3]
    loader.end_epoch()
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]


def test_an_epoch_is_drawn_by_seed_and_number() -> None:
    def drawn(seed: int, epoch: int) -> float:
        loader = ResumableLoader(DataLoader(range(4)), lambda _: None)  # type: ignore[arg-type]
        loader.start_epoch(seed, epoch, 0, lambda: False)
        return float(torch.rand(()))

    assert drawn(1, 2) == drawn(1, 2)
    assert len({drawn(1, 2), drawn(1, 3), drawn(2, 2), drawn(2, 1)}) == 4


def test_random_states_go_on_where_they_were() -> None:
    seed_generators(3)
    states = random_states()
    first = torch.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), first)


def small_training() -> tuple[nn.Linear, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    return model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_checkpoints_are_kept_and_resumed(tmp_path: Path) -> None:
    model, *rest = small_training()
    saved = Checkpointer(model, *rest, seed=7)
    saved.start(tmp_path, training=True)
    for epoch in (1, 2, 3):
        with torch.no_grad():
            model.weight.fill_(epoch)
        saved.epoch_trained()
        assert saved.unsaved
        saved.save(epoch, keep=2)
        saved.save_if_best(epoch, {1: 0.2, 2: 0.9, 3: 0.5}[epoch], "some data")
    saved.state.batch = 4
    saved.save(3, keep=2)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["model-best.pth.tar", "model.pth.tar-3", "model.pth.tar-3.4"]
    assert load_checkpoint(tmp_path / "model/model-best.pth.tar")["epoch"] == 2

    other, *rest = small_training()
    resumed = Checkpointer(other, *rest, seed=1)
    assert resumed.resume(tmp_path / "model" / "model.pth.tar-3.4") == 3
    assert (resumed.state.seed, resumed.state.batch, resumed.state.best) == (7, 4, 0.9)
    assert torch.equal(other.weight, model.weight)
    assert resumed.restore_random_states()
    assert not resumed.restore_random_states()


def test_a_step_of_the_optimizer_by_hand() -> None:
    model, optimizer, _ = small_training()
    before = model.weight.detach().clone()
    value = model.weight.square().sum()
    values = Update(optimizer)(
        value, {"loss_m": value}, {"d_pos": torch.tensor([6.0, 4.0])}, lambda terms: not non_finite(terms)
    )
    assert values == pytest.approx({"loss_m": before.square().sum().item(), "d_pos": 1.5})
    torch.testing.assert_close(model.weight.detach(), before - 0.25 * 2 * before)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model, optimizer, _ = small_training()
    before = model.weight.detach().clone()
    seen: list[str] = []

    def check(terms: Any) -> bool:
        seen.append(non_finite(terms))
        return not seen[-1]

    value = (model.weight * torch.nan).sum()
    assert Update(optimizer)(value, {"loss_m": value}, {}, check) is None
    assert seen == ["loss_m is nan, gradient is nan"]
    assert torch.equal(model.weight.detach(), before)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, *rest = small_training()
    with torch.no_grad():
        model.bias[1] = torch.inf
    checkpointer = Checkpointer(model, *rest, seed=1)
    checkpointer.start(tmp_path, training=True)
    with pytest.raises(NonFiniteError, match="1 weights are not finite, bias among them"):
        checkpointer.save(1, keep=0)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("done", [0, 1])
def test_the_means_of_an_epoch_are_recorded(done: int, tmp_path: Path) -> None:
    log = EpochLog()
    log.add_step({"loss_m": 100.0})  # outside an epoch
    log.start_record(tmp_path, start_epoch=0)
    with log.epoch(1, 5, batches=3, done=done, batch_size=4, unit="image"):
        log.add_step({"loss_m": 1.0, "acc": 50.0})
        log.add_step({"loss_m": 2.0})
    log.record_epoch(1)
    epoch = read_record(tmp_path).epochs[1]
    assert epoch["terms"] == {"loss_m": 1.5, "acc": 50.0}
    assert (epoch["seconds"] is None) == bool(done)


def test_an_epoch_that_is_interrupted_is_not_recorded(tmp_path: Path) -> None:
    log = EpochLog()
    log.start_record(tmp_path, start_epoch=0)
    with pytest.raises(KeyboardInterrupt), log.epoch(1, 5, batches=3, done=0, batch_size=4, unit="image"):
        raise KeyboardInterrupt
    assert not (tmp_path / "record.json").exists()


def test_held_out_identities_choose_before_a_test_set() -> None:
    assert selecting_map({}) == (-1.0, "the test set ")
    assert selecting_map({"market1501": 0.3, "dukemtmcreid": 0.2}) == (0.2, "the test set dukemtmcreid")
    assert selecting_map({"validation": 0.4, "market1501": 0.3}) == (0.4, "held-out identities")


def test_a_collapse_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = CollapseMonitor()
    for spread in (1.0, 0.02, 0.005, 0.001):
        monitor(spread)
    assert capsys.readouterr().out.count("The features collapse to one point: their mean distance is 5.0e-03") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_freq": 0}, "save_freq must be at least 1, got 0"),
        ({"keep": -1}, "keep must be at least 0, got -1"),
        ({"nonfinite": "Skip"}, "nonfinite must be one of 'stop', 'skip', got 'Skip'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainOptions(**options)


def test_an_engine_takes_one_model_and_torchreids_positions_and_can_be_copied(
    datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    with pytest.raises(ValueError, match="ImageSNEngine trains and saves one model: it has 'model', got 'second'"):
        training.register_model("second", training.model, training.optimizer)
    training.forward_backward(dict(next(iter(datamanager.train_loader))))  # to warm up; it is no part of the run
    copied = copy.deepcopy(training)
    training.run(str(tmp_path / "a"), 1, 0, 1)  # print_freq
    copied.run(save_dir=str(tmp_path / "b"), max_epoch=1, start_epoch=0, print_freq=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch: ")]
    assert len(lines) == 2 * len(training.train_loader)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, copied.model.state_dict()[name])
    with pytest.raises(TypeError, match="multiple values for argument 'print_freq'"):
        training.run(str(tmp_path), 1, 0, 1, print_freq=2)


def test_a_writer_takes_what_torchs_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = EventWriter(str(tmp_path), batches=5)
    writer.add_scalar("a", 1.0)
    writer.add_scalar("a", scalar_value=1.0, global_step=3)
    writer.add_scalar("Test/a", 1.0, 3)
    writer.close()
    assert capsys.readouterr().out == ""
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("a")] == [0, 3]
    assert [event.step for event in events.Scalars("Test/a")] == [20]


def test_a_data_set_need_not_be_torchreids(datamanager: Any, tmp_path: Path) -> None:
    class Plain(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return datamanager.train_loader.dataset[index]

    theirs = copy.copy(datamanager)
    theirs.train_loader = DataLoader(Plain(), batch_size=8)
    training = make_engine(ImageSNEngine, theirs)
    training.run(save_dir=str(tmp_path), max_epoch=1)
    assert training.checkpointer.newest.name == "model.pth.tar-1"
