"""Last stride, embedding and neck on torchreid's models; warm-up, exponential decay, flipping and re-ranking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, make_engine, tiny_options
from torchreid import models, utils
from yacs.config import CfgNode

from torchreid_snloss import ImageSNEngine, build_model, build_optimizer, load_config, load_weights, resolve
from torchreid_snloss.config import ConfigError
from torchreid_snloss.settings import engine_run_kwargs


def config(*options: Any) -> CfgNode:
    return load_config(options=[*tiny_options("use_gpu", False, "loss.name", "hap2s"), *options])


def test_last_stride_1_keeps_the_weights_and_doubles_the_map() -> None:
    utils.set_random_seed(1)
    usual = build_model(config("model.name", "resnet50"), 5).eval()
    model = build_model(config("model.name", "resnet50", "model.last_stride", 1), 5).eval()
    model.load_state_dict(usual.state_dict())
    images = torch.randn(2, 3, 64, 32)
    assert usual.featuremaps(images).shape == (2, 2048, 2, 1)
    assert model.featuremaps(images).shape == (2, 2048, 4, 2)


@pytest.mark.parametrize("name", ["resnet50", "osnet_x0_25"])
def test_bnneck_and_embedding(name: str) -> None:
    utils.set_random_seed(1)
    cfg = config("model.name", name, "model.embedding", [32, 12], "model.neck", "bnneck")
    model = build_model(cfg, 5)
    images = torch.randn(4, 3, 64, 32)
    logits, features = model(images)
    assert (logits.shape, features.shape) == ((4, 5), (4, 12))
    # The classifier gets the features after a batch norm, which uses the statistics of the batch in training.
    after = torch.nn.functional.batch_norm(features, None, None, training=True)
    torch.testing.assert_close(logits, after @ model.classifier.weight.t(), rtol=1e-4, atol=1e-5)
    model.eval()
    tested = model(images)
    plain = model.embedding(model.base(images))
    torch.testing.assert_close(tested, model.neck(plain))
    assert not torch.allclose(tested, plain)
    assert "neck.bias" not in dict(model.named_parameters())
    assert build_model(config("model.name", name, "model.neck", "bnneck", "loss.name", "softmax"), 5)(images).shape == (
        4,
        5,
    )


def test_checkpoints_with_a_head_load_in_torchreid_and_in_one_line_here(tmp_path: Path) -> None:
    utils.set_random_seed(1)
    cfg = config("model.name", "osnet_x0_25", "model.neck", "bnneck", "model.embedding", [16])
    model = build_model(cfg, 7).eval()
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    image = torch.randint(0, 255, (64, 32, 3), dtype=torch.uint8).numpy()
    extractor = utils.FeatureExtractor("osnet_x0_25", str(path), image_size=(64, 32), device="cpu", verbose=False)
    batch = extractor.preprocess(extractor.to_pil(image))[None]
    torch.testing.assert_close(extractor(image), model.base(batch))

    again = build_model(cfg, 9).eval()  # another number of identities
    load_weights(again, str(path))
    torch.testing.assert_close(again(batch), model(batch))
    # Weights of torchreid's own model load too.
    plain = models.build_model("osnet_x0_25", 7, loss="triplet", pretrained=False)
    model.load_state_dict(
        {**model.state_dict(), **{k: v for k, v in plain.state_dict().items() if "classifier" not in k}}
    )
    torch.testing.assert_close(model.base(batch), plain.eval()(batch))
    within = torch.nn.DataParallel(model)
    within.load_state_dict(within.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.name", "osnet_x0_25", "model.last_stride", 1],
            "needs a model with a layer4 of stride 2, but OSNet has none",
        ),
        (["model.name", "pcb_p4", "model.neck", "bnneck"], "one linear classifier, got PCB"),
    ],
)
def test_a_model_without_the_needed_layers_is_refused(options: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config(*options), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.last_stride", 3], "model.last_stride must be 0, 1 or 2; got model.last_stride 3"),
        (["model.neck", "long"], "model.neck must be one of none, bnneck"),
        (["model.embedding", [0]], "model.embedding must be a list of at most 4 whole numbers from 1 to 8,192; got"),
        (["train.warmup_epochs", 60], "train.warmup_epochs must be at least 0 and below"),
        (["train.lr_scheduler", "exponential", "train.stepsize", [60]], "needs a first train.stepsize below"),
    ],
)
def test_a_wrong_value_is_refused(options: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config(*options))


def rates(*options: Any) -> list[float]:
    cfg = config("model.name", "osnet_x0_25", "train.lr", 1.0, "train.optim", "sgd", "train.max_epoch", 8, *options)
    optimizer, scheduler = build_optimizer(cfg, torch.nn.Linear(2, 2))
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warm_up_comes_before_each_of_torchreids_schedules_and_the_exponential_one() -> None:
    warm = ["train.warmup_epochs", 4, "train.warmup_factor", 0.2]
    share = [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    for schedule in (
        ["train.lr_scheduler", "single_step", "train.stepsize", [3]],
        ["train.lr_scheduler", "multi_step", "train.stepsize", [2, 6]],
        ["train.lr_scheduler", "cosine"],
        ["train.lr_scheduler", "exponential", "train.stepsize", [4], "train.gamma", 0.001],
    ):
        plain = rates(*schedule)
        assert rates(*schedule, *warm) == pytest.approx([a * b for a, b in zip(plain, share)], rel=1e-6)
    # The exponential schedule is constant at first, then falls to a thousandth at the end.
    assert plain == pytest.approx([1, 1, 1, 1, 1, 1e-3**0.25, 1e-3**0.5, 1e-3**0.75])


def test_features_are_normalised_in_the_test_as_in_training() -> None:
    def decided(*options: Any) -> tuple[bool, int]:
        settings = resolve(config(*options))
        assert engine_run_kwargs(settings)["normalize_feature"] is settings.normalize_feature
        return settings.normalize_feature, sum("test.normalize_feature: True" in note for note in settings.notes)

    assert decided() == (True, 1)
    assert "=> test.normalize_feature: True, as loss 'hap2s' normalises features too" in resolve(config()).notes
    assert decided("test.normalize_feature", True) == (True, 0)
    assert decided("test.normalize_feature", False) == (False, 0)
    assert decided("loss.hap2s.normalize", False) == (False, 0)
    assert decided("loss.hap2s.weight_m", 0.0) == (False, 0)
    for name in ("softmax", "triplet"):
        assert decided("loss.name", name) == (False, 0)
    assert decided("loss.name", "fidi") == (True, 1)


def test_flips_and_re_ranking_in_a_run(train: Callable[..., Done]) -> None:
    done = train(
        *["train.max_epoch", 1, "loss.name", "hap2s", "model.neck", "bnneck", "test.flip", True],
        *["test.rerank_in_training", True, "train.warmup_epochs", 0],
    )
    assert done.code == 0, done.err
    assert "Applying person re-ranking" in done.out
    assert "mAP:" in done.out


def test_flipped_features_are_the_mean(datamanager: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Halves(torch.nn.Module):
        """The mean colours of the left half of an image and of the right half."""

        def forward(self, images: Any) -> Any:
            return torch.nn.functional.adaptive_avg_pool2d(images, (1, 2)).flatten(1)

    class Symmetric(Halves):
        def forward(self, images: Any) -> Any:
            return (super().forward(images) + super().forward(images.flip(-1))) / 2

    printed = []
    for model, flip in ((Halves(), True), (Symmetric(), False), (Halves(), False)):
        model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))  # for the optimizer
        engine = make_engine(ImageSNEngine, datamanager, model)
        engine.options.flip = flip
        engine.test()
        out = capsys.readouterr().out
        printed.append(out[out.index("** Results **") :])
    assert printed[0] == printed[1] != printed[2]


def test_a_frozen_base_and_another_schedule(train: Callable[..., Done]) -> None:
    options = [
        *["train.max_epoch", 2, "loss.name", "hap2s", "model.neck", "bnneck", "model.embedding", [16]],
        *["train.fixbase_epoch", 1, "train.open_layers", "['classifier','embedding']", "train.warmup_epochs", 1],
    ]
    done = train(*options, "train.lr_scheduler", "cosine")
    assert done.code == 0, done.err
    trained = torch.load("log/model/model.pth.tar-2", weights_only=True)["state_dict"]
    assert not trained["neck.bias"].any()
    resumed = train(*options, "train.lr_scheduler", "multi_step", "model.resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "train.lr_scheduler: 'cosine' in the checkpoint, 'multi_step' in the config, which is used" in resumed.out
