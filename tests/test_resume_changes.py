"""What a run that is resumed may change: the schedule goes on as the config says, and each difference is named."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Tiny, make_datamanager, make_engine
from torchreid import data, optim, utils

from torchreid_snloss import ImageSNEngine, build_datamanager, load_config
from torchreid_snloss.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from torchreid_snloss.data.fingerprint import difference, fingerprint

SN = ("loss.name", "sn", "train.keep", 0)


def learning_rates(folder: Path, epochs: range) -> list[float]:
    """That of the epoch after each one."""
    return [
        load_checkpoint(folder / f"model/model.pth.tar-{epoch}")["optimizer"]["param_groups"][0]["lr"]
        for epoch in epochs
    ]


def differences(done: Done) -> list[str]:
    lines = done.out.splitlines()
    return [line.removeprefix("=> ") for line in lines if " in the checkpoint, " in line]


SCHEDULES = {
    "longer cosine": (("train.lr_scheduler", "cosine"), ("train.max_epoch", 6)),
    "longer exponential": (
        ("train.lr_scheduler", "exponential", "train.stepsize", "[1]", "train.gamma", 0.01),
        ("train.max_epoch", 6),
    ),
    "lr": ((), ("train.lr", 0.5, "train.max_epoch", 4)),
    "steps": (("train.stepsize", "[2]"), ("train.stepsize", "[3]", "train.gamma", 0.5, "train.max_epoch", 6)),
    "warm-up": (
        ("train.warmup_epochs", 2, "train.lr_scheduler", "cosine"),
        ("train.warmup_epochs", 5, "train.warmup_factor", 0.1, "train.max_epoch", 6),
    ),
    "another kind": (
        ("train.lr_scheduler", "multi_step", "train.stepsize", "[1, 2]"),
        ("train.lr_scheduler", "cosine", "train.max_epoch", 5),
    ),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_the_configs_schedule_goes_on(case: str, train: Callable[..., Done], in_folder: Path) -> None:
    before, changes = SCHEDULES[case]
    short = (*SN, "train.max_epoch", 3, *before)
    assert train(*short).code == 0
    done = train(*short, *changes, "model.resume", "auto")
    assert done.code == 0, done.err
    assert train(*short, *changes, "data.save_dir", "whole").code == 0
    epochs = range(4, dict(zip(changes[::2], changes[1::2]))["train.max_epoch"] + 1)
    expected = learning_rates(in_folder / "whole", epochs)
    assert learning_rates(in_folder / "log", epochs) == expected
    assert {line.split(":")[0] for line in differences(done)} == set(changes[::2])
    # Resumed once more, nothing differs.
    assert not differences(train(*short, *changes, "model.resume", "auto"))


def test_each_difference_is_a_line_and_the_config_counts(train: Callable[..., Done], in_folder: Path) -> None:
    assert train(*SN, "train.max_epoch", 1).code == 0
    changes = {
        "train.weight_decay": 0.1,
        "adam.beta1": 0.8,
        "train.batch_size": 16,
        "train.seed": 2,
        "data.height": 64,
        "data.transforms": "[]",
        "sampler.num_instances": 2,
        "loss.name": "fidi",
        "sgd.momentum": 0.5,
        "train.print_freq": 3,
        "train.max_epoch": 2,
    }
    done = train(*SN, *(item for pair in changes.items() for item in pair), "model.resume", "auto")
    assert done.code == 0, done.err
    of_no_effect = {"data.height", "sgd.momentum", "train.print_freq"}
    assert {line.split(":")[0] for line in differences(done)} == set(changes) - of_no_effect
    assert "=> train.weight_decay: 0.0005 in the checkpoint, 0.1 in the config, which is used" in done.out
    last = load_checkpoint(in_folder / "log/model/model.pth.tar-2")
    group = last["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"], last["progress"]["seed"]) == (0.1, (0.8, 0.999), 2)


@pytest.mark.parametrize(
    ("before", "key", "value"),
    [
        ((), "train.optim", "amsgrad"),
        (("train.optim", "amsgrad"), "train.optim", "adam"),
        ((), "train.optim", "sgd"),
        ((), "train.staged_lr", True),
        (("train.optim", "rmsprop"), "sgd.momentum", 0.0),
    ],
)
def test_what_can_not_be_resumed_is_refused(
    before: tuple[Any, ...], key: str, value: Any, train: Callable[..., Done]
) -> None:
    assert train(*SN, *before, "train.max_epoch", 1).code == 0
    done = train(*SN, *before, "train.max_epoch", 2, "model.resume", "auto", key, value)
    assert done.code == 2
    message = done.err.strip().splitlines()[-1]
    assert "model.pth.tar-1" in message
    assert key.split(".")[1] in message
    assert message.endswith("start from its weights with model.load_weights")


def test_epochs_that_are_done_are_told(train: Callable[..., Done]) -> None:
    assert train(*SN, "train.max_epoch", 2).code == 0
    for epochs in (2, 1):
        done = train(*SN, "train.max_epoch", epochs, "model.resume", "auto")
        assert done.code == 0
        assert f"=> max_epoch is {epochs}, and 2 epochs are trained already: this run only tests" in done.out
        assert "epoch: [" not in done.out


def test_keys_that_a_resumed_run_does_not_use_are_told(train: Callable[..., Done]) -> None:
    assert train(*SN, "train.max_epoch", 1).code == 0
    weights = "log/model/model.pth.tar-1"
    done = train(*SN, "train.max_epoch", 2, "model.resume", weights, "model.load_weights", weights)
    assert done.code == 0
    assert f"=> model.load_weights {weights} is not used, since the run is resumed" in done.out


def test_a_resumed_run_reads_no_other_weights(
    train: Callable[..., Done], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*SN, "train.max_epoch", 1).code == 0
    monkeypatch.setenv("TORCH_HOME", str(in_folder / "empty"))  # without the ImageNet weights
    monkeypatch.setattr("socket.socket", None)  # nor a network
    Path("damaged.pth.tar").write_bytes(b"no checkpoint")
    options = ("model.pretrained", True, "model.load_weights", "damaged.pth.tar", "model.resume", "auto")
    done = train(*SN, "train.max_epoch", 2, *options)
    assert done.code == 0, done.err
    assert "=> model.load_weights damaged.pth.tar is not used, since the run is resumed" in done.out
    assert "Loaded" not in done.out


def test_a_checkpoint_without_settings_is_compared_by_its_optimizer(
    train: Callable[..., Done], in_folder: Path
) -> None:
    assert train(*SN, "train.max_epoch", 2).code == 0
    checkpoint = load_checkpoint(in_folder / "log/model/model.pth.tar-2")
    old = {key: checkpoint[key] for key in ("state_dict", "epoch", "optimizer", "scheduler", "rank1")}  # as torchreid's
    save_checkpoint(old, in_folder / "old.pth")
    options = (*SN, "train.max_epoch", 3, "model.resume", "old.pth")
    same = train(*options)
    assert same.code == 0, same.err
    assert not differences(same)
    assert "the checkpoint does not say which images and labels it was trained with" in same.out
    other = train(*options, "train.lr", 0.5, "train.weight_decay", 0)
    assert "=> lr: 0.0003 in the checkpoint, 0.5 in this run, which is used" in other.out
    assert "=> weight_decay: 0.0005 in the checkpoint, 0.0 in this run, which is used" in other.out
    assert load_checkpoint(in_folder / "log/model/model.pth.tar-3")["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_an_engines_own_options_count(datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(lr: float, epochs: int, **options: Any) -> Any:
        utils.set_random_seed(1)
        model = Tiny()
        optimizer = optim.build_optimizer(model, optim="sgd", lr=lr, **options)
        scheduler = optim.build_lr_scheduler(optimizer, "cosine", max_epoch=epochs)
        return ImageSNEngine(datamanager, model, optimizer, scheduler=scheduler, use_gpu=False)

    build(0.1, 3).run(save_dir=str(tmp_path), max_epoch=3)
    path = tmp_path / "model/model.pth.tar-2"
    unchanged = build(0.1, 3)
    capsys.readouterr()
    assert unchanged.resume(path) == 2
    assert " in the checkpoint" not in capsys.readouterr().out
    stored = load_checkpoint(path)
    assert unchanged.scheduler.state_dict() == stored["scheduler"]

    changed = build(0.2, 6, momentum=0.5)
    assert changed.resume(path) == 2
    out = capsys.readouterr().out
    for line in ("lr: 0.1 in the checkpoint, 0.2", "T_max: 3.0 in the checkpoint, 6.0", "momentum: 0.9 in the chec"):
        assert f"=> {line}" in out
    assert changed.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.75)
    assert changed.optimizer.param_groups[0]["momentum"] == 0.5
    # Without a scheduler, a learning rate that was set by hand goes on.
    by_hand = make_engine(ImageSNEngine, datamanager)
    by_hand.optimizer.param_groups[0]["lr"] = 0.007
    by_hand.checkpointer.start(tmp_path / "by-hand", training=True)
    by_hand.checkpointer.save(1, keep=0)
    again = make_engine(ImageSNEngine, datamanager)
    again.resume(tmp_path / "by-hand/model/model.pth.tar-1")
    assert again.optimizer.param_groups[0]["lr"] == 0.007


def spread_identities(root: Path, reid_data: Path) -> Path:
    """A copy of the data with the training identities 1, 65, 129 ..., whose order in a set follows the listing's."""
    shutil.copytree(reid_data, root)
    for path in root.rglob("bounding_box_train/*.jpg"):
        path.rename(path.with_name(f"{(int(path.name[:4]) - 1) * 64 + 1:04d}{path.name[4:]}"))
    return root


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes folders list their files by name or backwards, as file systems may."""
    glob = data.datasets.image.market1501.glob
    listed = glob.glob

    def set_order(backwards: bool) -> None:
        monkeypatch.setattr(glob, "glob", lambda pattern: sorted(listed(pattern), reverse=backwards))

    return set_order


def test_labels_do_not_follow_the_listing(
    reid_data: Path, in_folder: Path, train: Callable[..., Done], listings: Callable[[bool], None]
) -> None:
    here = spread_identities(in_folder / "here", reid_data)
    shutil.copytree(here, in_folder / "there" / "copy")
    options = ("data.val_fraction", 0.25, "data.label_noise", 0.1, "data.outliers", 0.1)
    items = []
    for root, backwards in ((here, False), (in_folder / "there" / "copy", True)):
        listings(backwards)
        torchreids = make_datamanager(root).train_loader.dataset.train
        cfg = load_config(
            options=["data.root", str(root), "train.batch_size", 8, "data.workers", 0, "use_gpu", False, *options]
        )
        manager = build_datamanager(cfg)
        ours = manager.train_loader.dataset.train
        held_out = manager.test_dataset["validation"]["query"]
        names = [[(Path(path).name, *rest) for path, *rest in which] for which in (torchreids, ours, held_out)]
        items.append(names)
    assert items[0][0] != items[1][0], "the listing must matter to torchreid"
    assert items[0][1:] == items[1][1:]

    # A run that goes on with the copy ends as one that was left alone.
    options = (*SN, *options, "loss.memory.size", 64, "train.max_epoch")
    listings(False)
    assert train(*options, 2, "data.root", here, "data.save_dir", "alone").code == 0
    assert train(*options, 1, "data.root", here).code == 0
    listings(True)
    done = train(*options, 2, "data.root", in_folder / "there" / "copy", "model.resume", "auto")
    assert done.code == 0, done.err
    assert [line.split(":")[0] for line in differences(done)] == ["train.max_epoch"]
    alone, resumed = (load_checkpoint(in_folder / name / "model/model.pth.tar-2") for name in ("alone", "log"))
    assert alone["memory"]["images"].tolist() == resumed["memory"]["images"].tolist()
    for name, value in alone["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_other_labels_in_a_script_are_an_error(
    reid_data: Path, tmp_path: Path, listings: Callable[[bool], None]
) -> None:
    root = spread_identities(tmp_path / "data", reid_data)
    listings(False)
    make_engine(ImageSNEngine, make_datamanager(root)).run(save_dir=str(tmp_path / "log"), max_epoch=1)
    listings(True)
    engine = make_engine(ImageSNEngine, make_datamanager(root))
    message = r"trained on other images or labels: the same \d+ images, but \d+ of 16 identities have other labels"
    with pytest.raises(CheckpointError, match=message):
        engine.resume(tmp_path / "log/model/model.pth.tar-1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fewer", r"(\d+) images of 16 identities in the checkpoint, \d+ of 16 in this run, and 15 identities have"),
        ("camera", r"and 15 identities have the same images from the same cameras"),
        ("held out", r"data.val_fraction: 0.0 in the checkpoint, 0.25 in the config"),
        ("noise", r"data.label_noise: 0.0 in the checkpoint, 0.2 in the config"),
    ],
)
def test_other_training_images_are_an_error(
    change: str, message: str, reid_data: Path, in_folder: Path, train: Callable[..., Done]
) -> None:
    root = in_folder / "data"
    shutil.copytree(reid_data, root)
    options = [*SN, "data.root", root, "train.max_epoch"]
    assert train(*options, 1).code == 0
    image = sorted(root.rglob("bounding_box_train/*.jpg"))[0]
    if change == "fewer":
        image.unlink()
    elif change == "camera":
        image.rename(image.with_name(image.name.replace(image.name[4:7], "_c6" if "_c6" not in image.name else "_c5")))
    changes = {"held out": ("data.val_fraction", 0.25), "noise": ("data.label_noise", 0.2)}.get(change, ())
    done = train(*options, 2, *changes, "model.resume", "auto")
    assert done.code == 2
    error = done.err.strip().splitlines()[-1]
    assert re.search(message, error), error
    # A test does not need the training images.
    assert train(*options, 2, *changes, "model.resume", "log/model/model.pth.tar-1", "test.evaluate", True).code == 0


def test_a_fingerprint_is_of_names_labels_and_cameras() -> None:
    items = [(f"/a/b/c{camera}/{pid}_{camera}.jpg", pid, camera, 0) for pid in range(3) for camera in range(2)]
    moved = [(path.replace("/a/b", "/x"), *rest) for path, *rest in items]
    assert fingerprint(items) == fingerprint(moved)
    shuffled = fingerprint(items[::-1])
    assert shuffled != fingerprint(items)
    assert difference(fingerprint(items), shuffled) == ""
    assert "2 of 3 identities have other labels" in difference(
        fingerprint(items), fingerprint([(path, {0: 1, 1: 0, 2: 2}[pid], *rest) for path, pid, *rest in items])
    )
    for other in ([*items[:-1], (items[-1][0], 2, 5, 0)], items[:-1], [*items[:-1], ("/a/b/c1/x.jpg", 2, 1, 0)]):
        assert difference(fingerprint(items), fingerprint(other))


def test_batches_of_another_order_start_the_epoch_again(
    datamanager: Any, reid_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    training.checkpointer.start(tmp_path, training=True)
    training.checkpointer.state.batch = 2
    training.checkpointer.save(1, keep=0)
    path = tmp_path / "model/model.pth.tar-1.2"
    same = make_engine(ImageSNEngine, datamanager)
    assert same.resume(path) == 1
    assert same.checkpointer.state.batch == 2
    capsys.readouterr()
    other = make_engine(ImageSNEngine, make_datamanager(reid_data, batch_size_train=16))
    assert other.resume(path) == 1
    assert other.checkpointer.state.batch == 0
    out = capsys.readouterr().out
    assert "=> batch_size: 32 in the checkpoint, 16 in this run, which is used" in out
    assert "=> Those batches are trained again, since this run draws other ones" in out


def test_a_copy_with_other_times_goes_on_from_the_newest(train: Callable[..., Done], in_folder: Path) -> None:
    assert train(*SN, "train.max_epoch", 3).code == 0
    shutil.copytree(in_folder / "log", in_folder / "copy", copy_function=shutil.copyfile)
    for age, path in enumerate(sorted((in_folder / "copy/model").glob("model.pth.tar-*"))):
        os.utime(path, ns=(10**18 - age, 10**18 - age))
    done = train(*SN, "train.max_epoch", 4, "data.save_dir", "copy", "model.resume", "auto")
    assert 'Resuming from "copy/model/model.pth.tar-3", after 3 epochs' in done.out
