"""Several processes on this machine give what one gives; and stop, or go on, when one is lost."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, make_datamanager, make_engine, process_options, start
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, multiprocessing, nn
from torch.distributed import TCPStore
from torch.utils.data import DataLoader
from torchreid import losses

from torchreid_snloss import IdentitySampler, ImageFIDIEngine, ImageHAP2SEngine, ImageSNEngine, SNLoss, distributed
from torchreid_snloss.checkpoint import save_checkpoint
from torchreid_snloss.cli import main
from torchreid_snloss.config import ConfigError, load_config
from torchreid_snloss.data.fingerprint import check_same_on_all_ranks
from torchreid_snloss.data.shards import shard_training
from torchreid_snloss.engine import CompileError, MetricEngine
from torchreid_snloss.evaluation import nearest_gallery, rank_features
from torchreid_snloss.losses import GlobalBatchLoss
from torchreid_snloss.pml import PairwiseLoss
from torchreid_snloss.record import read_features, read_record
from torchreid_snloss.run.failures import concerns_one_process
from torchreid_snloss.settings import resolve

PROCESSES = [2, 4]
SLOW_IMPORTS = ["torchreid_snloss.cli", "pytorch_metric_learning.utils.distributed", "pytest"]
# A loss, its engine's options, and how many steps.
CASES: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "sn": (ImageSNEngine, {"num_neighbors": 4}, 1),
    "hap2s alone": (ImageHAP2SEngine, {"weight_x": 0}, 1),
    "fidi": (ImageFIDIEngine, {}, 1),
    "softmax beside fidi of weight 0": (ImageFIDIEngine, {"weight_m": 0}, 1),
    "softmax": (MetricEngine, {"criterion": {}}, 2),
    "softmax, micro-batches": (MetricEngine, {"criterion": {}, "micro_batch": 4}, 2),
    "torchreid's triplet": (MetricEngine, {"criterion": losses.TripletLoss(), "weight_x": 0.5}, 2),
    "sn, micro-batches": (ImageSNEngine, {"micro_batch": 3}, 1),
    "hap2s, memory": (ImageHAP2SEngine, {"memory_size": 40}, 3),
    "fidi, micro-batches, memory": (ImageFIDIEngine, {"micro_batch": 4, "memory_size": 1000}, 3),
}


class SmallModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.0))
        self.embedding, self.classifier = nn.Linear(8, 6), nn.Linear(6, 16)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.embedding(self.base(images).mean(dim=(2, 3)))
        return self.classifier(features), features


def batches(steps: int) -> list[dict[str, Any]]:
    """Of 24 images: 8 in pairs of one identity, the last 8 of identities of their own; each step the same images."""
    generator = torch.Generator().manual_seed(3)
    pids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 5, 1, 8, 9, 10, 11, 12, 13, 14, 15])
    paths = [f"image {i}" for i in range(24)]
    images = torch.randn(24, 3, 12, 8, generator=generator, dtype=torch.float64)
    return [{"img": images + step, "pid": pids, "impath": paths} for step in range(steps)]


data_of = functools.cache(make_datamanager)  # one for all cases of a process


def make(name: str, root: str) -> tuple[Any, int]:
    manager = data_of(Path(root))
    torch.manual_seed(0)
    model = SmallModel().double().eval()
    cls, options, steps = CASES[name]
    model.unused.requires_grad_(False)
    return cls(manager, model, torch.optim.SGD(model.parameters(), lr=0.05), use_gpu=False, **options), steps


def train(name: str, root: str, rows: slice) -> tuple[list[dict[str, float]], list[Tensor], Any]:
    """Shown numbers of each step, the last step's gradients and the memory."""
    engine, steps = make(name, root)
    shown = []
    for batch in batches(steps):
        part = {key: value[rows] for key, value in batch.items()}
        shown.append(engine.forward_backward(part))
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in engine.model.parameters()]
    return shown, gradients, engine.memory and engine.memory.state_dict()


def evaluate(root: str, save_dir: str, features: str) -> dict[str, float]:
    """The mAP of two tests, which draw ranked lists: the second one is with the first one's features, and re-ranks."""
    tested = make_engine(ImageSNEngine, make_datamanager(Path(root), batch_size_test=7))
    tested.options.features = features
    tested.run(test_only=True, save_dir=save_dir, visrank=True, visrank_topk=3)
    first = tested.checkpointer.mean_aps["market1501"]
    tested.run(test_only=True, save_dir=save_dir, use_metric_cuhk03=True, rerank=True, ranks=[1])
    return {"first": first, "re-ranked": tested.checkpointer.mean_aps["market1501"]}


def join(rank: int, processes: int, port: int) -> None:
    """Sets what torchrun does, under which processes meet at a store of the one that started them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)


def spawn(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Calls `function(rank, port, *arguments)` in processes forked from one that has imported what takes seconds."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that no other process has
    multiprocessing.get_context("forkserver").set_forkserver_preload(SLOW_IMPORTS)
    multiprocessing.start_processes(function, (store.port, *arguments), nprocs=processes, start_method="forkserver")


def on_one_of_several(rank: int, port: int, processes: int, root: str, results: str) -> None:
    join(rank, processes, port)
    distributed.start(use_gpu=False)
    # Uneven parts; the last process's anchors have no positive.
    cuts = [0, *([8, 13][: processes - 1] if processes < 4 else [5, 11, 16]), 24]
    rows = slice(cuts[rank], cuts[rank + 1])
    torch.save({name: train(name, root, rows) for name in CASES} | {"ranked": rank_some()}, f"{results}/{rank}")
    # In pytorch-metric-learning's own wrapper, even parts.
    batch = batches(1)[0]
    features, even = batch["img"].flatten(1), slice(rank * 24 // processes, (rank + 1) * 24 // processes)
    wrapped = DistributedLossWrapper(PairwiseLoss(SNLoss(num_neighbors=4)))
    value = wrapped(features[even], batch["pid"][even])
    # It multiplies by the number of processes, for the mean that DistributedDataParallel makes.
    torch.testing.assert_close(value / processes, SNLoss(num_neighbors=4)(features, batch["pid"]))

    torch.save(
        weights_of_a_criterion(root, {key: value[rows] for key, value in batch.items()}), f"{results}/own-{rank}"
    )

    if processes == 2:
        torch.save(evaluate(root, results, f"{results}/features.npz"), f"{results}/evaluated-{rank}")

    engine, _ = make("sn", root)
    engine.model.unused.requires_grad_()
    with pytest.raises(ValueError, match=r"nothing in the loss depends on \['unused.weight', 'unused.bias'\]"):
        engine.forward_backward({key: value[rows] for key, value in batches(1)[0].items()})
    with pytest.raises(ValueError, match="every process must have images"):
        GlobalBatchLoss({"sn": SNLoss()})(torch.zeros(rank, 2), torch.zeros(rank, dtype=torch.int64))
    loader = make_datamanager(Path(root)).train_loader
    check_same_on_all_ranks(loader)
    if rank == 1:  # a machine that lists its files in another order
        loader.dataset.train.reverse()
    with pytest.raises(ValueError, match="rank 1 has others than rank 0: another order"):
        check_same_on_all_ranks(loader)
    if rank == 0:
        assert distributed.main_process_first(lambda: "made") == "made"
        with pytest.raises(distributed.PeerError, match="rank 1: no disk"):
            distributed.main_process_first(lambda: None)
    else:
        assert distributed.main_process_first(lambda: "read") == "read"
        with pytest.raises(OSError if rank == 1 else distributed.PeerError, match="no disk"):
            distributed.main_process_first(no_disk_on_the_second)
    distributed.stop()


class Projected(nn.Module):
    """A criterion with weights of its own, which sees another dropout on each process."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.loss = nn.Linear(6, 4).double(), SNLoss(num_neighbors=4)

    def forward(self, features: Tensor, pids: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.projection(nn.functional.dropout(features)), pids)
        return loss


def weights_of_a_criterion(root: str, batch: dict[str, Any]) -> list[Tensor]:
    """After two steps."""
    torch.manual_seed(distributed.rank())
    model, criterion = SmallModel().double().eval(), Projected()
    model.unused.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05)
    engine = MetricEngine(data_of(Path(root)), model, optimizer, criterion, use_gpu=False)
    for _ in range(2):
        engine.forward_backward(batch)
    return [weight.detach() for weight in criterion.parameters()]


def rank_some() -> tuple[list[Any], list[int]]:
    """Rankings and ranked lists in blocks of 4, and how often a stop was looked for; the last is of too few queries."""
    np.random.seed(distributed.rank())  # the random numbers are those of rank 0
    generator, looked = torch.Generator().manual_seed(0), []
    queries, gallery = (torch.randn(number, 8, generator=generator) for number in (29, 70))
    labels = [torch.randint(0, high, (number,), generator=generator) for high in (9, 3) for number in (29, 70)]

    def look() -> None:
        looked[-1] += 1

    results: list[Any] = []
    for options in ({}, {"use_metric_cuhk03": True}, {"rerank": True, "metric": "cosine"}):
        looked.append(0)
        ranking = rank_features(queries, gallery, *labels, block_size=4, check_stop=look, **options)
        results += [ranking.cmc, ranking.average_precisions, np.array([ranking.mean_ap, ranking.mean_inp])]
    results += nearest_gallery(queries, gallery, *labels, 5, block_size=4)
    results += nearest_gallery(queries[:1], gallery, labels[0][:1], labels[1], labels[2][:1], labels[3], 5)
    with pytest.raises(ValueError, match="none of the 29 queries has a gallery image"):
        rank_features(queries, gallery, labels[0] + 100, *labels[1:])
    return results, looked


def no_disk_on_the_second() -> None:
    if distributed.rank() == 1:
        raise OSError("no disk")


@pytest.mark.parametrize("processes", PROCESSES)
def test_loss_and_gradients_are_those_of_the_whole_batch(processes: int, reid_data: Path, tmp_path: Path) -> None:
    spawn(on_one_of_several, processes, processes, str(reid_data), str(tmp_path))
    results = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(processes)]
    if processes == 2:
        (tmp_path / "one").mkdir()
        expected = evaluate(str(reid_data), str(tmp_path / "one"), "")
        assert evaluate(str(reid_data), str(tmp_path), str(tmp_path / "features.npz")) == pytest.approx(
            expected, abs=1e-9
        )
        for rank in range(processes):
            assert torch.load(tmp_path / f"evaluated-{rank}") == pytest.approx(expected, abs=1e-9)
        for path in (tmp_path / "one/visrank_market1501").iterdir():
            assert (tmp_path / "visrank_market1501" / path.name).read_bytes() == path.read_bytes()
    own = [torch.load(tmp_path / f"own-{rank}") for rank in range(processes)]
    for theirs in own[1:]:
        for first, other in zip(own[0], theirs, strict=True):
            assert torch.equal(first, other)
    expected, _ = rank_some()
    for result in results:
        ranked, looked = result["ranked"]
        assert looked == results[0]["ranked"][1]
        for ours, one_process in zip(ranked, expected, strict=True):
            np.testing.assert_allclose(ours, one_process, atol=1e-6)
    for name in CASES:
        shown, gradients, memory = train(name, str(reid_data), slice(None))
        for result in results:
            there, their_gradients, their_memory = result[name]
            for step, their_step in zip(shown, there):
                # The numbers shown are summed up in float32, the gradients are not.
                assert their_step == pytest.approx(step, rel=1e-5, abs=1e-6), name
            for ours, theirs in zip(gradients, their_gradients):
                torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-13)
            assert (memory is None) == (their_memory is None)
            if memory is not None:
                torch.testing.assert_close(their_memory, memory, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_parts_of_an_epoch_make_up_the_epoch(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [("", pid, 0) for pid in range(30) for _ in range(pid % 7 + 2)]
    sampler = IdentitySampler(items, batch_size=40, num_instances=4, seed=1)
    loader = DataLoader(range(len(items)), sampler=sampler, batch_size=40, drop_last=True)  # type: ignore[arg-type]
    sampler.set_epoch(3)
    whole = list(loader.batch_sampler)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sampler.set_epoch(3)
        shards = shard_training(loader).batch_sampler
        parts.append(list(shards))
        assert len(shards) == len(parts[-1]) == len(whole)
    for batch, *of_batch in zip(whole, *parts):
        assert [index for part in of_batch for index in part] == batch
        identities = [{items[index][1] for index in part} for part in of_batch]
        assert sum(map(len, identities)) == len(set.union(*identities)) == 10
        sizes = list(map(len, of_batch))
        assert max(sizes) - min(sizes) <= 4


def test_a_last_batch_too_small_for_all_is_left_out_and_a_batch_too_small_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    parts = shard_training(DataLoader(range(14), batch_size=6))  # type: ignore[arg-type]
    assert [part.tolist() for part in parts] == [[2, 3], [8, 9]]
    assert len(parts) == 2
    parts = shard_training(DataLoader(range(16), batch_size=6))  # type: ignore[arg-type]
    assert [part.tolist() for part in parts] == [[2, 3], [8, 9], [13]]
    assert len(parts) == 3
    with pytest.raises(ValueError, match=r"2 images has 2 groups of 1 .*, too few for 3 processes"):
        shard_training(DataLoader(range(14), batch_size=2))  # type: ignore[arg-type]


def start_torchrun(processes: int, *options: str, cwd: Path, restarts: int = 0) -> subprocess.Popen[str]:
    how = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command = ["-m", "torch.distributed.run", *how, "-m", "torchreid_snloss", *options]
    started: subprocess.Popen[str] = start(*command, cwd=cwd, stderr=subprocess.STDOUT)
    return started


def torchrun(processes: int, *options: str, **how: Any) -> str:
    """What all processes print; they must end well."""
    started = start_torchrun(processes, *options, **how)
    output, _ = started.communicate(timeout=120)
    own, _, of_torchrun = output.partition("torch/distributed/run.py")
    assert started.returncode == 0, f"{own[-4000:]}\n{of_torchrun[-400:]}"
    return output


def options(reid_data: Path, epochs: int) -> list[str]:
    # With such a beta FIDI has no gradient, which a line says.
    own = ["loss.name", "sn+fidi", "loss.fidi.beta", 500]
    own += ["train.max_epoch", epochs, "train.lr_scheduler", "cosine", "test.normalize_feature", True]
    own += ["data.batch_transforms", True]
    return ["--root", str(reid_data), *process_options(*own)]


def results_in(output: str) -> list[str]:
    return re.findall(r"^(?:mAP|mINP|Rank-\d+ *): .*", output, flags=re.MULTILINE)


def test_trains_by_torchrun_evaluates_as_one_process_and_goes_on_with_another_number(
    reid_data: Path, tmp_path: Path, command_line: Callable[..., Done]
) -> None:
    output = torchrun(2, *options(reid_data, 2), "train.record", "True", "data.cache", "ram", cwd=tmp_path)
    assert output.count("epoch: [2/2][3/3]") == 1, "one process prints"
    assert output.count("decoded images take") == 1
    assert "Cython" not in output
    assert output.count("does nothing") == output.count("** loss_fidi does nothing in epoch 1: its value is ") == 1
    assert len(results_in(output)) == 12  # before training and after it
    assert sorted(path.name for path in (tmp_path / "log" / "model").iterdir()) == [
        "model-best.pth.tar", "model.pth.tar-1", "model.pth.tar-2",
    ]  # fmt: skip
    assert len(list((tmp_path / "log").glob("events.out*"))) == len(list((tmp_path / "log").glob("train.log*"))) == 1
    record = read_record(tmp_path / "log/record")
    assert list(record.epochs) == [1, 2]
    assert list(record.evaluations["market1501"]) == [0, 2]
    assert f"mAP: {record.evaluations['market1501'][2]['mAP']:.1%}" in results_in(output)[6:]
    query, gallery = read_features(tmp_path / "log/record", "market1501", after=True)
    assert (len(query.features), len(gallery.features)) == (16, 48)
    assert [int(Path(path).name[:4]) for path in gallery.paths] == gallery.pids.tolist()

    test = [*options(reid_data, 2), "model.load_weights", "log/model/model.pth.tar-2", "test.evaluate", "True"]
    assert results_in(command_line(*test).out) == results_in(output)[6:]

    resumed = command_line(*options(reid_data, 3), "model.resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "after 2 epochs" in resumed.out
    assert "epoch: [3/3][3/3]" in resumed.out


def command_line_on_one_of_two(rank: int, port: int, arguments: list[list[str]], folder: str) -> None:
    """Runs the command line, with arguments of each process's own; what it prints, returns and leaves goes to files."""
    join(rank, 2, port)
    os.chdir(folder)
    with (
        open(f"out-{rank}", "w") as out,
        open(f"err-{rank}", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(arguments[rank])
    Path(f"code-{rank}").write_text(str(code))
    Path(f"threads-{rank}").write_text("".join(name.read_text() for name in Path("/proc/self/task").glob("*/comm")))


def on_two(arguments: list[list[str]], folder: Path) -> list[Done]:
    spawn(command_line_on_one_of_two, 2, arguments, str(folder))
    texts = [[(folder / f"{what}-{rank}").read_text() for what in ("code", "out", "err")] for rank in (0, 1)]
    return [Done(int(code), out, err) for code, out, err in texts]


def test_softmax_alone_trains_on_two_processes_and_leaves_no_thread(reid_data: Path, tmp_path: Path) -> None:
    first, second = on_two([[*options(reid_data, 1), "loss.name", "softmax"]] * 2, tmp_path)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    (line,) = re.findall(r"epoch: \[1/1\]\[3/3\].*", first.out)
    assert "loss_x " in line
    assert len(results_in(first.out)) == 6
    assert second.out == ""
    threads = [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)]
    assert "gloo" not in "".join(threads), "such a thread can abort the process at its end"
    assert (tmp_path / "log/model/model.pth.tar-1").is_file()


@pytest.mark.parametrize(("failing", "prefix"), [((1,), "rank 1: "), ((0, 1), "")])
def test_an_error_of_one_rank_is_told_once(
    failing: tuple[int, ...], prefix: str, reid_data: Path, tmp_path: Path
) -> None:
    rates = ["-1" if rank in failing else "0.1" for rank in (0, 1)]
    done = on_two([[*options(reid_data, 1), "train.lr", rate] for rate in rates], tmp_path)
    assert [one.code for one in done] == [2, 2]
    told = [line for one in done for line in one.err.splitlines() if line.startswith("torchreid-snloss: ")]
    assert len(told) == 1
    assert told[0].startswith(f"torchreid-snloss: error: {prefix}train.lr must be")


def test_a_folder_that_rank_0_can_not_write_to_is_told_once(reid_data: Path, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log/record").touch()
    done = on_two([[*options(reid_data, 1), "train.record", "True"]] * 2, tmp_path)
    assert [one.code for one in done] == [2, 2]
    (told,) = [line for one in done for line in one.err.splitlines() if line.startswith("torchreid-snloss: ")]
    assert "error: data.save_dir 'log' can't be written to: " in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.batch_size", 8], "train.batch_size 8 with 4 images .* is 2 identities, too few for 3 processes"),
        (["loss.memory.size", 8, "loss.name", "triplet"], "loss.memory.size needs loss sn, hap2s, fidi or custom; got"),
        (["train.sync_batchnorm", True], "train.sync_batchnorm True needs GPUs"),
        (["train.micro_batch", -1], "train.micro_batch must be at least 0; got train.micro_batch -1"),
        (["loss.memory.size", -1], "loss.memory.size must be at least 0; got loss.memory.size -1"),
        (["loss.memory.size", 8, "data.type", "video"], "loss.memory.size above 0 needs data.type image"),
    ],
)
def test_what_several_processes_can_not_do_is_told(
    changes: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(options=["loss.name", "sn", "use_gpu", False, *changes]))


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/x/gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:2", True),
        ("NCCL error in: x.cpp:3, remote process exited or there was a network error", True),
        ("NCCL error in: x.cpp:3, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", False),
    ],
)
def test_an_error_of_its_own_is_not_told_as_that_of_another_process(
    text: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    error = torch.distributed.DistBackendError(text)
    with pytest.raises(RuntimeError) as raised, distributed.named_failures():
        raise error
    assert isinstance(raised.value, distributed.PeerError) == lost
    assert lost or raised.value is error
    assert concerns_one_process(CompileError("no compiler"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, r"the environment has only \['RANK'\] of what torchrun sets"),
        (
            {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "1000"},
            "process 1000 .from 0. on this machine, which has . GPUs",
        ),
    ],
)
def test_what_torchrun_did_not_set_is_told(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start(use_gpu=True)


def kill_one_of_two(started: Any, words: str) -> str:
    """Kills the second process, once a line has the words; returns what was printed until then."""
    printed = ""
    for line in started.stdout:
        printed += line
        if words in line:
            break
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    second = [pid for pid in children if b"RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second[0]), signal.SIGKILL)
    return printed


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_lost_process_ends_the_others_and_a_restart_goes_on(reid_data: Path, tmp_path: Path) -> None:
    # What an earlier run left in the folder, with times in the future, is not gone on from.
    earlier = {"epoch": 30, "optimizer": {}, "scheduler": {}, "state_dict": {"w": torch.zeros(3)}, "run": "9" * 20}
    save_checkpoint(earlier, tmp_path / "log/model/model.pth.tar-30")
    (tmp_path / "log/model/.run").write_text("an earlier launch\n" + "9" * 20 + "\n")
    os.utime(tmp_path / "log/model/model.pth.tar-30", (2**32, 2**32))

    started = start_torchrun(2, *options(reid_data, 40), cwd=tmp_path, restarts=1)
    before = kill_one_of_two(started, "epoch: [2/")
    assert "Resuming from" not in before
    between = kill_one_of_two(started, "epoch: [5/")
    (done,) = re.findall(r'Resuming from "log/model/model.pth.tar-\d+", after (\d+) epoch', between)
    assert 1 <= int(done) < 5
    assert "epoch: [1/" not in between
    killed = time.monotonic()
    output, _ = started.communicate(timeout=60)
    assert time.monotonic() - killed < 40
    assert started.returncode != 0
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)\s+exitcode\s*: -9", output), output
