"""No two runs train in one folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, Done, make_engine, process_options, start
from torchreid import engine

from torchreid_snloss import ImageSNEngine
from torchreid_snloss.engine import with_training_loop
from torchreid_snloss.run.lock import FolderInUseError, locked, pass_on

fcntl = pytest.importorskip("fcntl", reason="POSIX's locks")

OPTIONS = process_options("loss.name", "sn", "data.workers", 1, "model.resume", "auto", "train.max_epoch")


@pytest.fixture
def in_use(in_folder: Path) -> Iterator[Path]:
    """The folder `log`, locked as another process does."""
    (in_folder / "log/model").mkdir(parents=True)
    with open(in_folder / "log/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield in_folder / "log"


def test_a_second_run_is_refused_until_the_first_is_gone(
    reid_data: Path, in_folder: Path, train: Callable[..., Done]
) -> None:
    process = start("-u", "-m", "torchreid_snloss", "--root", str(reid_data), *OPTIONS, "50", cwd=in_folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch: [2/50][2/3]"):
            break
    unfinished = in_folder / "log/model/.unfinished-model.pth.tar-9-abc"  # as the first writes it
    unfinished.write_text("half")
    done = train(*OPTIONS, 3)
    assert (done.code, done.err) == (2, "torchreid-snloss: error: another process is training in log\n")
    assert unfinished.exists()
    assert len(list((in_folder / "log").glob("train.log*"))) == 1
    # A test run only reads. Its options come last, and so they count.
    weights = ("model.load_weights", "log/model/model.pth.tar-1", "model.resume", "")
    assert train(*OPTIONS, 3, "test.evaluate", True, *weights).code == 0
    # Killed, it leaves a worker behind for some seconds, which does not hold the lock.
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = train(*OPTIONS, 1)
    assert done.code == 0, done.err
    process.communicate()


@pytest.mark.parametrize("cls", [ImageSNEngine, with_training_loop(engine.ImageTripletEngine)])
def test_a_script_is_refused_too(cls: Any, datamanager: Any, in_use: Path) -> None:
    training = make_engine(cls, datamanager)
    unfinished = in_use / "model/.unfinished-x"
    unfinished.write_text("half")
    with pytest.raises(FolderInUseError, match=f"another process is training in {in_use}"):
        training.run(save_dir=str(in_use), max_epoch=1)
    assert unfinished.exists()
    training.run(save_dir=str(in_use), test_only=True)
    training.run(save_dir=str(in_use.with_name("other")), max_epoch=1)


def test_a_folder_under_another_name_is_the_same(in_use: Path, train: Callable[..., Done]) -> None:
    in_use.with_name("link").symlink_to(in_use)
    for name in ("link", "log/../log", str(in_use)):
        assert train("data.save_dir", name, "train.max_epoch", 1).code == 2


def test_where_files_can_not_be_locked_training_goes_on(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)  # as on some network file systems
    done = train("train.max_epoch", 1)
    assert done.code == 0
    assert "=> log can't be locked (No locks available): start no second run there" in done.out


HOLD = """
import sys
from torchreid_snloss.run.lock import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_is_passed_on_is_held_until_both_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path), monkeypatch.context() as patch:
        variables, descriptors = pass_on(tmp_path)
        for name, value in variables.items():
            patch.setitem(ENVIRONMENT, name, value)
        child = start("-c", HOLD, str(tmp_path), stdin=subprocess.PIPE, pass_fds=descriptors)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUseError), locked(tmp_path):
        pass
    child.communicate("", timeout=60)
    with locked(tmp_path):
        pass
