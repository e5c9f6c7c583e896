"""The examples run, and the docstrings' examples are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from conftest import ROOT, run


def test_swap_the_loss(reid_data: Path, tmp_path: Path) -> None:
    script = str(ROOT / "examples/swap_the_loss.py")
    done = run(script, "--root", str(reid_data), "--dataset", "market1501", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mAP:" in done.stdout


def test_own_main(reid_data: Path, tmp_path: Path) -> None:
    options = ["data.sources", "['market1501']", "data.targets", "['market1501']", "data.root", str(reid_data)]
    options += [
        "loss.name",
        "hap2s",
        "train.max_epoch",
        "1",
        "train.batch_size",
        "32",
        "train.print_freq",
        "1",
        "test.visrank",
        "False",
    ]
    done = run(str(ROOT / "examples/own_main.py"), str(ROOT / "configs/small.yaml"), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss_m" in done.stdout
    assert "mAP:" in done.stdout


@pytest.mark.parametrize("module", ["sn", "hap2s", "fidi"])
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"torchreid_snloss.losses.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
