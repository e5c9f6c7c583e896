"""`model.resume auto`, which goes on from a checkpoint or leaves all of them as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, make_engine

from torchreid_snloss import ImageSNEngine
from torchreid_snloss.checkpoint import CheckpointError, find_newest, load_checkpoint, save_checkpoint
from torchreid_snloss.engine.differences import RunDifferences

SN = ("loss.name", "sn", "train.keep", 0)
AUTO = ("model.resume", "auto")


@pytest.fixture
def trained(train: Callable[..., Done], in_folder: Path) -> Path:
    """A folder with the checkpoints of two epochs and the best one."""
    assert train(*SN, "train.max_epoch", 2).code == 0
    return in_folder / "log/model"


def make_later(path: Path, **changes: Any) -> None:
    save_checkpoint({**torch.load(path, weights_only=True), "format_version": 99, **changes}, path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(done: Done, folder: Path, before: dict[str, bytes]) -> str:
    """The one line of a run that has not started and has left all checkpoints as they were."""
    assert done.code == 2, done.out
    assert done.err.count("\n") == 1
    assert contents(folder) == before
    assert "set another data.save_dir, or move the checkpoints away" in done.err
    return done.err


@pytest.mark.parametrize(
    "damage", ["all later", "all damaged", "only a damaged best", "the newest later", "best later"]
)
def test_what_can_not_be_read_is_not_overwritten(damage: str, trained: Path, train: Callable[..., Done]) -> None:
    files = sorted(trained.iterdir())
    assert [path.name for path in files] == ["model-best.pth.tar", "model.pth.tar-1", "model.pth.tar-2"]
    if damage == "only a damaged best":
        for path in files[1:]:
            path.unlink()
    if damage in ("all damaged", "only a damaged best"):
        files[0].write_bytes(files[0].read_bytes()[:3000])
    for path in files[1:] if damage == "all damaged" else ():
        path.write_bytes(path.read_bytes()[:3000])
    if damage == "best later":
        files[2].unlink()
    for path in {"all later": files, "the newest later": files[2:], "best later": files[:1]}.get(damage, []):
        make_later(path)
    before = contents(trained)
    line = refused(train(*SN, *AUTO, "train.max_epoch", 4), trained, before)
    assert ("by a later version of torchreid-snloss, in format 99" in line) == ("later" in damage)


def test_an_older_one_of_a_later_version_is_passed_over(
    trained: Path, train: Callable[..., Done], capsys: pytest.CaptureFixture[str]
) -> None:
    make_later(trained / "model.pth.tar-1")
    assert find_newest(trained) == trained / "model.pth.tar-2"
    # What a later version names otherwise: the number in the file's name counts.
    save_checkpoint({"format_version": 2, "weights": {}}, trained / "model.pth.tar-1")
    assert find_newest(trained) == trained / "model.pth.tar-2"
    shutil.copy(trained / "model.pth.tar-1", trained / "model.pth.tar-3")
    with pytest.raises(CheckpointError, match="in format 2"):
        find_newest(trained)
    # A restart looks for its own run only.
    run = load_checkpoint(trained / "model.pth.tar-2")["run"]
    assert find_newest(trained, run) == trained / "model.pth.tar-2"
    assert find_newest(trained, "another") is None


def test_the_best_alone_is_gone_on_from(trained: Path, train: Callable[..., Done]) -> None:
    for path in trained.glob("model.pth.tar-*"):
        path.unlink()
    done = train(*SN, *AUTO, "train.max_epoch", 3)
    assert done.code == 0, done.err
    assert 'Resuming from "log/model/model-best.pth.tar", after 2 epochs' in done.out


def test_a_test_needs_a_checkpoint(train: Callable[..., Done], in_folder: Path) -> None:
    done = train(*SN, *AUTO, "test.evaluate", True)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "model.resume auto: no checkpoint in log/model" in done.err
    assert train(*SN, "train.max_epoch", 1, "data.save_dir", "other").code == 0
    assert train(*SN, *AUTO, "test.evaluate", True, "data.save_dir", "other").code == 0
    weights = ("model.load_weights", "other/model/model.pth.tar-1")
    assert train(*SN, *AUTO, "test.evaluate", True, *weights).code == 0


def test_a_difference_is_one_short_line(trained: Path, train: Callable[..., Done]) -> None:
    path = trained / "model.pth.tar-2"
    checkpoint = load_checkpoint(path)
    settings = {**checkpoint["settings"], "train.lr": "1\nEPOCH 99\x1b[31m", "data.transforms": ["x" * 100_000]}
    save_checkpoint({**checkpoint, "settings": settings}, path)
    done = train(*SN, *AUTO, "train.max_epoch", 3)
    assert done.code == 0, done.err
    assert "=> train.lr: '1\\nEPOCH 99\\x1b[31m' in the checkpoint, 0.0003 in the config, which is used\n" in done.out
    lines = [line for line in done.out.splitlines() if " in the checkpoint, " in line]
    assert len(lines) == 3
    assert max(map(len, lines)) < 300
    settings = {**checkpoint["settings"], "model.neck": "a\nb" + "x" * 1000}
    save_checkpoint({**load_checkpoint(trained / "model.pth.tar-3"), "settings": settings}, trained / "model.pth.tar-3")
    done = train(*SN, *AUTO, "train.max_epoch", 3)
    assert done.code == 2
    assert "it was trained with 'a\\nbxx" in done.err
    assert len(done.err) < 500


UNUSED = {
    "sampler.num_cams": 2,
    "sampler.num_datasets": 2,
    "sampler.train_sampler_t": "SequentialSampler",
    "data.load_train_targets": True,
    "cuhk03.labeled_images": True,
    "cuhk03.classic_split": True,
    "adam.beta1": 0.5,
}
USED = {
    "sampler.num_instances": ({}, 2),
    "sampler.num_cams": ({"sampler.train_sampler": "RandomDomainSampler"}, 2),
    "sampler.num_datasets": ({"sampler.train_sampler": "RandomDatasetSampler"}, 2),
}
SETTINGS = {
    "data.type": "image", "data.sources": ["dukemtmcreid"], "data.targets": ["dukemtmcreid"], "train.optim": "sgd",
    "sampler.train_sampler": "IdentitySampler", "sampler.num_instances": 4, "sampler.num_cams": 1,
    "sampler.num_datasets": 1, "sampler.train_sampler_t": "RandomSampler", "data.load_train_targets": False,
    "cuhk03.labeled_images": False, "cuhk03.classic_split": False, "market1501.use_500k_distractors": False,
    "adam.beta1": 0.9, "test.evaluate": False,
}  # fmt: skip


def compare(before: dict[str, Any], now: dict[str, Any]) -> RunDifferences:
    return RunDifferences({"settings": before}, {"settings": now, "batches": {}, "criterion": None}, "a file")


def test_keys_that_are_not_used_change_no_order() -> None:
    changed = compare(SETTINGS, {**SETTINGS, **UNUSED, "market1501.use_500k_distractors": True})
    assert not changed.other_order
    assert changed.lines([]) == []
    for key, (needs, value) in USED.items():
        changed = compare({**SETTINGS, **needs}, {**SETTINGS, **needs, key: value})
        assert changed.other_order, key
        assert len(changed.lines([])) == 1
    for name, key in (("cuhk03", "cuhk03.labeled_images"), ("market1501", "market1501.use_500k_distractors")):
        sets = {**SETTINGS, "data.targets": [name]}
        assert len(compare(sets, {**sets, key: True}).lines([])) == 1


def test_a_run_in_the_middle_of_an_epoch_goes_on_with_other_unused_keys(
    datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    training.checkpointer.settings = SETTINGS
    training.checkpointer.start(tmp_path, training=True)
    training.checkpointer.state.batch = 2
    training.checkpointer.save(1, keep=0)
    again = make_engine(ImageSNEngine, datamanager)
    again.checkpointer.settings = {**SETTINGS, **UNUSED}
    assert again.resume(tmp_path / "model/model.pth.tar-1.2") == 1
    assert again.checkpointer.state.batch == 2


def test_each_folder_has_its_own_best(datamanager: Any, tmp_path: Path) -> None:
    def best(name: str) -> float:
        return float(load_checkpoint(tmp_path / name / "model/model-best.pth.tar")["progress"]["best"])

    training = make_engine(ImageSNEngine, datamanager)
    training.run(save_dir=str(tmp_path / "a"), max_epoch=1)
    training.checkpointer.state.best = 0.999  # no later evaluation is better
    training.run(save_dir=str(tmp_path / "a"), max_epoch=1, test_only=True)
    training.run(save_dir=str(tmp_path / "b"), max_epoch=1, test_only=True)
    assert training.checkpointer.state.best == 0.999, "a test changes nothing"
    training.run(save_dir=str(tmp_path / "a"), max_epoch=2, start_epoch=1)
    assert load_checkpoint(tmp_path / "a/model/model-best.pth.tar")["epoch"] == 1, "the same folder, the same best"
    training.run(save_dir=str(tmp_path / "b"), max_epoch=1)
    assert 0 <= best("b") < 0.999

    # Resumed: in its own folder it goes on with its best, in a new one it starts to look for one.
    path = tmp_path / "a/model/model.pth.tar-2"
    assert load_checkpoint(path)["progress"]["best"] == 0.999
    for name, epoch in (("a", 1), ("c", 3)):
        resumed = make_engine(ImageSNEngine, datamanager)
        resumed.resume(path)
        resumed.run(save_dir=str(tmp_path / name), max_epoch=3, start_epoch=2)
        assert load_checkpoint(tmp_path / name / "model/model-best.pth.tar")["epoch"] == epoch

    # In a folder with the best of an unrelated run, too, however good that was.
    unrelated = tmp_path / "b/model/model-best.pth.tar"
    found = load_checkpoint(unrelated)
    save_checkpoint({**found, "progress": {**found["progress"], "best": 0.9999}}, unrelated)
    resumed = make_engine(ImageSNEngine, datamanager)
    resumed.resume(path)
    resumed.run(save_dir=str(tmp_path / "b"), max_epoch=3, start_epoch=2)
    assert load_checkpoint(unrelated)["epoch"] == 3
