"""What runs on a GPU ends as on a CPU, up to rounding."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, Done, Tiny, make_datamanager, process_options, tiny_options
from torchreid import models, optim, utils

import torchreid_snloss
from torchreid_snloss import FIDILoss, HAP2SLoss, SNLoss
from torchreid_snloss.build import build_datamanager
from torchreid_snloss.checkpoint import load_checkpoint
from torchreid_snloss.config import load_config
from torchreid_snloss.engine.amp import check_amp
from torchreid_snloss.losses import Differences, MetricLoss, Products
from torchreid_snloss.losses.nearest import nearest_by_sorting, nearest_by_topk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ALL = "['random_flip', 'random_crop', 'random_patch', 'color_jitter', 'random_erase']"
LOSSES = [
    SNLoss(),
    SNLoss(squeeze="all"),
    HAP2SLoss(),
    HAP2SLoss(weighting="polynomial"),
    FIDILoss(),
    FIDILoss(normalize=False),
]


@pytest.fixture
def train(train: Callable[..., Done]) -> Callable[..., Done]:
    """The command line on the GPU, for an epoch."""
    return lambda *options: train("use_gpu", "True", "train.max_epoch", 1, "loss.name", "hap2s", *options)


def weights(path: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(Path(path, "model/model.pth.tar-1"))["state_dict"]
    return state


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value.cpu(), other[name].cpu(), rtol=0.01, atol=0.003, msg=name)


# ---- losses ----


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "repeated", "crowd", "half near"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("identities", [8, 150])
@pytest.mark.parametrize("algorithm", [None, Products(), Differences()], ids=["chosen", "products", "differences"])
@pytest.mark.parametrize("block_size", [0, 100])
def test_losses(
    loss: MetricLoss, kind: str, dtype: torch.dtype, identities: int, algorithm: Any, block_size: int
) -> None:
    features = torch.randn(4 * identities, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "repeated":
        features[1] = features[0]
    if kind in ("crowd", "half near"):  # squared distances of unit features around 2e-4 and 2e-2
        features = 1 + (1e-2 if kind == "crowd" else 0.1) * features
    features, targets = features.float().double(), torch.arange(identities).repeat_interleave(4)
    exact, gpu = features.clone().requires_grad_(), features.to("cuda", dtype).requires_grad_()
    expected = loss(exact, targets)
    expected.backward()
    try:
        loss.distances, loss.block_size = algorithm, block_size
        value = loss(gpu, targets.cuda())
        value.backward()
    finally:
        loss.distances, loss.block_size = None, 0
    digits = 1e-4 if dtype == torch.float32 else 1e-9
    assert value.item() == pytest.approx(expected.item(), rel=digits)
    errors, largest = (gpu.grad.cpu().double() - exact.grad).abs().amax(dim=1), exact.grad.abs().max()
    # For a few of many anchors the 10th and the 11th neighbour differ in rounding only: either may be in SN's support.
    swaps = isinstance(loss, SNLoss) and kind == "half near" and dtype == torch.float32
    assert (errors > digits * largest).double().mean() <= (0.1 if swaps else 0)
    assert errors.max() <= (0.05 if swaps else digits) * largest


def test_nearest_at_equal_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 6, (300, 200), generator=generator).float()
    positive = torch.rand(300, 200, generator=generator) < 0.1
    expected = nearest_by_topk(distances, positive, 20)
    assert torch.equal(nearest_by_sorting(distances.cuda(), positive.cuda(), 20).cpu(), expected)


# ---- a step ----


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in torchreid_snloss.engine.ENGINES if name[0] == "image"], ids="-".join)
def test_one_synchronisation_a_step(name: Any, amp: Any, reid_data: Path) -> None:
    cls = torchreid_snloss.engine.ENGINES[name]
    more = {"criterion": SNLoss()} if cls is torchreid_snloss.ImageMetricEngine else {}
    manager = make_datamanager(reid_data, use_gpu=True)
    model = models.build_model("osnet_x0_25", 16, loss="triplet", pretrained=False).cuda().train()
    optimizer = optim.build_optimizer(model, lr=0.001)
    training = cls(manager, model, optimizer, amp=amp, channels_last=True, **more)
    batch = next(iter(manager.train_loader))
    assert batch["img"].is_pinned()
    for _ in range(3):
        training.forward_backward(batch)  # cuDNN, the optimizer and the scaler set themselves up
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as noted:
            training.forward_backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits = [str(warning.message) for warning in noted if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == 1


def test_an_old_gpu_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    check_amp("bf16", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="amp bf16 needs an Ampere or newer GPU"):
        check_amp("bf16", "cuda")


# ---- images ----


def test_batch_transforms(reid_data: Path) -> None:
    images = []
    for use_gpu in (False, True):
        options = tiny_options("data.transforms", "['random_flip', 'random_crop', 'color_jitter']", "use_gpu", use_gpu)
        cfg = load_config(options=["data.root", str(reid_data), "data.batch_transforms", "True", *options])
        utils.set_random_seed(1)
        images.append(next(iter(build_datamanager(cfg).train_loader))["img"])
    assert [one.is_cuda for one in images] == [False, True]
    difference = (images[0] - images[1].cpu()).abs()
    step = 1 / 255 / 0.225  # of a normalised channel
    assert difference.mean() <= step
    assert difference.max() <= 4 * step


# ---- the command line ----


@pytest.mark.parametrize("name", ["softmax", "triplet", "sn", "hap2s", "fidi", "sn+triplet"])
def test_a_run_on_a_gpu_and_on_a_cpu_are_alike(name: str, train: Callable[..., Done]) -> None:
    options = (
        "loss.name",
        name,
        "train.own_step",
        "True",
        "train.optim",
        "sgd",
        "train.lr",
        0.001,
        "test.ranks",
        "[1]",
    )
    for use_gpu in (True, False):
        done = train(*options, "use_gpu", use_gpu, "data.save_dir", f"gpu-{use_gpu}")
        assert done.code == 0, done.err
        assert re.search(r"mAP: [\d.]+%", done.out)
    assert_alike(weights("gpu-True"), weights("gpu-False"))


@pytest.mark.parametrize(
    "options",
    [
        ("train.amp", "bf16", "train.channels_last", True),
        ("train.amp", "fp16", "train.channels_last", True),
        ("train.compile", True),
        ("train.micro_batch", 8),
        ("loss.memory.size", 64, "loss.name", "sn"),
        ("data.batch_transforms", True, "data.transforms", ALL),
        ("data.batch_transforms", True, "data.transforms", ALL, "data.cache", "ram", "data.workers", 2),
        ("test.rerank", True, "test.flip", True),
        ("data.val_fraction", 0.25, "test.eval_freq", 1, "train.record", True),
    ],
    ids=str,
)
def test_options(options: tuple[object, ...], train: Callable[..., Done]) -> None:
    done = train(*options)
    assert done.code == 0, done.err
    assert re.search(r"mAP: [\d.]+%", done.out)
    assert all(value.isfinite().all() for value in weights("log").values())


def test_data_parallel_on_several_gpus_only(train: Callable[..., Done]) -> None:
    done = train("train.amp", "fp16", "train.channels_last", "True")
    assert done.code == 0, done.err
    several = torch.cuda.device_count() > 1
    assert all(name.startswith("module.") == several for name in weights("log"))


def test_a_run_goes_on_after_an_epoch(train: Callable[..., Done]) -> None:
    for save_dir, epochs in (("whole", [2]), ("parts", [1, 2])):
        for epoch in epochs:
            options = ("train.optim", "sgd", "train.lr", 0.001, "train.max_epoch", epoch, "data.save_dir", save_dir)
            done = train(*options, "train.own_step", True, *(("model.resume", "auto") if epoch == 2 else ()))
            assert done.code == 0, done.err
    states = [load_checkpoint(Path(name, "model/model.pth.tar-2"))["state_dict"] for name in ("whole", "parts")]
    assert_alike(*states)


def test_torchrun_with_nccl(reid_data: Path, tmp_path: Path) -> None:
    options = process_options("use_gpu", True, "train.max_epoch", 1, "loss.name", "sn", "train.sync_batchnorm", True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "torchreid_snloss", "--root", str(reid_data), *options]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    del environment["CUDA_VISIBLE_DEVICES"]  # which hides all GPUs
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        environment["CUDA_VISIBLE_DEVICES"] = given
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"mAP: [\d.]+%", done.stdout)


def test_features_of_a_trained_model(train: Callable[..., Done], reid_data: Path) -> None:
    from torchreid_snloss.inference.features import main

    assert train().code == 0
    found = []
    for use_gpu in ("True", "False"):
        arguments = ["--images", str(next(reid_data.rglob("query"))), "--output", f"{use_gpu}.npz"]
        options = tiny_options("model.load_weights", "log/model/model.pth.tar-1", "use_gpu", use_gpu)
        assert main([*arguments, *options]) == 0
        found.append(np.load(f"{use_gpu}.npz")["features"])
    np.testing.assert_allclose(*found, atol=2e-3 * np.abs(found[0]).max())


def test_a_model_left_on_the_cpu_is_told(reid_data: Path) -> None:
    manager = make_datamanager(reid_data, use_gpu=True)
    model = Tiny(manager.num_train_pids)
    with pytest.raises(ValueError, match=r"the model is on the CPU, but use_gpu is True: call model\.cuda\(\) first"):
        torchreid_snloss.ImageSNEngine(manager, model, optim.build_optimizer(model, lr=0.001))
