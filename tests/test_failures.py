"""Whatever ends a run is one line, and nothing that was trained is lost: disks, streams, signals, images, workers."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Tiny, make_datamanager, make_engine, process_options, run, start
from PIL import Image
from torch import nn
from torchreid import models, utils

import torchreid_snloss
from torchreid_snloss import ImageSNEngine, load_checkpoint, register
from torchreid_snloss.data import make_pedestrians
from torchreid_snloss.data.synthetic import SyntheticTracklets
from torchreid_snloss.engine import NothingLearntError, TrainOptions, WriteError
from torchreid_snloss.engine.monitor import LearningMonitor
from torchreid_snloss.engine.ranked_lists import named_drawing_failures
from torchreid_snloss.run.entry import run_command

SHORT = ["loss.name", "sn", "train.max_epoch", 1]


def one_line(done: Done, code: int, *words: str, program: str = "torchreid-snloss") -> None:
    assert done.code == code, done.out + done.err
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith(f"{program}: ")]
    assert len(lines) == 1, done.err
    for word in words:
        assert word in lines[0]


# ---- files that can't be written ----


@pytest.mark.parametrize(
    "obstacle", ["model", "model/model.pth.tar-1/", "model/model-best.pth.tar/", "record", "visrank_market1501"]
)
def test_what_can_not_be_written_is_told_before_training(
    obstacle: str, train: Callable[..., Done], in_folder: Path
) -> None:
    path = in_folder / "log" / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    if obstacle.endswith("/"):
        path.mkdir()
    else:
        path.write_text("a file in the place of a folder")
    done = train(*SHORT, "train.record", True, "test.visrank", True)
    one_line(done, 2, "data.save_dir 'log' can't be written to", obstacle.rstrip("/"))
    assert "epoch: [" not in done.out


@contextlib.contextmanager
def largest_file(size: int) -> Any:
    resource = pytest.importorskip("resource", reason="POSIX's limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint_is_told_before_training(train: Callable[..., Done]) -> None:
    with largest_file(30_000):  # a checkpoint has 80 kB
        done = train(*SHORT)
    one_line(done, 2, "can't be written to", "for a checkpoint of")
    assert "epoch: [" not in done.out


def test_a_checkpoint_that_can_not_be_written_later(datamanager: Any, tmp_path: Path) -> None:
    class FillsTheDisk(Tiny):
        def train(self, mode: bool = True) -> Any:
            if not mode:  # the first test, after the first checkpoint
                (tmp_path / "model" / "model.pth.tar-2").mkdir()
            return super().train(mode)

    training = make_engine(ImageSNEngine, datamanager, FillsTheDisk())
    with pytest.raises(WriteError, match=r"can't write the checkpoint '.*model\.pth\.tar-2': .*tar-1$"):
        training.run(save_dir=str(tmp_path), max_epoch=3, eval_freq=1)
    assert load_checkpoint(tmp_path / "model/model.pth.tar-1")["epoch"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_and_tensorboard_on_a_full_disk_do_not_end_a_run(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    name = "-2000"
    monkeypatch.setattr(time, "strftime", lambda *_: name)
    (in_folder / "log").mkdir()
    (in_folder / f"log/train.log{name}").symlink_to("/dev/full")
    monkeypatch.setattr("socket.gethostname", lambda: "nowhere/host")  # a part of the event file's name
    done = train(*SHORT)
    assert done.code == 0, done.err
    assert "mAP:" in done.out
    assert "TensorBoard can't write to 'log'" in done.out
    assert done.err.count("can't be written") == 1
    assert "No space left on device; the run goes on without it" in done.err
    assert "Traceback" not in done.err + done.out


def test_an_unexpected_error_is_in_the_log(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    class Surprising(Tiny):
        steps = 0

        def forward(self, x: Any) -> Any:
            self.steps += self.training
            if self.steps > 5:  # in the second epoch
                raise KeyError("something\nunexpected")
            return super().forward(x)

    monkeypatch.setitem(vars(models)["__model_factory"], "surprising", Surprising)
    done = train(*SHORT, "train.max_epoch", 5, "model.name", "surprising", "train.save_freq", 5)
    log = next((in_folder / "log").glob("train.log-*"))
    one_line(done, 1, "error: KeyError: ", "unexpected", f"the traceback is in '{log.relative_to(in_folder)}'")
    assert "Traceback" in log.read_text()
    assert "error: KeyError: " in log.read_text().splitlines()[-1]
    # What was trained is saved, though save_freq did not ask for it yet.
    assert [path.name for path in (in_folder / "log/model").glob("*")] == ["model.pth.tar-1.2"]


@pytest.mark.parametrize(
    "error", [RecursionError(), MemoryError(), OSError(28, "No space left on device"), ValueError("x\ny")]
)
def test_any_error_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    code = run_command("program", lambda: None, lambda _: work())
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"program: error: {type(error).__name__}")
    trace = Path(err.split("'")[-2])
    assert "Traceback" in trace.read_text()
    trace.unlink()


def test_a_thread_that_fails_leaves_its_traceback_in_the_log(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    def fail() -> None:
        raise KeyError("in a thread")

    class Threaded(Tiny):
        def train(self, mode: bool = True) -> Any:
            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
            return super().train(mode)

    monkeypatch.setitem(vars(models)["__model_factory"], "threaded", Threaded)
    done = train(*SHORT, "model.name", "threaded")
    log = next((in_folder / "log").glob("train.log-*"))
    assert done.code == 0, done.err
    assert f"** A thread ended: error: KeyError: 'in a thread'; the traceback is in 'log/{log.name}'" in done.out
    assert 'in fail\n    raise KeyError("in a thread")' in log.read_text()
    assert "Traceback" not in done.out + done.err


def test_code_that_ends_the_process_is_a_failure(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    class Leaving(Tiny):
        def train(self, mode: bool = True) -> Any:
            sys.exit()

    monkeypatch.setitem(vars(models)["__model_factory"], "leaving", Leaving)
    one_line(train(*SHORT, "model.name", "leaving"), 1, "error: SystemExit; the traceback is in 'log/train.log")


def test_a_key_error_of_a_model_is_not_its_name(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    monkeypatch.setitem(vars(models)["__model_factory"], "keyless", lambda **_: {}["width"])
    one_line(train(*SHORT, "model.name", "keyless"), 1, "error: KeyError: 'width'; the traceback is in 'log/train.log")


def test_outliers_that_can_not_be_written(train: Callable[..., Done], in_folder: Path) -> None:
    (in_folder / "log").mkdir()
    (in_folder / "log/outliers").write_text("a file in the place of a folder")
    one_line(train(*SHORT, "data.outliers", 0.5), 2, "error: data.save_dir 'log' can't be written to: ", "outliers")


def test_what_a_killed_process_left_beside_a_record_is_removed(train: Callable[..., Done], in_folder: Path) -> None:
    left = in_folder / "log/record/.unfinished-record.json-abc"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assert train(*SHORT, "train.record", True).code == 0
    assert not left.exists()


# ---- streams ----


@pytest.mark.parametrize("reader", ["has left", "is a full disk", "is closed"])
def test_a_run_goes_on_when_nobody_reads_it(
    reader: str, train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    if reader == "is a full disk" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    if reader == "has left":
        read, write = os.pipe()
        os.close(read)
        stream = open(write, "w")  # noqa: SIM115
    else:
        stream = open("/dev/full" if "full" in reader else os.devnull, "w")  # noqa: SIM115
    if reader == "is closed":
        stream.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    assert train(*SHORT).code == 0
    assert "mAP:" in next((in_folder / "log").glob("train.log-*")).read_text()
    stream.close()  # what Python does in the end, without an error here


def test_a_process_whose_reader_leaves(in_folder: Path) -> None:
    with start("-u", "-m", "torchreid_snloss", "--help", cwd=in_folder) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Error" not in err


def test_names_and_signs_that_a_stream_can_not_show(
    train: Callable[..., Done], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    folder = os.fsdecode(b"caf\xe9-\xc3\xa9")  # Latin-1, and UTF-8
    done = train(*SHORT, "data.save_dir", folder, "train.record", True)
    assert done.code == 0, done.err
    stream.seek(0)
    assert f'Checkpoint saved to "{folder.encode("ascii", "backslashreplace").decode()}/model' in stream.read()
    assert "mAP:" in next((in_folder / folder).glob("train.log-*")).read_text("utf-8")


# ---- signals ----


def send_when(process: subprocess.Popen[str], words: str, *numbers: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.05)
            return
    raise AssertionError(f"{words!r} was never printed")


@pytest.mark.parametrize(
    ("words", "numbers", "code"),
    [
        ("epoch: [1/50][2/", [signal.SIGHUP], 129),
        ("##### Evaluating", [signal.SIGTERM, signal.SIGTERM], 143),
        ("Drawing the synthetic", [signal.SIGTERM], 143),
    ],
)
def test_signals_stop_a_run_anywhere(
    words: str, numbers: list[int], code: int, reid_data: Path, in_folder: Path
) -> None:
    options = ["--root", str(reid_data)]
    if "synthetic" in words:
        options = ["--root", str(in_folder), "-s", "synthetic", "-t", "synthetic", "--"]
    options += process_options("loss.name", "sn", "train.max_epoch", 50, "test.eval_freq", 1)
    process = start("-u", "-m", "torchreid_snloss", *options, cwd=in_folder)
    send_when(process, words, *numbers)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"torchreid-snloss: stopped by {signal.Signals(numbers[0]).name}" in err
    if code == 129:
        assert "resume with: model.resume log/model/model.pth.tar-" in err
    if "synthetic" in words:
        assert [path.name for path in in_folder.glob(".*")] == []


def test_a_signal_ends_a_test_run_with_its_ranked_lists(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    def draw(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the signal was swallowed")

    torchreid_snloss.register()  # it puts a function of its own there
    monkeypatch.setattr(utils, "visualize_ranked_results", draw)
    one_line(train("test.evaluate", True, "test.visrank", True), 143, "stopped by SIGTERM")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command("program", lambda: None, lambda _: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_where_python_drops_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return 0

    assert run_command("program", lambda: None, lambda _: work()) == 143


def test_what_a_killed_drawing_left_is_removed(tmp_path: Path) -> None:
    code = f"from torchreid_snloss.data import make_pedestrians; make_pedestrians({str(tmp_path / 'people')!r})"
    with start("-u", "-c", code, cwd=tmp_path, fresh=False) as process:
        while not list(tmp_path.glob(".people-*/made/*/*/*.jpg")):
            assert process.poll() is None
            time.sleep(0.02)
        (tmp_path / "others").mkdir()
        process.kill()
    assert len(list(tmp_path.glob(".people-*"))) == 1
    make_pedestrians(tmp_path / "people", num_train_pids=2, num_test_pids=1)
    assert not list(tmp_path.glob(".people-*"))


# ---- data ----


def _damage(kind: str, image: Path) -> str:
    if kind == "pixels":
        Image.new("1", (20_000, 20_000)).save(image, format="PNG")
        return "exceeds limit"
    image.unlink()
    if kind == "pipe":
        os.mkfifo(image)
        return "not a regular file"
    if kind == "folder":
        image.mkdir()
        return "not a regular file"
    image.write_bytes(b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00avifmif1miafMA1B" + bytes(50))
    return "can't read the image"


@pytest.mark.parametrize("kind", ["pixels", "pipe", "folder", "avif"])
def test_an_image_that_can_not_be_read_for_any_reason(
    kind: str, reid_data: Path, in_folder: Path, train: Callable[..., Done]
) -> None:
    root = in_folder / "broken"
    shutil.copytree(reid_data, root)
    image = sorted(root.rglob("query/*.jpg"))[5]
    reason = _damage(kind, image)
    one_line(train("data.root", root, "test.evaluate", True), 1, f"can't read the image '{image}'", reason)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_frame_that_can_not_be_read(workers: int, in_folder: Path, train: Callable[..., Done]) -> None:
    make_pedestrians(in_folder / SyntheticTracklets.dataset_dir, 8, 4, frames=2)
    frame = sorted(in_folder.rglob("bounding_box_train/*.jpg"))[5]
    frame.write_bytes(frame.read_bytes()[:300])
    options = ["data.root", in_folder, "data.type", "video", "data.sources", "['synthetic_video']"]
    options += ["data.targets", "['synthetic_video']", "train.batch_size", 4, "sampler.num_instances", 2]
    done = train(*options, *SHORT, "video.seq_len", 2, "data.workers", workers, "test.ranks", "[1]")
    one_line(done, 1, f"can't read the image '{frame}'")
    assert "Will redo" not in done.out


def test_an_image_that_opencv_can_not_read(reid_data: Path, in_folder: Path, train: Callable[..., Done]) -> None:
    root = in_folder / "broken"
    shutil.copytree(reid_data, root)
    image = sorted(root.rglob("query/*.jpg"))[3]
    Image.new("RGB", (8, 16)).save(image, format="PCX")
    done = train("data.root", root, "test.evaluate", True, "test.visrank", True)
    assert re.search(r"^\*\* The config names no checkpoint: \S+ has random weights$", done.out, re.MULTILINE)
    one_line(done, 1, "can't draw ranked lists", f"OpenCV can't read the image '{image}'")


def test_image_files_of_another_ending_are_told(reid_data: Path, in_folder: Path, train: Callable[..., Done]) -> None:
    root = in_folder / "mixed"
    shutil.copytree(reid_data, root)
    assert "left out" not in train("data.root", root, "test.evaluate", True).out
    images = sorted(root.rglob("bounding_box_train/*.jpg"))
    for image in images[1:4]:
        image.rename(image.with_suffix(".JPG"))
    images[5].rename(images[5].with_suffix(".png"))
    for name in ("notes.txt", "readme.pdf", "clip.mpg"):
        (images[0].parent / name).write_text("no image")
    done = train("data.root", root, "test.evaluate", True)
    assert f"4 of {len(images)} image files in {images[0].parent} are left out: the data set reads .jpg" in done.out
    assert "end in .JPG, .png" in done.out
    query = sorted(root.rglob("query/*.jpg"))
    for ending in (".JPG", ".png"):
        shutil.copy(query[0], query[0].with_suffix(ending))
    done = train("data.root", root, "test.evaluate", True)
    assert (
        f"** 6 of {len(images) + len(query) + 2} image files in {images[0].parent} and 1 other folder are" in done.out
    )
    assert done.out.count("are left out") == 1  # a line for thousands of folders


def test_each_query_must_have_its_own_picture(tmp_path: Path) -> None:
    register()
    query = [(f"{folder}/0001.jpg", 1, 0) for folder in ("a", "b")]
    with (
        pytest.raises(WriteError, match="only 1 of 2 ranked lists could be written"),
        named_drawing_failures(tmp_path, query, []),
    ):
        (tmp_path / "a_0001.jpg").write_text("a picture")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_a_worker_that_the_system_kills(reid_data: Path, in_folder: Path) -> None:
    options = process_options("loss.name", "sn", "train.max_epoch", 50, "data.workers", 1, "train.save_freq", 50)
    process = start("-u", "-m", "torchreid_snloss", "--root", str(reid_data), *options, cwd=in_folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch: [1/50][1/"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    out, err = process.communicate(timeout=120)
    one_line(Done(process.returncode, out, err), 1, "worker was killed by SIGKILL", "try fewer data.workers")
    saved = sorted(path.name for path in (in_folder / "log/model").glob("model.pth.tar-*"))
    assert saved, out  # the steps before it, though no epoch was due to be saved


def test_a_workers_death_interrupts_no_step(reid_data: Path, tmp_path: Path) -> None:
    handlers: list[Any] = []

    class Looks(Tiny):
        def forward(self, x: Any) -> Any:
            if self.training:
                handlers.append(signal.getsignal(signal.SIGCHLD))
            return super().forward(x)

    make_engine(ImageSNEngine, make_datamanager(reid_data, workers=1), Looks()).run(save_dir=str(tmp_path), max_epoch=2)
    assert handlers == [signal.SIG_DFL] * 6  # torch's own would raise in the middle of a step


# ---- nothing learnt ----


class NeverFinite(Tiny):
    def forward(self, x: Any) -> Any:
        out = super().forward(x)
        return (out[0] * torch.nan, out[1]) if self.training else out


def test_an_epoch_whose_every_step_was_skipped(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, in_folder: Path
) -> None:
    monkeypatch.setitem(vars(models)["__model_factory"], "never_finite", NeverFinite)
    done = train(*SHORT, "model.name", "never_finite", "train.nonfinite", "skip")
    one_line(done, 1, "epoch 1 has skipped all its 3 steps and learnt nothing")
    assert "Best so far" not in done.out
    assert not list((in_folder / "log/model").glob("*"))


def test_a_learning_rate_of_0(datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NothingLearntError, match=r"epoch 1 has changed no weight.*learning rate is 0"):
        make_engine(ImageSNEngine, datamanager, lr=0.0).run(save_dir=str(tmp_path / "a"), max_epoch=2)
    # A warm-up from 0 learns later, and a rate that comes down to 0 has learnt before.
    training = make_engine(ImageSNEngine, datamanager)
    training.scheduler = training._scheds["model"] = torch.optim.lr_scheduler.LambdaLR(
        training.optimizer, lambda epoch: float(epoch == 1)
    )
    training.run(save_dir=str(tmp_path / "b"), max_epoch=4)
    assert capsys.readouterr().out.count("has changed no weight: the learning rate is 0") == 1


def test_float16_that_overflows_to_the_end(datamanager: Any, tmp_path: Path) -> None:
    training = make_engine(ImageSNEngine, datamanager, scale=50.0, weight_m=1.0)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
    training.options = TrainOptions()
    with pytest.raises(NothingLearntError, match=r"epoch 2 .*float16 overflowed in every step"):
        training.run(save_dir=str(tmp_path), max_epoch=2, eval_freq=1)
    assert not (tmp_path / "model/model-best.pth.tar").exists()


def test_weights_that_are_not_trained() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    monitor = LearningMonitor(torch.optim.SGD(layer.parameters(), lr=0.1))
    monitor.start_run(resumed=False)
    monitor.start_epoch()
    monitor.steps = 1
    with pytest.raises(NothingLearntError, match="no parameter of the optimizer requires a gradient"):
        monitor.end_epoch(1, is_last=True)
    monitor.start_epoch()
    with pytest.raises(NothingLearntError, match="has no batch"):
        monitor.end_epoch(1, is_last=False)
    monitor.start_epoch()
    monitor.steps = 1
    layer.weight.data.view(torch.int32)[0, 0] += 1  # its last bit
    monitor.end_epoch(1, is_last=True)
    assert monitor.learnt


def test_the_matplotlib_backend_of_a_notebook(in_folder: Path) -> None:
    code = (
        "import os; os.environ['MPLBACKEND'] = 'module://nowhere.backend_inline'\n"
        "from torchreid_snloss.compare import charts\n"
        "print(len(charts.mean_curves({'sn': ([1, 2], [[50, 60]])}, 'k', '%', 'market1501')), os.environ['MPLBACKEND'])"
    )
    done = run("-c", code, cwd=in_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("module://nowhere.backend_inline\n")
