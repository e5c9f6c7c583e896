"""Cross-batch memory, by hand and in an engine; and gradient caching with a model that has dropout and batch norm."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_engine
from torch import Tensor, nn

from torchreid_snloss import FIDILoss, ImageFIDIEngine, ImageSNEngine, SNLoss
from torchreid_snloss.engine.image_ids import ImageIds
from torchreid_snloss.losses import GlobalBatchLoss, Memory


def fidi_term(x: Tensor, y: Tensor, same: bool, alpha: float = 1.05, beta: float = 0.5) -> Tensor:
    u = torch.exp(-beta * (x - y).norm())
    k = torch.tensor(float(same), dtype=x.dtype)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return p * torch.log(alpha * p / ((alpha - 1) * p + q)) if p > 0 else p * 0

    return divergence(u, k) + divergence(k, u)


def test_memory_is_further_references_without_an_image_s_own_old_copy() -> None:
    torch.manual_seed(0)
    loss = GlobalBatchLoss({"fidi": FIDILoss(beta=0.5, normalize=False)}, Memory(size=7))
    batches = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    pids = [torch.tensor(values) for values in ([0, 0, 1, 1], [0, 2, 2, 0], [1, 1, 0, 0], [0, 0, 2, 2])]
    images = [torch.tensor(values) for values in ([0, 1, 2, 3], [0, 5, 6, 1], [2, 2, 0, 1], [1, 1, 5, 6])]
    old: list[tuple[Tensor, int, int]] = []
    for x, labels, numbers in zip(batches, pids, images):
        value = loss(x, labels, numbers)[0]["fidi"]
        (gradient,) = torch.autograd.grad(value, x)
        terms = []
        for i in range(4):
            # Two of one image in a batch are a pair; an old copy is none.
            terms += [fidi_term(x[i], x[j], bool(labels[i] == labels[j])) for j in range(4) if j != i]
            terms += [fidi_term(x[i], y, bool(labels[i] == pid)) for y, pid, image in old if image != int(numbers[i])]
        expected = torch.stack(terms).mean()
        (expected_gradient,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        old = [*old, *((row.detach(), int(pid), int(image)) for row, pid, image in zip(x, labels, numbers))][-7:]
    assert loss.memory is not None
    assert loss.memory.features is not None
    assert torch.equal(loss.memory.features, torch.stack([row for row, _, _ in old]))


def test_what_a_loss_refuses_it_refuses_with_a_memory_too() -> None:
    loss = GlobalBatchLoss({"sn": SNLoss()}, Memory(10))
    with pytest.raises(ValueError, match=r"inputs must have shape \(images, feature dimension\), got \(4, 3, 1, 1\)"):
        loss(torch.randn(4, 3, 1, 1), torch.tensor([0, 0, 1, 1]), torch.arange(4))
    with pytest.raises(TypeError, match="targets must hold integer identity labels"):
        loss(torch.randn(4, 3), torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.arange(4))


def test_a_memory_that_is_not_in_use_yet_forgets(datamanager: Any) -> None:
    engine = make_engine(ImageSNEngine, datamanager, memory_size=40, memory_start_epoch=1)
    engine.memory.add(torch.randn(8, 256), torch.arange(8), torch.arange(8))  # as a run leaves it that started earlier
    engine.epoch = 0
    engine.forward_backward(next(iter(engine.train_loader)))
    assert engine.memory.features is None


def test_memory_in_row_blocks_is_the_same() -> None:
    torch.manual_seed(0)
    values = []
    for block_size in (0, 3):
        loss = GlobalBatchLoss({"sn": SNLoss(num_neighbors=3, block_size=block_size)}, Memory(100))
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            features = torch.randn(8, 5, generator=generator, dtype=torch.float64)
            images = torch.arange(8) + step * 4
            values.append(loss(features, images // 4 % 3, images % 16)[0]["sn"])
    torch.testing.assert_close(values[:3], values[3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.MSELoss(), Memory(4)), "only works with this package's losses, got MSELoss"),
        ((FIDILoss(reduction="sum"), None), "must be 'mean', got 'sum'"),
    ],
)
def test_a_wrong_loss_is_told(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalBatchLoss({"one": arguments[0]}, arguments[1])


def test_a_memory_without_images_or_of_another_dimension_is_told() -> None:
    loss = GlobalBatchLoss({"fidi": FIDILoss()}, Memory(4))
    with pytest.raises(ValueError, match="images is None"):
        loss(torch.zeros(2, 3), torch.arange(2))
    loss(torch.zeros(2, 3), torch.arange(2), torch.arange(2))
    with pytest.raises(ValueError, match="dimension 3, got 5"):
        loss(torch.zeros(2, 5), torch.arange(2), torch.arange(2))
    with pytest.raises(ValueError, match="size"):
        Memory(0)


def train(datamanager: Any, folder: Path, epochs: int, resume: str = "", **options: Any) -> Any:
    engine = make_engine(ImageSNEngine, datamanager, **options)
    start = engine.resume(resume) if resume else 0
    engine.run(save_dir=str(folder), max_epoch=epochs, start_epoch=start)
    return engine


def test_memory_starts_when_told_and_is_in_checkpoints(datamanager: Any, tmp_path: Path) -> None:
    options = {"memory_size": 150, "memory_start_epoch": 1}
    whole = train(datamanager, tmp_path / "whole", 3, **options)
    steps = len(datamanager.train_loader)
    held = torch.load(tmp_path / "whole/model/model.pth.tar-1", weights_only=True)["memory"]
    assert held["features"] is None
    held = torch.load(tmp_path / "whole/model/model.pth.tar-2", weights_only=True)["memory"]
    assert len(held["features"]) == min(150, 32 * steps)

    train(datamanager, tmp_path / "parts", 2, **options)
    resumed = train(datamanager, tmp_path / "parts", 3, str(tmp_path / "parts/model/model.pth.tar-2"), **options)
    for ours, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed.memory.features, whole.memory.features)
    fewer = train(datamanager, tmp_path / "fewer", 0, str(tmp_path / "whole/model/model.pth.tar-3"), memory_size=5)
    assert torch.equal(fewer.memory.images, whole.memory.images[-5:])


def test_a_skipped_batch_is_not_remembered(datamanager: Any) -> None:
    engine = make_engine(ImageSNEngine, datamanager, lr=0.0, memory_size=64)
    engine.options.nonfinite = "skip"
    batch = next(iter(datamanager.train_loader))
    assert engine.forward_backward(batch)
    broken = {**batch, "img": torch.full_like(batch["img"], torch.nan)}
    assert engine.forward_backward(broken) == {}
    assert len(engine.memory.features) == 32
    assert engine.forward_backward(batch)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.classifier = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.layers(images).mean(dim=(2, 3))
        return self.classifier(features), [features, 2 * features]


def test_micro_batches_have_one_dropout_and_batch_norm_sees_an_image_once(datamanager: Any) -> None:
    """By the definition: each micro-batch in a graph of its own, all graphs kept, one loss."""
    torch.manual_seed(0)
    images, pids = torch.randn(10, 3, 8, 8), torch.arange(10) // 2 % 4
    model = WithDropout().train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    engine = make_engine(ImageFIDIEngine, datamanager, model, lr=0.0, micro_batch=4)
    torch.manual_seed(7)
    shown = engine.forward_backward({"img": images, "pid": pids})
    after = torch.rand(1)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    buffers = [buffer.clone() for buffer in model.buffers()]

    model.load_state_dict(start)
    model.zero_grad()
    torch.manual_seed(7)
    outputs = [model(part) for part in images.tensor_split(3)]
    assert torch.equal(torch.rand(1), after), "the generator is left as the whole batch leaves it"
    logits = torch.cat([logits for logits, _ in outputs])
    features = [torch.cat(same) for same in zip(*(features for _, features in outputs))]
    metric = sum(FIDILoss()(feature, pids) for feature in features) / 2
    loss = metric + nn.CrossEntropyLoss(label_smoothing=0.1)(logits, pids)
    loss.backward()
    assert shown["loss_m"] + shown["loss_x"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert math.isfinite(shown["loss_m"])
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(buffers, model.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_an_image_is_known_by_its_place_in_the_data() -> None:
    names = ["ann/monday/cam1/1.jpg", "ann/friday/cam1/1.jpg", "ann/friday/cam2/1.jpg", "bob/monday/cam1/1.jpg"]

    def ids(root: str) -> list[int]:
        items = [(f"{root}/{name}", int(name[0] == "b"), 0, 0) for name in names]
        batch = {"pid": torch.tensor([item[1] for item in items]), "impath": [item[0] for item in items]}
        return ImageIds(SimpleNamespace(train=items))(batch, torch.zeros(4, 2)).tolist()  # type: ignore[no-any-return]

    assert len(set(ids("/data"))) == 4
    assert ids("/data") == ids("/copy/of it")
