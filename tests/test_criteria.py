"""Any criterion in the engines, from Python and from a config; and this package's losses in pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Tiny, make_engine, tiny_options
from torch import Tensor
from torchreid import losses as reid_losses
from torchreid import utils

from torchreid_snloss import FIDILoss, HAP2SLoss, ImageMetricEngine, SNLoss
from torchreid_snloss.engine.options import NonFiniteError, TrainOptions
from torchreid_snloss.losses import MinedLoss

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, samplers, trainers  # noqa: E402

from torchreid_snloss.criteria import make_criterion  # noqa: E402
from torchreid_snloss.pml import CrossBatchMemory, PairwiseLoss  # noqa: E402


def centre(features: Tensor, pids: Tensor) -> Tensor:
    """A criterion of a user's own."""
    return torch.stack([features[pids == pid].var(dim=0).sum() for pid in pids.unique()]).mean()


CRITERIA: dict[str, Any] = {
    "a function": centre,
    "torchreid's triplet": reid_losses.TripletLoss(),
    "contrastive": losses.ContrastiveLoss(),
    "circle": losses.CircleLoss(),
    "multi-similarity, mined": MinedLoss(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "triplet, mined": MinedLoss(
        losses.TripletMarginLoss(margin=0.3), miners.BatchHardMiner(distance=distances.LpDistance())
    ),
    "NT-Xent": losses.NTXentLoss(),
    "supervised contrastive": losses.SupConLoss(),
    "lifted": losses.LiftedStructureLoss(),
    "NCA": losses.NCALoss(),
    "tuplet": losses.TupletMarginLoss(),
    "proxy anchor": losses.ProxyAnchorLoss(num_classes=16, embedding_size=256),
    "ours": PairwiseLoss(HAP2SLoss()),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_any_criterion_trains(name: str, datamanager: Any, batch: dict[str, Any]) -> None:
    utils.set_random_seed(1)
    criterion, model = CRITERIA[name], Tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    if name == "proxy anchor":
        with pytest.raises(ValueError, match=r"parameters that the optimizer does not have: .*proxies"):
            ImageMetricEngine(datamanager, model, optimizer, criterion, use_gpu=False)
        optimizer.add_param_group({"params": list(criterion.parameters())})
    engine = ImageMetricEngine(datamanager, model, optimizer, criterion, weight_x=0, use_gpu=False)
    engine.set_model_mode("train")
    shown = [engine.forward_backward(batch)["loss_m"] for _ in range(6)]
    assert shown[-1] < shown[0]


def test_several_criteria_are_a_column_each_and_add_up(datamanager: Any, batch: dict[str, Any]) -> None:
    criteria = {"sn": SNLoss(), "triplet": reid_losses.TripletLoss(), "off": centre}
    engine = make_engine(
        ImageMetricEngine, datamanager, criterion=criteria, weight_m={"sn": 0.5, "triplet": 2.0, "off": 0.0}, lr=0.0,
        label_smooth=False,
    )  # fmt: skip
    model = engine.model
    shown = engine.forward_backward(batch)
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    assert {name for name in shown if name.startswith("loss")} == {"loss_sn", "loss_triplet", "loss_x"}
    assert "sn_d_pos" in shown

    images, pids = batch["img"], batch["pid"]
    model.zero_grad()
    logits, features = model(images)
    terms = SNLoss()(features, pids), reid_losses.TripletLoss()(features, pids)
    softmax = torch.nn.functional.cross_entropy(logits, pids)
    assert shown["loss_sn"] == pytest.approx(float(terms[0].detach()), rel=1e-5)
    assert shown["loss_triplet"] == pytest.approx(float(terms[1].detach()), rel=1e-5)
    assert shown["loss_x"] == pytest.approx(float(softmax.detach()), rel=1e-5)
    (0.5 * terms[0] + 2 * terms[1] + softmax).backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_what_is_no_criterion_is_told(datamanager: Any, batch: dict[str, Any]) -> None:
    engine = make_engine(ImageMetricEngine, datamanager, criterion=lambda features, pids: features)
    with pytest.raises(TypeError, match=r"'m' must return a scalar tensor, got \(32, 256\)"):
        engine.forward_backward(batch)
    with pytest.raises(ValueError, match="weight_m must have the criteria's names"):
        make_engine(ImageMetricEngine, datamanager, criterion={"a": centre}, weight_m={"b": 1.0})


def test_from_the_command_line(train: Callable[..., Done]) -> None:
    custom = ["loss.custom.target", "pytorch_metric_learning.losses.ProxyAnchorLoss", "loss.custom.kwargs"]
    custom += ["{'num_classes': 16, 'embedding_size': 256}", "loss.custom.weight_m", "0.1"]
    done = train("train.max_epoch", 1, "loss.name", "hap2s+custom", *custom)
    assert done.code == 0, done.err
    assert "loss_hap2s" in done.out
    assert "loss_custom" in done.out
    held = torch.load("log/model/model.pth.tar-1", weights_only=True)["criterion"]
    assert any("proxies" in name for name in held)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "loss.name custom needs a criterion: set loss.custom.target"),
        (["loss.custom.target", "nowhere.Loss"], "can't import 'nowhere.Loss': No module named 'nowhere'"),
        (["loss.custom.target", "torchreid.losses.NoLoss"], "can't import 'torchreid.losses.NoLoss'"),
        (
            [
                "loss.custom.target",
                "pytorch_metric_learning.losses.CircleLoss",
                "loss.custom.kwargs",
                "{'m': 1, 'z': 2}",
            ],
            "loss.custom: .*unexpected keyword argument 'z'",
        ),
        (["loss.custom.target", "torchreid.__name__"], "must be a class or function, it is a str"),
        (["loss.custom.kwargs", "{'a': {1, 2}}"], "loss.custom.kwargs must hold numbers"),
        (["loss.name", "sn+softmax"], "loss.name must be one of triplet, sn, hap2s, fidi, custom, got 'softmax'"),
        (["loss.name", "sn+sn"], "must name each loss once"),
        (
            ["loss.custom.target", "torchreid_snloss.SNLoss", "loss.custom.miner_kwargs", "{'epsilon': 0.1}"],
            "loss.custom.miner_kwargs are set, but loss.custom.miner names no miner",
        ),
    ],
)
def test_a_custom_loss_that_is_none_is_told(changes: list[str], message: str) -> None:
    from torchreid_snloss.config import ConfigError, load_config
    from torchreid_snloss.settings import resolve

    with pytest.raises(ConfigError, match=message):
        resolve(load_config(options=["loss.name", "custom", "use_gpu", "False", *changes]))


def test_keywords_come_from_a_file_too(tmp_path: Path) -> None:
    from torchreid_snloss.build import build_criteria
    from torchreid_snloss.config import load_config

    (tmp_path / "my.yaml").write_text(
        "loss:\n  name: custom\n  custom:\n    target: pytorch_metric_learning.losses.CircleLoss\n"
        "    kwargs: {m: 0.3, gamma: 64}\n"
    )
    loss: Any = build_criteria(load_config(str(tmp_path / "my.yaml")))["custom"]
    assert (loss.m, loss.gamma) == (0.3, 64)


@pytest.mark.parametrize("loss", [SNLoss(scale=10.0), HAP2SLoss(), FIDILoss()])
def test_in_pytorch_metric_learning_a_loss_is_itself(loss: Any) -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 5, requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])
    adapted = PairwiseLoss(type(loss)(), collect_stats=True)
    own = type(loss)()
    torch.testing.assert_close(adapted(features, labels), own(features, labels))
    assert adapted.d_neg > 0
    references, reference_labels = torch.randn(9, 5), torch.arange(9) % 5
    torch.testing.assert_close(
        adapted(features, labels, None, references, reference_labels),
        own(features, labels, references, reference_labels),
    )
    # All pairs, named, are all pairs.
    pairs = pml.utils.loss_and_miner_utils.get_all_pairs_indices(labels)
    torch.testing.assert_close(adapted(features, labels, pairs), own(features, labels))
    total = PairwiseLoss(type(loss)(), reducer=reducers.SumReducer())
    assert torch.isfinite(total(features, labels))
    total(features, labels, miners.BatchHardMiner()(features, labels)).backward()
    assert torch.isfinite(features.grad).all()
    assert adapted(features[:1], labels[:1]).item() == 0


def test_named_pairs_alone_count() -> None:
    torch.manual_seed(1)
    features, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    tensors = (torch.tensor(values) for values in ([0, 4], [1, 5], [0, 0, 4], [3, 4, 2]))
    value = PairwiseLoss(HAP2SLoss(sigma=0.2))(features, labels, tuple(tensors))
    unit = torch.nn.functional.normalize(features)
    d = torch.cdist(unit, unit)
    near = torch.softmax(-d[0, 3:5] / 0.2, 0) @ d[0, 3:5]
    expected = torch.stack([d[0, 1] - near + 0.3, d[4, 5] - d[4, 2] + 0.3]).relu().mean()
    torch.testing.assert_close(value, expected)


def test_pairs_that_the_labels_contradict_and_inputs_of_a_wrong_kind_are_told() -> None:
    features, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    loss = PairwiseLoss(SNLoss())
    for kind, tuples in (("positive", ([0], [3], [], [])), ("negative", ([], [], [0], [1]))):
        with pytest.raises(ValueError, match=f"indices_tuple has {kind} pairs that the labels contradict"):
            loss(features, labels, tuple(torch.tensor(part, dtype=torch.int64) for part in tuples))
    with pytest.raises(TypeError, match=r"targets must be .*, got NoneType"):
        loss(features, indices_tuple=tuple(torch.tensor([number]) for number in (0, 1, 3)))
    with pytest.raises(ValueError, match="must have the same feature dimension"):
        loss(features, labels, None, torch.randn(4, 5), torch.arange(4))


def test_a_miner_selects_for_this_packages_losses_too() -> None:
    torch.manual_seed(1)
    features, labels = torch.randn(12, 5), torch.arange(12) % 3
    section = {"target": "torchreid_snloss.HAP2SLoss", "kwargs": {"margin": 1.0}, "miner_kwargs": {}}
    criterion = make_criterion("custom", {**section, "miner": "pytorch_metric_learning.miners.BatchHardMiner"})
    selected = miners.BatchHardMiner()(features, labels)
    expected = PairwiseLoss(HAP2SLoss(margin=1.0))(features, labels, selected)
    torch.testing.assert_close(criterion(features, labels), expected)
    assert expected != HAP2SLoss(margin=1.0)(features, labels)


def test_in_pytorch_metric_learnings_memory() -> None:
    torch.manual_seed(2)
    memory = CrossBatchMemory(PairwiseLoss(SNLoss(num_neighbors=3)), embedding_size=4, memory_size=20)
    own = SNLoss(num_neighbors=3)
    batches = [(torch.randn(6, 4, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 2])) for _ in range(3)]
    seen: list[Tensor] = []
    for features, labels in batches:
        value = memory(features, labels)
        seen.append(features.detach())
        references = torch.cat([features.detach(), *seen[:-1]])
        values, numbers, _ = own.terms(features, labels, references, labels.repeat(len(seen)), self_offset=0)
        torch.testing.assert_close(value, values.sum() / numbers.sum())
        value.backward()


def test_a_memory_of_pytorch_metric_learning_is_resumed_and_forgets_a_skipped_batch(
    datamanager: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    def engine() -> Any:
        criterion = CrossBatchMemory(PairwiseLoss(SNLoss()), embedding_size=256, memory_size=1000)
        return make_engine(ImageMetricEngine, datamanager, criterion=criterion)

    training = engine()
    training.run(save_dir=str(tmp_path), max_epoch=1)
    (memory,) = (module for module in training.criteria.modules() if isinstance(module, CrossBatchMemory))
    resumed = engine()
    resumed.resume(tmp_path / "model/model.pth.tar-1")
    (again,) = (module for module in resumed.criteria.modules() if isinstance(module, CrossBatchMemory))
    assert again.queue_idx == memory.queue_idx > 0
    assert not again.has_been_filled
    assert torch.equal(again.embedding_memory, memory.embedding_memory)

    resumed.options = TrainOptions(nonfinite="skip")
    resumed.set_model_mode("train")
    assert resumed.forward_backward({**batch, "img": batch["img"] * torch.nan}) == {}
    assert again.queue_idx == memory.queue_idx
    assert torch.equal(again.embedding_memory, memory.embedding_memory)
    assert again.embedding_memory is not memory.embedding_memory
    again.set_extra_state({"queue_idx": 3, "has_been_filled": True})  # as before 0.3
    assert (again.queue_idx, bool(again.has_been_filled)) == (3, True)
    again.embedding_memory[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the criterion's .*embedding_memory among them, and not saved"):
        resumed.checkpointer.save(1, 1)


def test_what_a_wrapper_does_not_take() -> None:
    for loss in (torch.nn.TripletMarginLoss(), "sn"):
        with pytest.raises(TypeError, match="must be one of this package's, a MetricLoss, got"):
            PairwiseLoss(loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="distance is not accepted"):
        PairwiseLoss(SNLoss(), distance=None)


def test_in_pytorch_metric_learnings_trainer() -> None:
    torch.manual_seed(3)
    features, labels = torch.randn(40, 6) + 3 * torch.eye(6)[torch.arange(40) % 5], torch.arange(40) % 5
    trunk, loss = torch.nn.Linear(6, 4), SNLoss(scale=5.0)
    before = float(loss(trunk(features), labels).detach())
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=0.02)},
        batch_size=20,
        loss_funcs={"metric_loss": PairwiseLoss(loss)},
        dataset=torch.utils.data.TensorDataset(features, labels),
        mining_funcs={},
        sampler=samplers.MPerClassSampler(labels, m=4, length_before_new_iter=40),
        dataloader_num_workers=0,
        data_device="cpu",
    )
    trainer.train(num_epochs=5)
    assert float(loss(trunk(features), labels).detach()) < 0.9 * before


@pytest.mark.parametrize(
    ("target", "keywords", "message"),
    [
        ("torch.nn.MSELoss", "{}", "MSELoss with .4, 256. features .*: RuntimeError"),
        (
            "pytorch_metric_learning.losses.ArcFaceLoss",
            "{'num_classes': 3, 'embedding_size': 256}",
            "identities up to 15",
        ),
        ("my_own.Mine", "{}", "it must give a scalar tensor, got 3"),
        ("torchreid.losses.TripletLoss", "{'margin': '1e-1'}", ""),
    ],
)
def test_a_custom_loss_is_tried_before_training(
    target: str, keywords: str, message: str, in_folder: Path, tiny_model: None
) -> None:
    from torchreid_snloss import build_model, load_config
    from torchreid_snloss.build import build_criteria
    from torchreid_snloss.checks import check_criteria
    from torchreid_snloss.config import ConfigError

    (in_folder / "my_own.py").write_text("class Mine:\n    def __call__(self, features, pids):\n        return 3\n")
    own = ["loss.name", "custom", "loss.custom.target", target, "loss.custom.kwargs", keywords, "use_gpu", False]
    cfg = load_config(options=tiny_options(*own))
    model, criteria = build_model(cfg, 16), build_criteria(cfg)
    if not message:
        check_criteria(cfg, criteria, model, 16)
        return
    with pytest.raises(ConfigError, match=message):
        check_criteria(cfg, criteria, model, 16)


@pytest.mark.parametrize("name", ["x", "a.b", "keys", "loss"])
def test_names_that_are_taken_are_told(name: str, datamanager: Any) -> None:
    with pytest.raises(ValueError, match="a criterion can't be named"):
        make_engine(ImageMetricEngine, datamanager, criterion={name: centre}, weight_m={name: 1.0})


def test_another_criterion_s_checkpoint_is_told(datamanager: Any, tmp_path: Path) -> None:
    from torchreid_snloss import CheckpointError

    def make(criterion: Any) -> ImageMetricEngine:
        model = Tiny()
        parameters = [*model.parameters(), *criterion.parameters()]
        return ImageMetricEngine(datamanager, model, torch.optim.SGD(parameters, lr=0.01), criterion, use_gpu=False)

    make(losses.ProxyAnchorLoss(num_classes=16, embedding_size=256)).run(save_dir=str(tmp_path), max_epoch=1)
    path = tmp_path / "model/model.pth.tar-1"
    make(losses.ProxyAnchorLoss(num_classes=16, embedding_size=256)).resume(path)
    with pytest.raises(CheckpointError, match="belongs to another criterion"):
        make(losses.ArcFaceLoss(num_classes=16, embedding_size=256)).resume(path)
