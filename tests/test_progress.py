"""Progress bars on a terminal, and none in the log file."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from conftest import ROOT, process_options, start

pty = pytest.importorskip("pty", reason="there are no terminals to open here")
fcntl = pytest.importorskip("fcntl", reason="there are no terminals to open here")
termios = pytest.importorskip("termios", reason="there are no terminals to open here")


def _on_a_terminal(*command: str, cwd: Path) -> tuple[int, str]:
    """Runs Python on a terminal of 160 columns, and returns its exit code and its output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    process = start(*command, cwd=cwd, stdout=theirs, stderr=theirs, text=False)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    return process.wait(), b"".join(chunks).decode()


def test_bars_on_a_terminal_do_not_break_torchreids_lines(reid_data: Path, tmp_path: Path) -> None:
    options = ["--config-file", str(ROOT / "configs/small.yaml"), "--root", str(reid_data)]
    options += ["data.sources", "['market1501']", "data.targets", "['market1501']", "data.save_dir", "log"]
    options += process_options("train.max_epoch", 1, "test.visrank", False)
    code, screen = _on_a_terminal("-m", "torchreid_snloss", *options, cwd=tmp_path)
    assert code == 0, screen
    # The text between two moves of the cursor to the start of a line.
    pieces = [piece.strip() for piece in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", screen))]
    bars = [piece for piece in pieces if re.search(r"\d+%\|", piece)]
    epoch = [bar for bar in bars if bar.startswith("epoch 1/1")]
    assert re.search(r"\| 32/\d+ \[.*image/s, .*loss_m=[\d.]+, loss_x=[\d.]+", "\n".join(epoch))
    for what in ("query features", "gallery features", "ranking"):
        assert any(bar.startswith(what) for bar in bars), what

    (log,) = (tmp_path / "log").glob("train.log-*")
    lines = [line.strip() for line in log.read_text().splitlines()]
    assert not any("%|" in line for line in lines)
    printed = [line for line in lines if line.startswith(("epoch: [1/1]", "mAP:", "Rank-", "Checkpoint", "mINP"))]
    assert len(printed) >= 10
    assert set(printed) <= set(pieces)
