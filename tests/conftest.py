"""What the tests share: drawn people on disk, a tiny model, one engine maker, and the command line in two ways."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# One thread for each of pytest's workers and each process that a test starts, or they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torchreid
import zygote
from torch import Tensor, nn
from torchreid import data, models, optim, utils

import torchreid_snloss
from torchreid_snloss import get_default_config, resolve
from torchreid_snloss.cli import main
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.data import make_pedestrians
from torchreid_snloss.evaluation import Ranking
from torchreid_snloss.record import Features, Recorder

ROOT = Path(__file__).parent.parent

# A background job ignores Ctrl-C, and one under nohup a closed terminal; what the tests start must not.
for _number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# For subprocesses: one thread, since tests run side by side, and no GPU.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

NEEDS_COMPILE = pytest.mark.skipif(
    sys.version_info >= (3, 12) and torch.__version__ < (2, 4), reason="torch.compile on Python 3.12 needs torch 2.4"
)

# On a CPU, where a run has the same bits each time; what tests/test_gpu.py adds runs on a GPU.
TINY = [
    *["model.name", "tiny", "model.pretrained", "False", "data.height", "64", "data.width", "32"],
    *["data.workers", "0", "train.batch_size", "32", "train.print_freq", "1", "use_gpu", "False"],
]


def tiny_options(*more: object) -> list[str]:
    """Returns the config options of a run that takes a second, followed by `more`; the last value of a key counts."""
    return [*TINY, *map(str, more)]


def process_options(*more: object) -> list[str]:
    """Returns `tiny_options` for a process of its own, which knows torchreid's models only."""
    return tiny_options("model.name", "osnet_x0_25", *more)


class Tiny(nn.Module):
    """A convolution and a classifier, for images of 64 x 32 pixels; features of dimension 256."""

    def __init__(self, num_classes: int = 16, *_: Any, **__: Any) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, kernel_size=8, stride=8)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8 * 8 * 4, num_classes)

    def forward(self, x: Tensor) -> Any:
        features = self.norm(self.convolution(x)).relu().flatten(1)
        return (self.classifier(features), features) if self.training else features


def make_datamanager(root: Path, **options: Any) -> Any:
    """Makes a data manager for batches of 32 images, 8 identities of 4, from the `market1501` under `root`."""
    torchreid_snloss.register()
    utils.set_random_seed(1)
    defaults = {
        "root": str(root), "sources": "market1501", "height": 64, "width": 32, "batch_size_train": 32,
        "train_sampler": "IdentitySampler", "use_gpu": False, "workers": 0,
    }  # fmt: skip
    return data.ImageDataManager(**{**defaults, **options})


def make_engine(
    cls: type[Any],
    datamanager: Any,
    model: nn.Module | None = None,
    *,
    optimizer: str = "sgd",
    lr: float = 0.01,
    **options: Any,
) -> Any:
    """Makes an engine in training mode, on the CPU.

    Args:
        cls: the engine's class.
        datamanager: the engine's data manager.
        model: what is trained; None: a new `Tiny`.
        optimizer: torchreid's name of an optimizer.
        lr: learning rate.
        **options: the engine's other keywords, the criterion among them for one that takes it.
    """
    utils.set_random_seed(1)
    model = model or Tiny(datamanager.num_train_pids)
    built = optim.build_optimizer(model, optim=optimizer, lr=lr)
    training = cls(datamanager, model, built, use_gpu=False, **options)
    training.set_model_mode("train")
    return training


@pytest.fixture(scope="session")
def reid_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root whose `market1501` is 16 + 8 drawn people."""
    root = tmp_path_factory.mktemp("reid-data")
    make_pedestrians(root / "market1501", num_train_pids=16, num_test_pids=8, seed=5)
    return root


@pytest.fixture(scope="module")
def datamanager(reid_data: Path) -> Any:
    return make_datamanager(reid_data)


@pytest.fixture
def batch(datamanager: Any) -> dict[str, Any]:
    """A batch of 32 images, the same in every test."""
    utils.set_random_seed(1)
    return dict(next(iter(datamanager.train_loader)))


@pytest.fixture(scope="session")
def tiny_model() -> Iterator[None]:
    """Lets torchreid's `build_model` know `tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(models)["__model_factory"], "tiny", Tiny)
        yield


class Done(NamedTuple):
    """What a run of the command line ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command_line(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """The command line in this process, in a folder of the test's own: `command_line(*arguments)`."""
    monkeypatch.setattr(utils, "collect_env_info", lambda: "")  # it starts pip and more
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a subprocess, so that both have the same bits

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)


def extracted_splits(save_dir: str = "log") -> list[str]:
    """The splits whose features the last test in the folder extracted, by its log."""
    newest = max(Path(save_dir).glob("test.log*"), key=lambda path: path.stat().st_mtime_ns)
    return re.findall("Extracting features from (.*) set", newest.read_text())


@pytest.fixture
def train(command_line: Callable[..., Done], reid_data: Path, tiny_model: None) -> Callable[..., Done]:
    """The command line in this process, with tiny options on the drawn people: `train(*options)`."""
    return lambda *options: command_line("--root", reid_data, *tiny_options(*options))


def record_run(
    folder: Path,
    variant: str,
    image: Path,
    *options: object,
    split: int = 0,
    epochs: int = 2,
    evaluate: Callable[[int, str], Ranking],
) -> Run:
    """A run as training leaves it: 12 queries of 4 identities, evaluated before and after training.

    Args:
        folder: The folder of the run.
        variant: The name of the variant.
        image: What all its images are.
        options: Keys and values of its config.
        split: The number of its split.
        epochs: How many epochs it trained.
        evaluate: Gives the evaluation after an epoch on a test set.
    """
    rng = np.random.default_rng(0)
    pids, camids = np.arange(12) % 4, np.arange(12) % 3
    cfg = get_default_config()
    cfg.merge_from_list(["data.save_dir", str(folder), "train.max_epoch", epochs, *options])
    recorder = Recorder(folder / "record")
    for epoch in (0, epochs):
        if epoch:
            recorder.add_epoch(epoch, {"loss": 1.5}, seconds=2.0 + cfg.train.seed)
        for dataset in cfg.data.targets:
            sides = [
                Features(rng.normal(size=(12, 8)).astype(np.float32), pids, camids, np.array([str(image)] * 12))
                for _ in ("query", "gallery")
            ]
            recorder.add_evaluation(epoch, dataset, evaluate(epoch, dataset), *sides)
    return Run(variant, resolve(cfg), split)


def start(
    *command: str, cwd: Path | None = None, path: Path | None = None, fresh: bool | None = None, **options: Any
) -> Any:
    """Starts Python as a user would, with the installed package.

    Args:
        *command: Python's arguments.
        cwd: its working directory.
        path: what goes before all else on PYTHONPATH.
        fresh: whether it imports everything itself, which takes seconds, rather than being forked from a process that
            has; None: only what is neither one of the package's command lines nor a script.
        **options: of `subprocess.Popen`.
    """
    python_path = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
    environment = {**ENVIRONMENT, "PYTHONPATH": python_path}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    fresh = not zygote.takes(command) if fresh is None else fresh
    if not fresh and path is None and zygote.AVAILABLE:
        del options["text"]
        return zygote.shared(tuple(environment.items())).start(command, cwd, environment, **options)
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, **options)


def wait_for(process: Any, folder: Path, text: str, seconds: float) -> None:
    """Waits until a training log in the folder has the text.

    Args:
        process: what `start` returned, which writes it.
        folder: the folder of the run.
        text: what to wait for.
        seconds: how long to wait for it at most.
    """
    deadline = time.monotonic() + seconds
    while not any(text in log.read_text() for log in folder.glob("train.log-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupt_at(process: Any, folder: Path, text: str, seconds: float) -> str:
    """Sends Ctrl-C to a process when `wait_for` returns, and returns its standard error."""
    wait_for(process, folder, text, seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    return errors


def run(
    *command: str, cwd: Path | None = None, path: Path | None = None, fresh: bool | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python as `start` does, to its end."""
    with start(*command, cwd=cwd, path=path, fresh=fresh) as process:
        try:
            out, err = process.communicate(timeout=300)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def upstream_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on PYTHONPATH, where torchreid lies as upstream has it (`torchreid.engine`, not `.reid.`)."""
    installed = Path(torchreid.__file__).parent
    if not (installed / "reid").is_dir():
        pytest.skip("upstream's layout is the one installed")
    folder = tmp_path_factory.mktemp("upstream")
    shutil.copytree(installed / "reid", folder / "torchreid", ignore=shutil.ignore_patterns("__pycache__"))
    for module in (folder / "torchreid").rglob("*.py"):
        module.write_text(module.read_text(encoding="utf-8").replace("torchreid.reid", "torchreid"), encoding="utf-8")
    return folder
