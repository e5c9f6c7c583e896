"""A tiny dataset on disk, and torchreid in upstream's layout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread a test at a time, or they wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torchreid
from torchreid import data, utils

import torchreid_snloss
from torchreid_snloss.data import make_pedestrians

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def reid_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root whose ``market1501`` is 16 + 8 drawn people."""
    root = tmp_path_factory.mktemp("reid-data")
    make_pedestrians(root / "market1501", num_train_pids=16, num_test_pids=8, seed=5)
    return root


@pytest.fixture(scope="module")
def datamanager(reid_data: Path) -> Any:
    """A data manager for 32 images a batch, 8 identities of 4."""
    torchreid_snloss.register()
    utils.set_random_seed(1)
    return data.ImageDataManager(
        root=str(reid_data), sources="market1501", height=64, width=32, batch_size_train=32,
        train_sampler="IdentitySampler", use_gpu=False, workers=0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def upstream_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on PYTHONPATH, where torchreid lies as upstream has it (``torchreid.engine``, not ``.reid.``)."""
    installed = Path(torchreid.__file__).parent
    if not (installed / "reid").is_dir():
        pytest.skip("upstream's layout is the one installed")
    folder = tmp_path_factory.mktemp("upstream")
    shutil.copytree(installed / "reid", folder / "torchreid", ignore=shutil.ignore_patterns("__pycache__"))
    for module in (folder / "torchreid").rglob("*.py"):
        module.write_text(module.read_text(encoding="utf-8").replace("torchreid.reid", "torchreid"), encoding="utf-8")
    return folder


def run(*command: str, cwd: Path | None = None, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user would, with the installed package; ``path`` goes before all else on PYTHONPATH."""
    python_path = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
