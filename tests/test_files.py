"""Files are not trusted: damage, content of any type, names in them, and what does not fit."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import Done, make_engine
from torch import nn
from torchreid import models, optim

from torchreid_snloss import ImageSNEngine, load_weights
from torchreid_snloss.checkpoint import CheckpointError, atomic_write, find_newest, load_checkpoint, save_checkpoint
from torchreid_snloss.checkpoint.optimizer_state import class_names
from torchreid_snloss.compare.ranked import average_precisions
from torchreid_snloss.engine.checkpointer import Checkpointer
from torchreid_snloss.engine.random_state import random_states
from torchreid_snloss.record import RecordError, read_average_precisions, read_features, read_record
from torchreid_snloss.run.writable import check_replaceable

WEIGHT = "convolution.weight"


@pytest.fixture(scope="module")
def adam(datamanager: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an epoch with Adam."""
    folder = tmp_path_factory.mktemp("adam")
    make_engine(ImageSNEngine, datamanager, optimizer="adam").run(save_dir=str(folder), max_epoch=1)
    return folder / "model" / "model.pth.tar-1"


def resume(datamanager: Any, path: Path, optimizer: str = "adam") -> Any:
    training = make_engine(ImageSNEngine, datamanager, optimizer=optimizer)
    training.resume(path)
    return training


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x40
    path.write_bytes(content)


def test_names_in_a_checkpoint_delete_no_other_files(train: Callable[..., Done], in_folder: Path) -> None:
    options = ("loss.name", "sn", "train.keep", 1, "train.max_epoch")
    assert train(*options, 1).code == 0
    folder = in_folder / "log" / "model"
    (folder / "sub").mkdir()
    names = ["../precious", str(in_folder / "precious"), "sub/model.pth.tar-0", "../model/precious", "precious", ".."]
    names += ["model-best.pth.tar", "model.pth.tar-60", "model.pth.tar-1\n", "../model.pth.tar-1"]
    files = [folder / name for name in names if not (folder / name).exists()]
    for file in files:
        file.write_text("precious")
    checkpoint = load_checkpoint(folder / "model.pth.tar-1")
    checkpoint["progress"]["written"] = [*names, "model.pth.tar-1"]
    save_checkpoint(checkpoint, folder / "model.pth.tar-1")
    done = train(*options, 3, "model.resume", "log/model/model.pth.tar-1")
    assert done.code == 0, done.err
    assert all(file.read_text() == "precious" for file in files)
    assert (folder / "model-best.pth.tar").exists()
    assert not (folder / "model.pth.tar-1").exists()  # the run's own


def test_a_flipped_bit_is_seen_anywhere(adam: Path, tmp_path: Path) -> None:
    whole, path, rng = load_checkpoint(adam), tmp_path / "model.pth.tar-1", random.Random(0)
    content = adam.read_bytes()
    refused = 0
    for position in [*range(0, 40), *(rng.randrange(len(content)) for _ in range(200)), len(content) - 5]:
        shutil.copy(adam, path)
        flip(path, position)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            assert "damaged or not a checkpoint" in str(error)  # noqa: PT017
            refused += 1
            continue
        for name, value in whole["state_dict"].items():  # a byte that pads or dates
            assert torch.equal(value, loaded["state_dict"][name])
    assert refused > 180
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
            load_checkpoint(path)


def change_directory(content: bytearray, name: bytes, offset: int, bits: int) -> None:
    """Flips bits in the entry of a part in the directory at the end of a zip archive."""
    entry = content.rindex(name) - 46  # its name comes last in the file here
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + offset] ^= bits


@pytest.mark.parametrize(
    ("part", "offset", "bits", "message"),
    [
        (b"/data/0", 38, 0x10, "data/0' is marked as a folder"),
        (b"/data.pkl", 38, 0x10, "data.pkl' is marked as a folder"),
        (b"/data/0", 38, 0x12, "data/0' is marked as a folder"),
        (b"/data/0", 8, 0x02, "is not the one that its directory lists"),
        (b"/data/0", 10, 0x08, "is not the one that its directory lists"),
        (b"/data/0", 46 + 12, 0x01, "is there twice"),  # another part's name
    ],
)
def test_what_an_archive_says_of_a_part_is_checked(
    part: bytes, offset: int, bits: int, message: str, adam: Path, tmp_path: Path
) -> None:
    content = bytearray(adam.read_bytes())
    with zipfile.ZipFile(adam) as archive:
        folder = archive.infolist()[0].filename.split("/")[0].encode()
    offset += len(folder) - 6 if offset > 46 else 0
    change_directory(content, folder + part, offset, bits)
    path = tmp_path / "model.pth.tar-1"
    path.write_bytes(content)
    for load in (load_checkpoint, lambda path: load_weights(nn.Linear(2, 2), path)):
        with pytest.raises(CheckpointError, match=message):
            load(path)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        find_newest(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="longer paths than Windows takes")
def test_a_name_of_any_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".npz")
    check_replaceable(tmp_path, [path.name])
    atomic_write(path, lambda stream: stream.write(b"whole"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"whole"
    with pytest.raises(OSError, match="File name too long"):
        check_replaceable(tmp_path, [f"x{path.name}"])


def test_a_torchscript_model_is_named(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "model.pth"))
    with pytest.raises(CheckpointError, match=r"is a TorchScript model, which holds code; save the state_dict\(\)"):
        load_checkpoint(tmp_path / "model.pth")


def test_a_model_whose_classifier_alone_fits_is_another(tmp_path: Path) -> None:
    """Two models of one training set have classifiers of one size."""
    torch.save(models.build_model("mobilenetv2_x1_0", 16, pretrained=False).state_dict(), tmp_path / "x")
    with pytest.raises(CheckpointError, match="belongs to another model: none of its"):
        load_weights(models.build_model("resnet50", 16, pretrained=False), tmp_path / "x")


def test_names_in_a_file_are_escaped_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, names = nn.Linear(2, 2), ("evil\nname\x1b[31m", "\u202e", "long" * 10**4)
    torch.save({**model.state_dict(), **{name: torch.zeros(1) for name in names}}, tmp_path / "x")
    load_weights(model, tmp_path / "x")
    line = capsys.readouterr().out.splitlines()[1]
    assert "the model has no evil\\nname\\x1b[31m; the model has no \\u202e; the model has no longlong" in line
    assert len(line) < 500
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "x", complete=True)
    assert str(caught.value).isprintable()
    torch.save({"evil\n": torch.tensor(math.nan)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"its layer evil\\n holds NaN"):
        load_weights(model, tmp_path / "x")


def test_a_run_goes_on_before_a_damaged_checkpoint_and_takes_no_weights_of_it(
    train: Callable[..., Done], in_folder: Path
) -> None:
    assert train("loss.name", "sn", "train.max_epoch", 2).code == 0
    newest = in_folder / "log/model/model.pth.tar-2"
    with zipfile.ZipFile(newest) as archive:
        offset = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data/0"))
    flip(newest, offset + 200)
    for option in ("model.resume", "model.load_weights"):
        done = train("loss.name", "sn", option, "log/model/model.pth.tar-2")
        assert done.code == 2
        assert "does not match its checksum" in done.err
        assert done.err.count("\n") == 1
    done = train("loss.name", "sn", "train.max_epoch", 2, "model.resume", "auto")
    assert done.code == 0
    assert "** Skipped a checkpoint: can't load 'log/model/model.pth.tar-2'" in done.out
    assert 'Resuming from "log/model/model.pth.tar-1"' in done.out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><title>404</title>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"what is this", "torch did not write it"),
        (b"\x80\x02}q\x00.", "damaged or not a checkpoint"),
        (pickle.dumps({"a": print}), "damaged or not a checkpoint"),
        (None, "No such file"),
        ("folder", "Is a directory"),
    ],
)
def test_the_reason_is_that_of_the_file(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Pickles strings and bytes as Python 2 did, both as the same type."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, text: str | bytes) -> None:
        encoded = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"U" + bytes([len(encoded)]) + encoded)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def test_files_of_python_2_and_of_torch_before_1_6(tmp_path: Path) -> None:
    path, weights = tmp_path / "model.pth.tar", {"module.a": torch.randn(3)}
    content = {"state_dict": weights, "epoch": 60, "rank1": np.float64(0.9469), "arch": "osnet"}
    module = SimpleNamespace(Pickler=_Python2Pickler, dump=pickle.dump, __name__="pickle")
    for options in ({}, {"pickle_module": module}):
        torch.save(content, path, _use_new_zipfile_serialization=False, **options)
        loaded = load_checkpoint(path)
        assert torch.equal(loaded["state_dict"]["module.a"], weights["module.a"])
        assert (loaded["rank1"], loaded["arch"]) == (0.9469, "osnet")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint(path)


ENDLESS: dict[str, Any] = {"x": []}
ENDLESS["x"] += [ENDLESS["x"], ENDLESS["x"]]
# What is put into a checkpoint in which place, and a part of the message.
MALFORMED: list[tuple[str, Any, str]] = [
    ("epoch", -5, "its epoch must be an integer from 0"),
    ("epoch", 10**30, "its epoch must be an integer from 0"),
    ("epoch", 10**6000, "it holds more than data"),  # in a pickle, a kind of its own
    ("epoch", True, "its epoch must be an integer from 0"),
    ("epoch", math.nan, "its epoch must be an integer from 0"),
    ("progress", None, "its progress must be a dictionary, got None"),
    ("progress", {}, "its progress has no seed"),
    ("progress.of_a_later_version", 1, r"its progress holds \['of_a_later_version'\]"),
    ("progress.seed", -1, "progress.seed must be an integer from 0"),
    ("progress.batch", 2, "in the middle of an epoch and has no random states"),
    ("progress.best", math.nan, "progress.best must be of type float"),
    ("progress.best", 1.5, "progress.best must be from -1 to 1"),
    ("progress.rank1", -2, "progress.rank1 must be from -1 to 1"),
    ("progress.written", "../x", r"progress.written must be of type list\[str\]"),
    ("random_states", {"python": 1}, "its random states are not those of"),
    ("random_states", [], "its random states must be a dictionary"),
    ("optimizer", {"state": {}}, "its optimizer has no param_groups"),
    ("optimizer.param_groups", [], "its optimizer has 0 param_groups"),
    ("optimizer.param_groups.0.params", [0], "must have 6 parameters"),
    ("optimizer.param_groups.0.lr", math.nan, "its optimizer has lr 'nan'"),
    ("optimizer.param_groups.0.betas", 0.9, "its optimizer has betas"),
    ("optimizer.state.0.exp_avg", torch.zeros(3), "its optimizer's exp_avg has shape"),
    ("optimizer.state.0.exp_avg", torch.full((8, 3, 8, 8), torch.nan), "exp_avg holds NaN or infinity"),
    ("optimizer.state.0", {"step": 1}, "its state has no exp_avg"),
    ("optimizer.state", {}, "its optimizer has the state of 0 of 6 parameters"),
    ("optimizer.state.0", {}, "has lost the state of a parameter, which Adam keeps"),
    ("optimizer.state.0.exp_avg_sq", torch.full((8, 3, 8, 8), -1.0), "exp_avg_sq must not be negative"),
    ("optimizer.param_groups.0.initial_lr", torch.zeros(1).to_sparse(), "its optimizer has initial_lr"),
    ("optimizer.param_groups.0.initial_lr", "x", "its optimizer has initial_lr 'x'"),
    ("optimizer.param_groups.0.initial_lr", math.inf, "its optimizer has initial_lr 'inf'"),
    ("optimizer.param_groups.0.initial_lr", 1j, "its optimizer has initial_lr '1j'"),
    ("optimizer.param_groups.0.lr", torch.zeros(1, device="meta"), "its optimizer has lr"),
    ("optimizer.param_groups.0.other", [torch.zeros(2).to_sparse()], "must be a dense tensor"),
    ("optimizer.state.0.step", "x", "its optimizer's step must be a number"),
    ("scheduler", None, "its scheduler must be a dictionary"),
    ("scheduler.last_epoch", "x", "its scheduler has last_epoch 'x'"),
    ("scheduler.last_epoch", 0, "last_epoch 0, which is not where epoch 1 is"),
    ("scheduler.last_epoch", 2, "last_epoch 2, which is not where epoch 1 is"),
    ("scheduler.last_epoch", 9_999_999, "last_epoch 9999999, which is not where epoch 1 is"),
    ("epoch", 3, "last_epoch 1, which is not where epoch 3 is"),
    ("scheduler._schedulers", [1], "its scheduler's parts must be dictionaries"),
    ("scheduler.other", torch.zeros(2).to_sparse(), "its scheduler.other must be a dense tensor"),
    ("counts", {}, r"its counts.optimizer_states must be an integer"),
    ("counts.schedule_start", 1.0, r"its counts.schedule_start must be an integer"),
    ("settings", torch.zeros(2), "its settings must be a dictionary"),
    ("settings", {"train.lr": torch.zeros(2)}, r"its settings.train.lr must be plain data, got torch.float32"),
    ("settings", {"train.lr": torch.zeros(2).to_sparse()}, r"its settings.train.lr must be plain data"),
    ("settings", {"train.lr": [{"a": [torch.zeros(2, device="meta")]}]}, r"its settings.train.lr must be plain data"),
    ("settings", {"train.lr": 1j}, r"its settings.train.lr must be plain data, got a complex"),
    ("settings", {(1, 2): 1}, "its settings must have names as keys"),
    ("scheduler", {1: 2}, "its scheduler must have names as keys"),
    ("settings", ENDLESS, r"its settings.x must be plain data"),
    ("batches", [1], "its batches must be a dictionary"),
    ("batches.batch_size", torch.ones(2), r"its batches.batch_size must be plain data"),
    ("batches.batch_size", "x", r"its batches.batch_size must be an integer"),
    ("batches.num_instances", torch.ones(2), r"its batches.num_instances must be plain data"),
    ("batches.images", {"a": 1}, r"its batches.images.images must be an integer"),
    ("batches.images.labels", [1, 2], r"its batches.images.labels must be a dictionary"),
    ("batches.images.labels", {1: "a", "b": "c"}, r"its batches.images.labels must be integers with digests"),
    ("batches.images.labels", {1: 2}, r"its batches.images.labels must be integers with digests"),
    ("batches.images.order", None, r"its batches.images.order must be a digest"),
    ("scheduler.base_lrs", [], "its scheduler has base_lrs"),
    ("criterion", [1], "the criterion's parameters must be a dictionary"),
    ("scaler", {"scale": 1.0}, "its scaler.growth_factor must be a positive number"),
    ("scaler", torch.ones(2), "its scaler must be a dictionary"),
    ("memory", {"features": None}, "its memory must hold features, pids and images"),
    ("memory", [torch.zeros(2)], "its memory must be a dictionary"),
    ("memory", {"features": torch.zeros(2, 3), "pids": torch.zeros(3).long()}, "its memory.images must be a tensor"),
    ("format_version", 2, "written by a later version of torchreid-snloss, in format 2"),
    *(
        ("format_version", value, "its format version must be an integer")
        for value in ("2", 2.0, torch.tensor(2), None)
    ),
    ("classes", {"optimizer": 1}, "its classes must be names"),
    ("state_dict", [1], "holds no model weights"),
    ("state_dict.norm.weight", torch.full((8,), torch.nan), "norm.weight holds NaN or infinity"),
    ("state_dict.norm.running_var", torch.full((8,), -1.0), "norm.running_var must be variances, got negative ones"),
    ("state_dict.module.norm.weight", torch.zeros(8), "it has a layer norm.weight twice, once as module.norm.weight"),
    ("state_dict.norm.weight", torch.zeros(8).to_sparse(), "must be a dense tensor, got a sparse_coo one"),
    ("state_dict.norm.weight", torch.zeros(8, device="meta"), "must be a dense tensor, got a meta one"),
    ("state_dict.norm.weight", torch.zeros(8, dtype=torch.complex64), "must be real, got torch.complex64"),
    ("state_dict.norm.weight", torch.zeros(8, dtype=torch.bool), "is torch.bool in the checkpoint"),
    ("state_dict.norm.weight", torch.zeros(8, dtype=torch.int64), "is torch.int64 in the checkpoint"),
    ("state_dict.norm.weight", torch.full((8,), 1e300, dtype=torch.float64), "as torch.float32 holds NaN or infinity"),
    ("state_dict.norm.weight", torch.zeros(1).expand(10**5, 10**5), "more elements than are stored"),
    ("state_dict.norm.weight", [1.0], "must be a tensor, got a list"),
    ("state_dict.norm.weight", torch.zeros(9), r"norm.weight has shape \(9,\) in the checkpoint and \(8,\)"),
    ("state_dict.5", torch.zeros(1), "the model has no 5"),
]


@pytest.mark.parametrize(("place", "value", "message"), MALFORMED, ids=[f"{p}-{m[-30:]}" for p, _, m in MALFORMED])
def test_malformed_content_is_named_and_nothing_is_loaded(
    place: str, value: Any, message: str, adam: Path, datamanager: Any, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(adam)
    if place.startswith("state_dict."):
        checkpoint["state_dict"][place.removeprefix("state_dict.")] = value
    else:
        *parents, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
        part: Any = checkpoint
        for name in parents:
            part = part[name]
        part[last] = value
    save_checkpoint(checkpoint, tmp_path / "model.pth.tar-1")
    training = make_engine(ImageSNEngine, datamanager, optimizer="adam")
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    if place == "format_version" or ("running_var" in place or "module" in place):
        with pytest.raises(CheckpointError, match=message):
            load_weights(training.model, tmp_path / "model.pth.tar-1")
    with pytest.raises(CheckpointError, match=message) as caught:
        training.resume(tmp_path / "model.pth.tar-1")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    if place != "memory":  # the dimension of its features is known last
        assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())


def test_a_batch_that_no_epoch_has_is_named(datamanager: Any, of_optimizers: dict[str, Path], tmp_path: Path) -> None:
    training = make_engine(ImageSNEngine, datamanager, optimizer="adam")
    checkpoint = load_checkpoint(of_optimizers["adam"])
    checkpoint["random_states"] = random_states()
    for batch in (len(training.train_loader), 10**6):
        checkpoint["progress"]["batch"] = batch
        save_checkpoint(checkpoint, tmp_path / "x")
        with pytest.raises(CheckpointError, match=rf"progress\.batch is {batch}, but an epoch has \d+ batches"):
            training.resume(tmp_path / "x")
    checkpoint["progress"]["batch"] = len(training.train_loader) - 1
    save_checkpoint(checkpoint, tmp_path / "x")
    training.resume(tmp_path / "x")


def test_a_checkpoint_that_counts_nothing_has_the_state_and_the_schedule_of_its_epoch(
    adam: Path, datamanager: Any, tmp_path: Path
) -> None:
    old = {key: value for key, value in load_checkpoint(adam).items() if key != "counts"}
    save_checkpoint(old, tmp_path / "x")
    resume(datamanager, tmp_path / "x")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": {**old["optimizer"], "state": {}}}, "its optimizer has lost its state: Adam keeps one"),
        ({"epoch": 6}, "last_epoch 1, which is not where epoch 6 is"),
    ]
    for change, message in changes:
        save_checkpoint({**old, **change}, tmp_path / "x")
        with pytest.raises(CheckpointError, match=message):
            resume(datamanager, tmp_path / "x")
    save_checkpoint({**old, "epoch": 6, "settings": {"train.start_epoch": 5}}, tmp_path / "x")
    resume(datamanager, tmp_path / "x")


def test_a_run_that_starts_in_a_later_epoch_can_be_resumed_and_each_part_of_a_chain_is_checked(
    train: Callable[..., Done], in_folder: Path
) -> None:
    options = ("loss.name", "sn", "train.warmup_epochs", 2, "train.start_epoch", 3, "train.max_epoch")
    assert train(*options, 4).code == 0
    path = "log/model/model.pth.tar-4"
    checkpoint = load_checkpoint(path)
    done = train(*options, 5, "model.resume", path)
    assert done.code == 0, done.err
    for part in checkpoint["scheduler"]["_schedulers"]:
        part["last_epoch"] += 1
        save_checkpoint(checkpoint, path)
        done = train(*options, 5, "model.resume", path)
        assert done.code == 2
        assert "its scheduler has last_epoch 2, which is not where epoch 4 is" in done.err
        part["last_epoch"] -= 1


def test_a_memory_that_is_missing_or_too_long_is_told(train: Callable[..., Done], in_folder: Path) -> None:
    options = ("loss.name", "sn", "loss.memory.size", 20, "train.max_epoch")
    assert train(*options, 1).code == 0
    path = "log/model/model.pth.tar-1"
    checkpoint = load_checkpoint(path)
    memory, checkpoint["memory"] = checkpoint["memory"], None
    save_checkpoint(checkpoint, path)
    done = train(*options, 2, "model.resume", path)
    assert done.code == 0, done.err
    assert "=> the checkpoint was trained with a memory and holds none, so it fills anew\n" in done.out
    checkpoint["memory"] = {name: torch.cat([part, part]) for name, part in memory.items()}
    save_checkpoint(checkpoint, path)
    done = train(*options, 2, "model.resume", path)
    assert done.code == 0, done.err
    rows = 2 * len(memory["pids"])
    assert f"=> memory: {rows} features in the checkpoint, of which the newest 20 are used\n" in done.out


def test_auto_skips_malformed_content_and_names_that_are_no_integers(adam: Path, tmp_path: Path) -> None:
    shutil.copy(adam, tmp_path / "model.pth.tar-1")
    (tmp_path / "model.pth.tar-9").mkdir()
    (tmp_path / "model.pth.tar-8").symlink_to("nowhere")
    checkpoint = load_checkpoint(adam)
    checkpoint["state_dict"][5] = torch.zeros(1)
    save_checkpoint(checkpoint, tmp_path / "model.pth.tar-2")
    save_checkpoint({**load_checkpoint(adam), "epoch": -5}, tmp_path / "model.pth.tar-3")
    assert find_newest(tmp_path) == tmp_path / "model.pth.tar-1"


@pytest.mark.parametrize(
    "options", [(), ("train.record", True), ("test.flip", True)], ids=lambda o: "".join(map(str, o))
)
@pytest.mark.parametrize("size", [1e38, 1e25])
def test_features_that_are_not_finite_end_a_test_with_a_line(
    options: tuple[Any, ...], size: float, train: Callable[..., Done], reid_data: Path, in_folder: Path
) -> None:
    assert train("loss.name", "sn", "train.max_epoch", 1).code == 0
    checkpoint = load_checkpoint("log/model/model.pth.tar-1")
    for name, value in checkpoint["state_dict"].items():
        if name.endswith("weight"):
            value.fill_(size)
    save_checkpoint(checkpoint, "huge.pth")
    done = train("loss.name", "sn", "model.load_weights", "huge.pth", "test.evaluate", True, *options)
    assert done.code == 1
    assert "the model's features of query images of market1501 are NaN, infinite or too large" in done.err
    (path,) = re.findall(r"those of '(.*)' among them", done.err)
    assert Path(path) in (reid_data / "market1501").rglob("query/*.jpg")
    assert done.err.count("\n") == 1


def test_weights_that_do_not_fit_end_a_test_and_are_counted_in_training(
    train: Callable[..., Done], in_folder: Path
) -> None:
    other = models.build_model("osnet_x0_5", 16, loss="triplet", pretrained=False)
    torch.save(other.state_dict(), "other.pth")
    options = ("loss.name", "sn", "model.load_weights", "other.pth", "model.name", "osnet_x0_25", "train.max_epoch", 1)
    done = train(*options, "test.evaluate", True)
    assert done.code == 2
    assert "'other.pth' belongs to another model, which can't be tested as this one: conv1.conv.weight has" in done.err
    assert len(done.err) < 600
    done = train(*options, "data.height", 32, "data.width", 16)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("=> Loaded ") and "layers" in line)
    assert "of 567 layers, " in line
    assert float(line.split("layers, ")[1].split("%")[0]) < 10
    warning = next(line for line in done.out.splitlines() if line.startswith("** Layers that differ"))
    assert len(warning) < 500


def test_a_test_needs_all_weights_but_the_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(num_classes: int, dimension: int = 8) -> nn.Module:
        layers = {"convolution": nn.Conv2d(3, dimension, 3), "norm": nn.BatchNorm2d(dimension)}
        return nn.ModuleDict({**layers, "classifier": nn.Linear(dimension, num_classes)})

    weights = build(7).state_dict()
    path = tmp_path / "weights.pth"

    def load(changed: dict[str, Any], complete: bool = True) -> str:
        torch.save(changed, path)
        load_weights(build(4), path, complete)
        return capsys.readouterr().out

    assert "=> Loaded 7 of 9 layers, 87.7% of the weights" in load(weights)
    # Those of torch before 0.4.1 did not count batches; torchvision calls a classifier fc.
    del weights["norm.num_batches_tracked"]
    weights = {name.replace("classifier", "fc"): value for name, value in weights.items()}
    assert "=> Loaded 6 of 9 layers" in load(weights)
    for name in ("convolution.weight", "norm.running_mean", "norm.bias"):
        fewer = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(CheckpointError, match=f"the checkpoint has no {name}"):
            load(fewer)
        assert "** Layers that differ" in load(fewer, complete=False)
    with pytest.raises(CheckpointError, match=r"the model has no embedding\.0\.weight"):
        load({**weights, "embedding.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"convolution\.bias is torch\.int32"):
        load({**weights, "convolution.bias": torch.zeros(8, dtype=torch.int32)}, complete=False)


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
@pytest.mark.parametrize("kind", ["empty", "web page", "flipped bit", "another model", "no weights"])
def test_a_damaged_download_is_named(
    name: str, kind: str, train: Callable[..., Done], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(in_folder / "torch"))
    path = (
        in_folder
        / "torch"
        / {"resnet18": "hub/checkpoints/resnet18-5c106cde.pth"}.get(name, f"checkpoints/{name}_imagenet.pth")
    )
    path.parent.mkdir(parents=True)
    content: Any = {"another model": {"layer": torch.zeros(1000)}, "no weights": [torch.zeros(1000)]}.get(kind)
    torch.save(content or {"conv1.conv.weight": torch.zeros(16, 3, 7, 7)}, path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "web page":
        path.write_text("<html><title>Quota exceeded</title></html>")
    elif kind == "flipped bit":
        flip(path, path.stat().st_size // 2)
    load = torch.load
    done = train("loss.name", "sn", "model.name", name, "model.pretrained", True)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"error: the ImageNet weights of {name}: " in done.err
    assert f"Delete '{path}', and it is downloaded again" in done.err
    assert torch.load is load


# ---- checkpoints of other versions of torch ----


def old_torch(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as torchreid wrote it with an older torch."""
    kept = {key: checkpoint[key] for key in ("state_dict", "epoch", "rank1", "optimizer", "scheduler")}
    for group in kept["optimizer"]["param_groups"]:
        for key in ("decoupled_weight_decay", "foreach", "maximize", "capturable", "differentiable", "fused"):
            group.pop(key, None)
    for state in kept["optimizer"]["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    for scheduler in kept["scheduler"].get("_schedulers", [kept["scheduler"]]):
        scheduler.pop("_is_initial", None)
        scheduler["verbose"] = False
    return kept


OPTIMIZERS = ("adam", "amsgrad", "sgd", "rmsprop", "radam")


@pytest.fixture(scope="module")
def of_optimizers(datamanager: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("optimizers")
    checkpoints = {}
    for name in OPTIMIZERS:
        training = make_engine(ImageSNEngine, datamanager, optimizer=name)
        training.options.keep = 1
        training.forward_backward(dict(next(iter(datamanager.train_loader))))
        training.update_lr()
        training.checkpointer.start(folder / name, training=True)
        training.checkpointer.save(1, keep=1)
        checkpoints[name] = folder / name / "model" / "model.pth.tar-1"
    return checkpoints


def test_an_optimizer_with_a_negative_option_is_resumed(datamanager: Any, tmp_path: Path) -> None:
    def engine() -> Any:
        training = make_engine(ImageSNEngine, datamanager)
        adafactor = torch.optim.Adafactor(training.model.parameters())  # whose beta2_decay is -0.8
        return ImageSNEngine(datamanager, training.model, adafactor, use_gpu=False)

    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("torch 2.5 or newer")
    engine().run(save_dir=str(tmp_path), max_epoch=1)
    resumed = engine()
    resumed.resume(tmp_path / "model/model.pth.tar-1")
    assert resumed.optimizer.state_dict()["state"]
    checkpoint = load_checkpoint(tmp_path / "model/model.pth.tar-1")
    checkpoint["optimizer"]["param_groups"][0]["lr"] = -0.1
    save_checkpoint(checkpoint, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"its optimizer has lr '-0\.1'"):
        engine().resume(tmp_path / "x")


@pytest.mark.parametrize("old", [False, True], ids=["new", "old torch"])
def test_a_checkpoint_goes_with_its_own_optimizer_alone(
    old: bool, of_optimizers: dict[str, Path], datamanager: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    for saved, path in of_optimizers.items():
        checkpoint = load_checkpoint(path)
        save_checkpoint(old_torch(checkpoint) if old else checkpoint, tmp_path / "model.pth.tar-1")
        for resumed in OPTIMIZERS:
            if saved == resumed:
                training = resume(datamanager, tmp_path / "model.pth.tar-1", resumed)
                training.set_model_mode("train")
                assert math.isfinite(training.forward_backward(batch)["loss_m"])
            else:
                with pytest.raises(CheckpointError, match=r"its optimizer is of another type|to another optimizer"):
                    resume(datamanager, tmp_path / "model.pth.tar-1", resumed)


def schedulers(optimizer: Any) -> dict[str, Any]:
    module = torch.optim.lr_scheduler
    step = optim.build_lr_scheduler(optimizer, "single_step", stepsize=2)
    warmup = module.LinearLR(optimizer, 0.1, 1.0, 3)
    return {
        "single_step": step,
        "multi_step": optim.build_lr_scheduler(optimizer, "multi_step", stepsize=[2, 4]),
        "cosine": optim.build_lr_scheduler(optimizer, "cosine", max_epoch=9),
        "exponential": module.MultiplicativeLR(optimizer, lambda _: 0.9),
        "with a warm-up": module.ChainedScheduler([step, warmup]),
    }


@pytest.mark.parametrize("old", [False, True], ids=["new", "old torch"])
def test_a_schedule_goes_on_where_the_checkpoint_is(
    old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build() -> tuple[nn.Module, Any, dict[str, Any]]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return model, optimizer, schedulers(optimizer)

    for name in build()[2]:
        model, optimizer, all_schedulers = build()
        scheduler = all_schedulers[name]
        optimizer.step()
        for _ in range(3):
            scheduler.step()
        checkpoint = {
            "state_dict": model.state_dict(), "epoch": 3, "rank1": 0.5, "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(), "classes": class_names(optimizer),
        }  # fmt: skip
        save_checkpoint(old_torch(checkpoint) if old else checkpoint, tmp_path / "x")
        model, optimizer, all_schedulers = build()
        Checkpointer(model, optimizer, all_schedulers[name], seed=1).resume(tmp_path / "x")
        assert "which is used" not in capsys.readouterr().out
        assert all_schedulers[name].get_last_lr() == scheduler.get_last_lr()
        all_schedulers[name].step()


# ---- records ----


@pytest.fixture(scope="module")
def recorded(datamanager: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a record."""
    folder = tmp_path_factory.mktemp("recorded")
    training = make_engine(ImageSNEngine, datamanager)
    training.options.record = True
    training.run(save_dir=str(folder), max_epoch=1)
    return folder


def test_a_damaged_record_is_named(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "record", tmp_path / "record")
    path = tmp_path / "record" / "record.json"
    text = path.read_text()
    content = json.loads(text)
    old = {key: value for key, value in content.items() if key != "format_version"}
    path.write_text(json.dumps(old))
    assert read_record(path.parent).epochs == read_record(recorded / "record").epochs
    evaluation = {"mAP": 0.5, "mINP": 0.5, "cmc": [1.0]}
    malformed: list[Any] = [
        [], 1, {}, {"epochs": {}}, {"epochs": [], "evaluations": {}}, {"epochs": {"x": {}}, "evaluations": {}},
        {**content, "epochs": {"1": {"terms": [], "seconds": 1.0, "memory": None}}},
        {**content, "epochs": {"1": {"terms": {"loss": "1"}, "seconds": 1.0, "memory": None}}},
        {**content, "epochs": {"1": {"seconds": 1.0}}},
        {**content, "epochs": {"1": {"terms": {"loss": math.inf}, "seconds": 1.0, "memory": None}}},
        {**content, "epochs": {"1": {"terms": {"loss": math.nan}, "seconds": 1.0, "memory": None}}},
        {**content, "epochs": {"1": {"terms": {}, "seconds": math.inf, "memory": None}}},
        {**content, "epochs": {"1": {"terms": {}, "seconds": 1.0, "memory": math.inf}}},
        *({**content, "format_version": version} for version in ("1", 1.0, 2.0, True, None, [1], -1)),
        {**content, "evaluations": {"market1501": {"1": {**evaluation, "cmc": []}}}},
        {**content, "evaluations": {"market1501": {"1": {**evaluation, "mAP": math.nan}}}},
        {**content, "evaluations": {"market1501": {"1": {**evaluation, "mINP": None}}}},
    ]  # fmt: skip
    for damaged in [text[:-10], "", "\0" * 100, "[" * 100_000, *map(json.dumps, malformed)]:
        path.write_text(damaged)
        with pytest.raises(RecordError, match=r"record of a run is damaged, in '.*record\.json'"):
            read_record(path.parent)
    path.write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(RecordError, match="written by a later version of torchreid-snloss, in format 2"):
        read_record(path.parent)


def test_damaged_features_are_named(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "record", tmp_path / "record")
    path = tmp_path / "record" / "market1501-after.npz"
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    read_features(path.parent, "market1501", after=True)

    def refused(message: str = "damaged, in '.*market1501-after.npz'") -> None:
        with pytest.raises(RecordError, match=message):
            read_features(path.parent, "market1501", after=True)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused()
    path.write_bytes(whole)
    flip(path, len(whole) // 3)
    refused()
    changes: list[dict[str, Any]] = [
        {"query_pids": arrays["query_pids"][:-1]}, {"query_features": arrays["query_features"] * np.nan},
        {"gallery_camids": arrays["gallery_camids"] * 1.5}, {"gallery_features": arrays["gallery_features"][:, :3]},
        {"query_paths": np.array([None] * len(arrays["query_pids"]))},
    ]  # fmt: skip
    for change in changes:
        np.savez(path, **{**arrays, **change})
        refused()
    path.unlink()
    refused("has lost '.*market1501-after.npz'")


@pytest.mark.parametrize("rerank", [False, True])
def test_a_record_holds_the_average_precision_of_each_query(datamanager: Any, rerank: bool, tmp_path: Path) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    training.options.record = True
    training.options.rerank = rerank
    training.run(save_dir=str(tmp_path), max_epoch=1)
    evaluations = read_record(tmp_path / "record").evaluations["market1501"]
    for epoch, after in ((0, False), (1, True)):
        pids, values = read_average_precisions(tmp_path / "record", "market1501", after)  # type: ignore[misc]
        query, gallery = read_features(tmp_path / "record", "market1501", after)
        np.testing.assert_array_equal(pids, query.pids)
        assert np.nanmean(values) == pytest.approx(evaluations[epoch]["mAP"], abs=1e-12)
        without = average_precisions(query, gallery, "euclidean")
        assert np.allclose(values, without, atol=1e-6) == (not rerank)


def test_damaged_average_precisions_are_named(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "record", tmp_path / "record")
    path = tmp_path / "record" / "market1501-after.npz"
    arrays = dict(np.load(path))
    kept = arrays["average_precisions"]
    partly = np.where(np.arange(len(kept)) == 0, np.nan, kept)  # a query without a match
    np.savez(path, **{**arrays, "average_precisions": partly})
    np.testing.assert_array_equal(read_average_precisions(path.parent, "market1501", after=True)[1], partly)  # type: ignore[index]
    for other in (
        kept[:-1],
        kept[:, None],
        kept * np.nan,
        kept - 1,
        kept + 1.01,
        kept + np.inf,
        kept.astype(np.float32),
    ):
        np.savez(path, **{**arrays, "average_precisions": other})
        with pytest.raises(RecordError, match=r"damaged, in '.*market1501-after\.npz': its average precisions"):
            read_average_precisions(path.parent, "market1501", after=True)
    np.savez(path, **{**arrays, "average_precisions": np.array([None] * len(kept))})  # pickled
    with pytest.raises(RecordError, match=r"damaged, in '.*market1501-after\.npz'"):
        read_average_precisions(path.parent, "market1501", after=True)
    del arrays["average_precisions"]  # as before 0.3
    np.savez(path, **arrays)
    assert read_average_precisions(path.parent, "market1501", after=True) is None
    np.savez(path, **{**arrays, "query_pids": arrays["query_pids"][:-1]})
    with pytest.raises(RecordError, match=r"damaged, in '.*market1501-after\.npz': its identities"):
        read_average_precisions(path.parent, "market1501", after=True)
    path.unlink()
    with pytest.raises(RecordError, match=r"has lost '.*market1501-after\.npz'"):
        read_average_precisions(path.parent, "market1501", after=True)


def test_a_damaged_record_ends_a_resumed_run_before_it_trains(
    recorded: Path, train: Callable[..., Done], in_folder: Path
) -> None:
    shutil.copytree(recorded, in_folder / "log")
    record = in_folder / "log/record/record.json"
    record.write_text(record.read_text()[:-5])
    done = train("loss.name", "sn", "train.record", True, "train.max_epoch", 2)
    assert done.code == 2
    assert "the record of a run is damaged, in 'log/record/record.json'" in done.err
    assert done.err.count("\n") == 1
