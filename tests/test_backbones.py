"""timm's models: a CNN, a ViT and a hybrid of both, without weights from the Hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Done, tiny_options
from torchreid import models, utils

from torchreid_snloss import build_model, build_optimizer, load_config, load_weights, register, resolve
from torchreid_snloss.backbones import convert_sync_batchnorm
from torchreid_snloss.config import ConfigError
from torchreid_snloss.heads import set_last_stride
from torchreid_snloss.settings import imagedata_kwargs

timm = pytest.importorskip("timm")
register()

CNN, VIT, HYBRID = "timm/test_efficientnet", "timm/test_vit", "timm/test_coatnet"
DIMENSIONS = {CNN: 256, VIT: 64, HYBRID: 128}  # of their last layers, as timm's code has them
USUAL = {
    "timm/mobilenetv3_small_050": "sn",
    "timm/vit_tiny_patch16_224": "hap2s",
    "timm/mobilevitv2_050": "fidi",
    "timm/swin_tiny_patch4_window7_224": "softmax",
}


def config(name: str, *options: Any) -> Any:
    return load_config(options=tiny_options("use_gpu", False, "loss.name", "sn", "model.name", name, *options))


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *[(CNN, "sn"), (VIT, "hap2s"), (HYBRID, "fidi")],
        *[pytest.param(*pair, marks=pytest.mark.slow) for pair in USUAL.items()],
    ],
)
def test_a_run_resumes_to_the_same_weights(name: str, loss: str, train: Callable[..., Done]) -> None:
    options = ["model.name", name, "loss.name", loss, "test.eval_freq", -1, "data.train_fraction", 0.5]
    whole = train(*options, "train.max_epoch", 2, "train.keep", 0)
    assert whole.code == 0, whole.err
    assert f"data.norm_std {timm.get_pretrained_cfg_value(name[5:], 'std')!s}"[:20].replace("(", "[") in whole.out
    assert f"{name}'s own settings" in whole.out
    assert "mAP:" in whole.out
    last = Path("log/model/model.pth.tar-2")
    trained = torch.load(last, weights_only=True)["state_dict"]
    last.unlink()
    resumed = train(*options, "train.max_epoch", 2, "model.resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "epoch: [2/2]" in resumed.out
    assert "epoch: [1/2]" not in resumed.out
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(trained[key], again[key]) for key in trained | again)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_outputs_are_those_of_torchreids_models(name: str) -> None:
    images = torch.randn(2, 3, 64, 32)
    model = models.build_model(name, 5, loss="sn", pretrained=False, img_size=(64, 32))
    logits, features = model(images)
    assert (logits.shape, features.shape) == ((2, 5), (2, DIMENSIONS[name]))
    torch.testing.assert_close(logits, features @ model.classifier.weight.t() + model.classifier.bias)
    assert build_model(config(name, "loss.name", "softmax"), 5)(images).shape == (2, 5)
    # Pooled features are what timm's own classifier gets.
    arguments = {} if name == CNN else {"img_size": (64, 32)}
    whole = timm.create_model(name[5:], num_classes=7, **arguments).eval()
    whole.load_state_dict(model.backbone.state_dict(), strict=False)
    with torch.no_grad():
        expected = whole.get_classifier()(model.eval()(images))
        torch.testing.assert_close(whole(images), expected)


@pytest.mark.parametrize("name", [*DIMENSIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in USUAL)])
def test_onnx_has_the_features_of_any_batch(name: str, tmp_path: Path) -> None:
    model = build_model(config(name, "model.neck", "bnneck"), 5).eval()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model, (torch.randn(2, 3, 64, 32),), path, input_names=["images"], output_names=["features"],
        dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}}, dynamo=False,
    )  # fmt: skip
    images = torch.randn(5, 3, 64, 32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(features, model(images).numpy(), rtol=1e-3, atol=1e-4)


def test_size_and_normalisation_are_the_models_own_unless_the_config_says_otherwise() -> None:
    name = "timm/mobilevitv2_050"  # for 256 x 256 pixels, not normalised
    settings = resolve(load_config(options=["model.name", name]))
    own = {"height": 256, "width": 256, "norm_mean": (0, 0, 0), "norm_std": (1, 1, 1)}
    assert {key: getattr(settings, key) for key in own} == own
    (line,) = [note for note in settings.notes if "own settings" in note]
    assert line == (
        "=> data.height 256, data.width 256, data.norm_mean [0.0, 0.0, 0.0], data.norm_std [1.0, 1.0, 1.0]: "
        "timm/mobilevitv2_050's own settings"
    )
    options = ["data.height", 256, "data.width", 128, "data.norm_mean", [0.485, 0.456, 0.406]]
    settings = resolve(load_config(options=["model.name", name, *options]))
    assert (settings.height, settings.width, settings.norm_mean) == (256, 128, (0.485, 0.456, 0.406))
    assert imagedata_kwargs(settings)["norm_std"] == [1.0, 1.0, 1.0]
    assert "=> data.norm_std [1.0, 1.0, 1.0]: timm/mobilevitv2_050's own settings" in settings.notes
    settings = resolve(load_config(options=["model.name", name, *options, "data.norm_std", [1, 1, 1]]))
    assert not settings.notes
    # torchreid's models keep torchreid's defaults.
    settings = resolve(load_config(options=["data.norm_std", [1, 1, 1]]))
    assert (settings.height, settings.width, settings.norm_mean) == (256, 128, (0.485, 0.456, 0.406))
    assert (settings.norm_std, settings.notes) == ((1, 1, 1), ())


def test_a_vit_takes_other_sizes_and_refuses_those_it_can_not() -> None:
    model = build_model(config(VIT, "data.height", 96, "data.width", 48), 5)
    assert model.backbone.pos_embed.shape[1] == 6 * 3 + timm.create_model("test_vit").num_prefix_tokens
    with pytest.raises(ConfigError, match=r"test_vit does not take images of data.height 100 and data.width 48, its"):
        build_model(config(VIT, "data.height", 100, "data.width", 48), 5)
    model = models.build_model(VIT, 5, pretrained=False, img_size=(64, 32), drop_path_rate=0.3)
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_heads_on_top_and_last_stride() -> None:
    model = build_model(config(VIT, "model.neck", "bnneck", "model.embedding", [32, 12]), 5)
    images = torch.randn(2, 3, 64, 32)
    logits, features = model(images)
    assert (logits.shape, features.shape) == ((2, 5), (2, 12))
    torch.testing.assert_close(model.eval()(images), model.neck(model.embedding(model.base(images))))
    for arguments in ({}, {"aa_layer": timm.layers.BlurPool2d}):  # average pooling in the shortcut, and blur pooling
        resnet = models.build_model("timm/test_resnet", 5, pretrained=False, **arguments).backbone.eval()
        assert resnet.forward_features(images).shape[2:] == (2, 1)
        set_last_stride(resnet, 1)
        assert resnet.forward_features(images).shape[2:] == (4, 2)
    with pytest.raises(ConfigError, match="layer4 of stride 2, but EfficientNet has none"):
        build_model(config(CNN, "model.last_stride", 1), 5)


def test_last_stride_1_of_a_res2net_is_what_timm_builds() -> None:
    ours, theirs = (timm.create_model("res2net50_26w_4s", num_classes=0, **o) for o in ({}, {"output_stride": 16}))
    set_last_stride(ours, 1)
    pools = [
        [str(pool).replace("(1, 1)", "1") for name, pool in of.named_modules() if name.endswith("pool")]
        for of in (ours, theirs)
    ]
    assert pools[0] == pools[1]
    assert "AvgPool2d(kernel_size=3, stride=1, padding=1)" in pools[0]


def test_staged_training_knows_backbone_and_classifier(train: Callable[..., Done]) -> None:
    model = build_model(config(VIT), 5)  # whose class token and position embedding are no layers of their own
    optimizer, _ = build_optimizer(config(VIT, "train.staged_lr", True, "train.lr", 0.1), model)
    groups = [(group["lr"], {id(p) for p in group["params"]}) for group in optimizer.param_groups]
    assert groups[1] == (pytest.approx(0.1), {id(p) for p in model.classifier.parameters()})
    assert groups[0] == (pytest.approx(0.01), {id(p) for p in model.backbone.parameters()})
    done = train("model.name", VIT, "loss.name", "sn", "train.max_epoch", 1, "train.fixbase_epoch", 1)
    assert done.code == 0, done.err
    trained = torch.load("log/model/model.pth.tar-1")["optimizer"]["state"]
    assert len(trained) == len(list(model.classifier.parameters()))  # Adam keeps moments of these alone
    with pytest.raises(ConfigError, match=r"has no \['head'\], it has \['backbone', 'classifier'\]"):
        build_model(config(VIT, "train.fixbase_epoch", 1, "train.open_layers", "['head']"), 5)


@pytest.mark.parametrize("options", [[], ["model.neck", "bnneck"]])
def test_feature_extractor_takes_a_checkpoint(options: list[Any], tmp_path: Path) -> None:
    model = build_model(config(VIT, *options), 5).eval()
    path = str(tmp_path / "checkpoint.pth")
    torch.save({"state_dict": model.state_dict()}, path)
    extract = utils.FeatureExtractor(VIT, path, image_size=(64, 32), device="cpu", verbose=False)
    image = np.random.default_rng(0).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    # A vision transformer of timm's gets values in [-1, 1].
    batch = torch.from_numpy(image.transpose(2, 0, 1)).float()[None] / 127.5 - 1
    torch.testing.assert_close(extract(image), getattr(model, "base", model)(batch), rtol=1e-4, atol=1e-5)
    again = build_model(config(VIT, *options), 9).eval()  # another number of identities
    load_weights(again, path)
    torch.testing.assert_close(again(batch), model(batch))


def test_feature_extractor_has_the_models_own_size(tmp_path: Path) -> None:
    model = build_model(load_config(options=["model.name", VIT, "model.pretrained", False]), 5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    extract = utils.FeatureExtractor(VIT, str(tmp_path / "checkpoint.pth"), device="cpu", verbose=False)
    assert extract(np.zeros((30, 20, 3), dtype=np.uint8)).shape == (1, 64)
    torch.testing.assert_close(extract.model.backbone.pos_embed, model.backbone.pos_embed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as it is downloaded from the Hub, with weights for the model's own size."""
    whole = timm.create_model("test_vit", num_classes=10)
    described = {**whole.pretrained_cfg, "num_classes": 10, "mean": [0.1, 0.2, 0.3]}
    description = {"architecture": "test_vit", "num_classes": 10, "pretrained_cfg": described}
    (tmp_path / "config.json").write_text(json.dumps(description))
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_pretrained_weights_come_from_timm(folder: Path) -> None:
    cfg = config(f"timm/local-dir:{folder}", "model.pretrained", True)
    assert resolve(cfg).norm_mean == (0.1, 0.2, 0.3)
    model = build_model(cfg, 5)
    weights = torch.load(folder / "pytorch_model.bin")
    torch.testing.assert_close(model.backbone.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert model.backbone.pos_embed.shape[1] < weights["pos_embed"].shape[1]  # resampled for 64 x 32
    file = {"file": str(folder / "pytorch_model.bin"), "num_classes": 10}
    plain = models.build_model(VIT, 5, pretrained=True, pretrained_cfg_overlay=file)
    torch.testing.assert_close(plain.backbone.pos_embed, weights["pos_embed"])


def test_weights_that_can_not_be_loaded_are_told_in_one_line(folder: Path, train: Callable[..., Done]) -> None:
    def message(name: str) -> str:
        done = train("model.name", name, "model.pretrained", True)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err.endswith(". Without them: model.pretrained False\n")
        return done.err

    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    assert f"can't load the pretrained weights of timm/local-dir:{folder}: " in message(f"timm/local-dir:{folder}")
    (folder / "pytorch_model.bin").unlink()
    assert f"can't load the pretrained weights of timm/local-dir:{folder}: " in message(f"timm/local-dir:{folder}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_tinypatch16_224", "no model 'vit_tinypatch16_224', did you mean timm/vit_tiny_patch16_224 or"),
        ("timm/vit_tiny_patch16_224.no", r"Invalid pretrained tag \(no\).*it has vit_tiny_patch16_224.augreg_in21k, "),
        ("timm/local-dir:nowhere", "timm/local-dir:nowhere: .*config.json"),
        ("vit_tiny_patch16_224", "Unknown model: vit_tiny_patch16_224.*'osnet_x1_0'.*or timm/ and a name from"),
    ],
)
def test_an_unknown_name_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name: .*{message}"):
        build_model(config(name), 5)


def test_a_missing_timm_is_told(monkeypatch: pytest.MonkeyPatch, train: Callable[..., Done]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what makes Python's import fail
    done = train("model.name", "timm/resnet18d")
    assert done.code == 2
    assert "timm/resnet18d needs timm" in done.err
    assert "pip install 'torchreid-snloss[timm]'" in done.err


def test_synchronised_batch_norm_keeps_activations() -> None:
    model = build_model(config(CNN, "model.neck", "bnneck"), 5).eval()
    images = torch.randn(2, 3, 64, 32)
    before = model(images)
    converted = convert_sync_batchnorm(model)
    kinds = {type(module).__name__ for module in converted.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {"SyncBatchNorm", "SyncBatchNormAct"}
    assert "neck.bias" not in dict(converted.named_parameters())
    torch.testing.assert_close(converted(images), before)
