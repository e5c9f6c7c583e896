"""The training step: precision, order in memory, compiling, and what it waits for."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NEEDS_COMPILE, Done, Tiny, make_engine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchreid import engine, models

import torchreid_snloss
from torchreid_snloss import ImageFIDIEngine, ImageSNEngine
from torchreid_snloss.checkpoint import load_checkpoint, load_weights, save_checkpoint
from torchreid_snloss.config import ConfigError, load_config
from torchreid_snloss.engine import MetricEngine, NonFiniteError, TrainOptions, with_training_loop
from torchreid_snloss.engine.amp import check_amp
from torchreid_snloss.settings import resolve

needs_fp16 = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="float16 on a CPU takes torch 2.3")


class Scaled(nn.Module):
    """Nothing in it that autocast would compute in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Any) -> Any:
        v = x.flatten(1)[:, :16] * self.weight
        return v, v


class Viewing(Tiny):
    """Has a `view()` that takes the usual order in memory alone, as PCB and MuDeep have."""

    def forward(self, x: Any) -> Any:
        v = self.convolution(x)
        return super().forward(x) if v.view(len(v), -1).dim() == 2 else None


@pytest.fixture
def train(train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command line, in this process, with SN loss; it knows the model `viewing` too."""
    monkeypatch.setitem(vars(models)["__model_factory"], "viewing", Viewing)
    return lambda *options: train("loss.name", "sn", "test.ranks", "[1]", *options)


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(path)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert set(one) == set(other)
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_model_in_bfloat16_and_the_losses_in_float32(datamanager: Any, batch: dict[str, Any]) -> None:
    training = make_engine(
        ImageSNEngine, datamanager, models.build_model("osnet_x0_25", 16, loss="sn", pretrained=False), amp="bf16"
    )
    seen: list[Any] = []
    training.model.register_forward_hook(lambda _, __, outputs: seen.append(outputs))
    summary = training.forward_backward(batch)
    logits, features = seen[0]
    assert (logits.dtype, features.dtype) == (torch.bfloat16, torch.bfloat16)
    assert summary["loss_m"] == torchreid_snloss.SNLoss()(features.float(), batch["pid"]).item()
    softmax = nn.CrossEntropyLoss(label_smoothing=0.1)(logits.float(), batch["pid"])
    assert summary["loss_x"] == softmax.item()
    assert all(parameter.dtype == torch.float32 for parameter in training.model.parameters())
    assert "scale" not in summary


def test_command_line_in_bfloat16_and_channels_last(train: Callable[..., Done]) -> None:
    half = ("train.amp", "bf16", "train.channels_last", "True", "train.max_epoch", 2, "data.save_dir")
    code, out, err = train(*half, "whole")
    assert code == 0, err
    assert "mAP:" in out
    code, _, err = train(*half, "resumed", "model.resume", "whole/model/model.pth.tar-1")
    assert code == 0, err
    whole, resumed = (weights(Path(folder, "model", "model.pth.tar-2")) for folder in ("whole", "resumed"))
    assert same(whole, resumed)
    stored = whole["convolution.weight"]
    assert stored.is_contiguous(memory_format=torch.channels_last)
    assert not stored.is_contiguous()
    # A test without the keys gives what training ended with.
    code, tested, err = train("model.load_weights", "whole/model/model.pth.tar-2", "test.evaluate", "True")
    assert code == 0, err
    results = [text[text.index("** Results **") :].splitlines()[:4] for text in (out, tested)]
    assert results[0] == results[1]
    assert train(*half, "float32", "train.amp", "off")[0] == 0
    assert not same(whole, weights(Path("float32/model/model.pth.tar-2")))


@pytest.mark.parametrize("cls", [ImageSNEngine, with_training_loop(engine.ImageTripletEngine)])
def test_images_in_channels_last(cls: Any, datamanager: Any, batch: dict[str, Any]) -> None:
    training = make_engine(cls, datamanager, channels_last=True)
    plain = make_engine(cls, datamanager)
    orders: list[bool] = []
    training.model.convolution.register_forward_pre_hook(
        lambda _, inputs: orders.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    assert training.forward_backward(batch) == pytest.approx(plain.forward_backward(batch), rel=1e-4)
    training.set_model_mode("eval")
    training.extract_features(batch["img"])
    assert orders == [True, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["train.amp", "half"], "train.amp must be one of off, bf16, fp16, got 'half'"),
        (["train.channels_last", "yes"], "train.channels_last must be of type bool, as its default False, got 'yes'"),
        (["train.compile", "1"], "train.compile must be of type bool"),
        (["train.channels_last", "True", "model.name", "viewing"], "viewing does not take train.channels_last: view"),
    ],
)
def test_bad_values_are_one_message(options: list[str], words: str, train: Callable[..., Done]) -> None:
    code, out, err = train(*options)
    assert code == 2
    assert "epoch: [" not in out
    (message,) = [line for line in err.splitlines() if line.startswith("torchreid-snloss: error: ")]
    assert words in message


@pytest.mark.parametrize(("key", "value"), [("train.amp", "bf16"), ("train.compile", "True")])
def test_what_takes_one_gpu(key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    options = ["use_gpu", "True", "loss.name", "sn", key, value]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    resolve(load_config("", options))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=f"{key}.* trains on one GPU, hide the others .*; got {key} {value}"):
        resolve(load_config("", options))


def test_a_bare_off_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "amp.yaml"
    for text in ("off", "'off'", "bf16"):
        path.write_text(f"train: {{amp: {text}}}")
        assert load_config(str(path)).train.amp == text.strip("'")
    path.write_text("data: {cache: off}")
    assert load_config(str(path)).data.cache == "off"


def test_what_can_not_be_had(datamanager: Any, monkeypatch: pytest.MonkeyPatch, train: Callable[..., Done]) -> None:
    with pytest.raises(ValueError, match="amp must be one of"):
        make_engine(ImageSNEngine, datamanager, amp="half")
    several = nn.DataParallel(Tiny())
    several.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"amp bf16 does not work with nn\.DataParallel on several GPUs"):
        make_engine(ImageSNEngine, datamanager, several, amp="bf16")
    with pytest.raises(ValueError, match=r"compile does not work with nn\.DataParallel on several GPUs"):
        make_engine(ImageSNEngine, datamanager, several, compile=True)
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    code, _, err = train("train.amp", "fp16")
    assert (code, "train.amp fp16 on a CPU needs torch 2.3 or newer" in err) == (2, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match="amp bf16 needs an Ampere or newer GPU; this is a Tesla T4: use amp fp16"):
        check_amp("bf16", "cuda")
    check_amp("fp16", "cuda")


@needs_fp16
def test_scaling_changes_nothing_but_what_float16_holds(datamanager: Any, batch: dict[str, Any]) -> None:
    # At this scale the norm of the scaled gradient, and the weights after it, would not be finite.
    trained = []
    for amp in ("off", "fp16"):
        training = make_engine(ImageSNEngine, datamanager, Scaled(), amp=amp)
        if amp == "fp16":
            training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
        for _ in range(3):
            summary = training.forward_backward(batch)
        trained.append(training.model.weight.detach())
    assert summary["scale"] == 2.0**100
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], torch.ones(16))


@needs_fp16
def test_an_overflow_lowers_the_scale_and_leaves_the_step_out(
    datamanager: Any, batch: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(ImageSNEngine, datamanager, amp="fp16")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = training.model.classifier.weight.detach().clone()
    scales = []
    while torch.equal(training.model.classifier.weight, before):
        summary = training.forward_backward(batch)
        assert all(math.isfinite(value) for value in summary.values())
        assert {"loss_m", "loss_x", "acc"} <= set(summary)
        scales.append(summary["scale"])
    assert scales == [2.0 ** (24 - step) for step in range(len(scales))]
    assert 2 < len(scales) < 24
    assert "Skipped" not in capsys.readouterr().out

    reference = make_engine(ImageSNEngine, datamanager)
    reference.forward_backward(batch)
    step, expected = (each.model.classifier.weight.detach() - before for each in (training, reference))
    assert (step - expected).norm() < 0.02 * expected.norm()


class BrokenGradient(nn.Module):
    """Zero, with a gradient that is not finite at any scale."""

    def forward(self, features: Any, _: Any) -> Any:
        return (features * 0).sum().sqrt()


@needs_fp16
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_gradient_broken_at_every_scale(nonfinite: Any, datamanager: Any, batch: dict[str, Any], capsys: Any) -> None:
    training = make_engine(MetricEngine, datamanager, criterion=BrokenGradient(), amp="fp16")
    training.options = TrainOptions(nonfinite=nonfinite)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    scales = [training.forward_backward(batch)["scale"] for _ in range(16)]
    assert (scales[0], scales[-1]) == (2.0**16, 2.0)
    if nonfinite == "stop":
        with pytest.raises(NonFiniteError, match=r"^gradient is nan in epoch 1"):
            training.forward_backward(batch)
    else:
        assert [training.forward_backward(batch) for _ in range(3)] == [{}, {}, {}]
        assert capsys.readouterr().out.count("** Skipped: gradient is nan") == 3
        assert training.scaler.get_scale() == 1
    assert same(before, dict(training.model.named_parameters()))


@needs_fp16
def test_a_broken_image_is_told_at_once_in_float16_too(datamanager: Any, batch: dict[str, Any]) -> None:
    broken = {**batch, "img": batch["img"].clone()}
    broken["img"][3] = torch.nan
    training = make_engine(ImageSNEngine, datamanager, amp="fp16")
    with pytest.raises(NonFiniteError, match="loss_m is nan"):
        training.forward_backward(broken)
    training = make_engine(ImageSNEngine, datamanager, amp="fp16")
    training.options = TrainOptions(nonfinite="skip")
    for _ in range(18):
        assert training.forward_backward(broken) == {}
    assert training.forward_backward(batch)["scale"] == 2.0**16  # the image says nothing about it


@needs_fp16
def test_float16_resumes_to_the_same_bit(datamanager: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(amp: str = "fp16") -> Any:
        return make_engine(ImageFIDIEngine, datamanager, amp=amp)

    whole = build()
    whole.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)  # grows in every epoch
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=4)
    resumed = build()
    start = resumed.resume(tmp_path / "whole/model/model.pth.tar-2")
    assert "=> growth_interval: 2 in the checkpoint, which is used, 2000 in this run" in capsys.readouterr().out
    resumed.run(save_dir=str(tmp_path / "resumed"), max_epoch=4, start_epoch=start)
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert whole.scaler.get_scale() > 2.0**9
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    torch.load(tmp_path / "whole/model/model.pth.tar-4", weights_only=True)

    # One without a scaler, of another precision or an earlier version, and a scaler that is not needed.
    checkpoint = load_checkpoint(tmp_path / "whole/model/model.pth.tar-4")
    del checkpoint["scaler"]
    save_checkpoint(checkpoint, tmp_path / "earlier")
    assert build().resume(tmp_path / "earlier") == 4
    build("off").run(save_dir=str(tmp_path / "float32"), max_epoch=1)
    assert build().resume(tmp_path / "float32/model/model.pth.tar-1") == 1
    assert build("off").resume(tmp_path / "whole/model/model.pth.tar-4") == 4


@pytest.mark.parametrize("within", [True, False])
def test_checkpoints_with_and_without_data_parallel(
    within: bool, datamanager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or DataParallel looks for the model on a GPU
    training = make_engine(ImageSNEngine, datamanager, nn.DataParallel(Tiny()) if within else Tiny())
    training.run(save_dir=str(tmp_path), max_epoch=1)
    path = tmp_path / "model" / "model.pth.tar-1"
    assert all(name.startswith("module.") == within for name in weights(path))
    other = make_engine(ImageSNEngine, datamanager, Tiny() if within else nn.DataParallel(Tiny()))
    assert other.resume(path) == 1
    model = Tiny() if within else nn.DataParallel(Tiny())
    load_weights(model, path)
    for loaded in (other.model, model):
        assert all(map(torch.equal, training.model.state_dict().values(), loaded.state_dict().values()))


@pytest.mark.parametrize("torch_before_2_6", [False, True])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    torch_before_2_6: bool, datamanager: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch_before_2_6:
        monkeypatch.delattr(nn.utils, "get_total_norm", raising=False)
    for criterion in (torchreid_snloss.SNLoss(), BrokenGradient()):
        model = Tiny()
        model.classifier.requires_grad_(False)  # has no gradient
        training = make_engine(MetricEngine, datamanager, model, criterion=criterion)
        before = {name: value.clone() for name, value in model.named_parameters()}
        if isinstance(criterion, BrokenGradient):
            with pytest.raises(NonFiniteError, match=r"^gradient is nan in epoch 1"):
                training.forward_backward(batch)
        else:
            assert training.forward_backward(batch)
        assert same(before, dict(model.named_parameters())) == isinstance(criterion, BrokenGradient)


@NEEDS_COMPILE
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++ is not there")
def test_compile(train: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config  # takes seconds

    # Vector instructions would be tried out by compiling for each kind, for ten seconds.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    torch._dynamo.reset()
    options = ("train.compile", "True", "train.max_epoch", 1, "test.batch_size", 16, "data.save_dir")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}), monkeypatch.context() as environment:
        environment.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # where nothing is compiled already
        code, out, err = train(*options, "failed")
    assert code == 1
    assert "epoch: [" not in out
    message = err.strip().splitlines()[-1]
    assert message.startswith("torchreid-snloss: error: torch.compile can't compile the model: ")
    assert "No working C++ compiler found" in message

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    code, _, err = train(*options, "compiled")
    assert code == 0, err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # in training, in the test
    assert train("train.max_epoch", 1, "data.save_dir", "eager")[0] == 0
    compiled, eager = (weights(Path(folder, "model", "model.pth.tar-1")) for folder in ("compiled", "eager"))
    assert list(compiled) == list(eager)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


class Waits(TorchDispatchMode):
    """Counts what makes a GPU's queue run dry: reading a value on the CPU, and shapes that depend on values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


class Spread(nn.Module):
    def forward(self, features: Any, _: Any) -> Any:
        return features.std(dim=0).mean().neg().exp()


@pytest.mark.parametrize("amp", ["off", "bf16", pytest.param("fp16", marks=needs_fp16)])
def test_the_step_reads_values_once(amp: str, datamanager: Any, batch: dict[str, Any]) -> None:
    # On a CPU tolist() is no operation, so that what stands here is what comes beside the one transfer.
    training = make_engine(MetricEngine, datamanager, criterion=Spread(), amp=amp)
    for _ in range(2):
        with Waits() as waits:
            training.forward_backward(batch)
        assert waits.count == 0
