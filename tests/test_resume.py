"""Nothing is lost: checkpoints, kills, signals, broken batches and images, held-out identities."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, Tiny, make_engine, process_options, start
from kill_and_resume import kill_and_resume
from torchreid import engine, models, utils

import torchreid_snloss
from torchreid_snloss import ImageFIDIEngine, ImageHAP2SEngine, ImageSNEngine
from torchreid_snloss.checkpoint import CheckpointError, find_newest, load_checkpoint, save_checkpoint
from torchreid_snloss.engine import NonFiniteError, Stopped, TrainOptions, with_training_loop
from torchreid_snloss.engine.random_state import random_states


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "log" / "model").iterdir())


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    count = kill_and_resume(3, tmp_path, seed=1, workers=0)
    assert count["kills"] == 3


# As processes, which signals can come to.
SIGNALLED = process_options("loss.name", "sn", "train.max_epoch", 4, "data.save_dir")


def start_training(reid_data: Path, *options: object, cwd: Path, **popen: Any) -> subprocess.Popen[str]:
    arguments = ["--root", str(reid_data), *map(str, options)]
    return start("-u", "-m", "torchreid_snloss", *arguments, cwd=cwd, **popen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, reid_data: Path, train: Callable[..., Done], in_folder: Path
) -> None:
    process = start_training(reid_data, *SIGNALLED, "stopped", cwd=in_folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch: [2/4][1/3]"):
            process.send_signal(number)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    message = error.strip().splitlines()[-1]
    assert message.startswith(f"torchreid-snloss: stopped by {number.name}; resume with: model.resume ")
    checkpoint = message.split()[-1]
    # In the middle of the second epoch: the steps of it that are done are not done again.
    assert checkpoint.startswith("stopped/model/model.pth.tar-1.") or checkpoint.endswith("model.pth.tar-2")

    resumed = train(*SIGNALLED, "stopped", "model.resume", checkpoint)
    assert resumed.code == 0, resumed.err
    assert train(*SIGNALLED, "undisturbed").code == 0
    last = "model/model.pth.tar-4"
    weights, undisturbed = (
        load_checkpoint(in_folder / name / last)["state_dict"] for name in ("stopped", "undisturbed")
    )
    for name, value in undisturbed.items():
        assert torch.equal(value, weights[name]), name


def test_one_checkpoint_an_epoch_the_newest_kept_and_the_best(train: Callable[..., Done], in_folder: Path) -> None:
    assert train("loss.name", "sn", "train.max_epoch", 5, "train.keep", 2, "test.eval_freq", 2).code == 0
    assert checkpoints(in_folder) == ["model-best.pth.tar", "model.pth.tar-4", "model.pth.tar-5"]
    best = load_checkpoint(in_folder / "log/model/model-best.pth.tar")
    assert best["epoch"] in (2, 4, 5)


def test_a_signal_to_the_whole_group_with_workers(reid_data: Path, in_folder: Path) -> None:
    options = ["data.workers", 2, "loss.name", "sn", "train.max_epoch", 50, "train.save_freq", 10]
    options = process_options(*options)
    process = start_training(reid_data, *options, cwd=in_folder, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch: [2/50][2/3]"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "stopped by SIGTERM; resume with: model.resume log/model/model.pth.tar-" in error


class Drops(torch.nn.Module):
    """A model that draws random numbers in its forward pass, as one with dropout does, and may ask to stop in one."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 64 * 32, 16))
        self.classifier = torch.nn.Linear(16, 16)

    def forward(self, x: Any) -> Any:
        self.stop_at -= 1
        if self.stop_at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        v = self.features(x)
        return (self.classifier(v), v) if self.training else v


def test_a_stop_in_an_epoch_keeps_the_random_states(datamanager: Any, tmp_path: Path) -> None:
    def build(stop_at: int = 0) -> Any:
        utils.set_random_seed(1)
        return make_engine(ImageFIDIEngine, datamanager, Drops(stop_at))

    whole = build()
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=3)

    stopped = build(stop_at=5)  # the second step of the second epoch
    with pytest.raises(Stopped, match=r"model\.pth\.tar-1\.2"):
        stopped.run(save_dir=str(tmp_path / "stopped"), max_epoch=3)

    tested = build()  # in between, a run that trains nothing leaves them as they are
    tested.run(
        save_dir=str(tmp_path / "stopped"), max_epoch=1,
        start_epoch=tested.resume(tmp_path / "stopped/model/model.pth.tar-1.2"),
    )  # fmt: skip

    resumed = build()
    start = resumed.resume(tmp_path / "stopped/model/model.pth.tar-1.2")
    assert start == 1
    resumed.run(save_dir=str(tmp_path / "stopped"), max_epoch=3, start_epoch=start)
    for value, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(value, other)


class StopsInTest(Tiny):
    """Asks to stop when features are extracted."""

    def forward(self, x: Any) -> Any:
        if not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)


def test_a_stop_in_an_evaluation_saves_what_was_trained(datamanager: Any, tmp_path: Path) -> None:
    training = make_engine(ImageSNEngine, datamanager, StopsInTest())
    training.options = TrainOptions(save_freq=10)
    with pytest.raises(Stopped, match=r"model\.pth\.tar-2$"):
        training.run(save_dir=str(tmp_path), max_epoch=4, eval_freq=2)


class BreaksInTest(Tiny):
    """A bias becomes NaN after the features of the second evaluation, which are better than those of the first."""

    tests = 0

    def train(self, mode: bool = True) -> Any:
        self.tests += self.training and not mode
        return super().train(mode)

    def forward(self, x: Any) -> Any:
        outputs = super().forward(x)
        if self.training:
            return outputs
        if self.tests == 1:
            return torch.rand_like(outputs)
        with torch.no_grad():
            self.classifier.bias[3] = torch.nan
        return outputs


def test_broken_weights_are_not_saved(datamanager: Any, tmp_path: Path) -> None:
    training = make_engine(ImageSNEngine, datamanager, BreaksInTest(), lr=1e-6)
    with pytest.raises(NonFiniteError, match=r"classifier.bias.*model\.pth\.tar-2"):
        training.run(save_dir=str(tmp_path), max_epoch=3, eval_freq=1)
    # The second epoch's evaluation would have been a new best, and its checkpoint was written before it.
    assert not (tmp_path / "model" / "model.pth.tar-3").exists()
    for name in ("model-best.pth.tar", "model.pth.tar-2"):
        assert torch.isfinite(load_checkpoint(tmp_path / "model" / name)["state_dict"]["classifier.bias"]).all()
    assert load_checkpoint(tmp_path / "model" / "model-best.pth.tar")["epoch"] == 1


def test_another_optimizer_is_refused(datamanager: Any, tmp_path: Path) -> None:
    make_engine(ImageSNEngine, datamanager, optimizer="adam").run(save_dir=str(tmp_path), max_epoch=1)
    sgd = make_engine(ImageSNEngine, datamanager, optimizer="sgd")
    with pytest.raises(CheckpointError, match="its optimizer is of another type than SGD"):
        sgd.resume(tmp_path / "model" / "model.pth.tar-1")


def test_a_checkpoint_from_several_gpus_resumes_on_a_cpu(datamanager: Any, tmp_path: Path) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    training.run(save_dir=str(tmp_path), max_epoch=1)
    checkpoint = load_checkpoint(tmp_path / "model" / "model.pth.tar-1")
    checkpoint["state_dict"] = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
    save_checkpoint(checkpoint, tmp_path / "gpus.pth")
    assert make_engine(ImageSNEngine, datamanager).resume(tmp_path / "gpus.pth") == 1


def test_torchreids_engines_save_without_a_scheduler(datamanager: Any, tmp_path: Path) -> None:
    make_engine(with_training_loop(engine.ImageTripletEngine), datamanager).run(save_dir=str(tmp_path), max_epoch=1)
    assert find_newest(tmp_path / "model") is not None


def test_save_freq(train: Callable[..., Done], in_folder: Path) -> None:
    assert train("train.max_epoch", 5, "train.keep", 0, "train.save_freq", 2).code == 0
    assert checkpoints(in_folder) == [
        "model-best.pth.tar",
        *(f"model.pth.tar-{epoch}" for epoch in (2, 4, 5)),
    ]


def test_files_of_others_are_not_pruned(train: Callable[..., Done], in_folder: Path) -> None:
    (in_folder / "log" / "model").mkdir(parents=True)
    (in_folder / "log" / "model" / "model.pth.tar-60").write_text("of another run")
    assert train("train.max_epoch", 3, "train.keep", 1).code == 0
    assert checkpoints(in_folder) == ["model-best.pth.tar", "model.pth.tar-3", "model.pth.tar-60"]


def test_resume_auto(train: Callable[..., Done], in_folder: Path) -> None:
    options = ("loss.name", "fidi", "model.resume", "auto", "train.max_epoch")
    done = train(*options, 2)
    assert done.code == 0
    assert "no checkpoint in log/model, starting from the beginning" in done.out
    newest = in_folder / "log/model/model.pth.tar-2"
    damaged = in_folder / "log/model/model.pth.tar-3"
    damaged.write_bytes(newest.read_bytes()[:5000])
    done = train(*options, 4)
    assert done.code == 0
    assert "** Skipped a checkpoint: " in done.out
    assert f'Resuming from "{newest.relative_to(in_folder)}", after 2 epochs' in done.out
    # Finished already: only the test is run again.
    done = train(*options, 4)
    assert done.code == 0
    assert "epoch: [" not in done.out


def test_held_out_identities_choose_the_best(train: Callable[..., Done]) -> None:
    done = train("loss.name", "sn", "data.val_fraction", 0.25, "train.max_epoch", 2, "test.eval_freq", 1)
    assert done.code == 0
    assert "4 of 16 training identities are held out" in done.out
    assert "##### Evaluating validation" in done.out
    assert "on held-out identities" in done.out
    assert train("loss.name", "sn", "data.val_fraction", 0.01).code == 2


def test_held_out_identities_may_be_all_that_is_tested_on(train: Callable[..., Done]) -> None:
    done = train("loss.name", "sn", "data.val_fraction", 0.25, "train.max_epoch", 1, "test.held_out_only", True)
    assert done.code == 0
    assert done.out.count("##### Evaluating validation") == done.out.count("##### Evaluating") == 1


@pytest.mark.parametrize("cls", [ImageSNEngine, ImageHAP2SEngine, ImageFIDIEngine])
def test_a_nan_stops_before_the_weights_change(cls: Any, datamanager: Any) -> None:
    training = make_engine(cls, datamanager)
    training.set_model_mode("train")
    batch = next(iter(datamanager.train_loader))
    batch = {"img": batch["img"].clone(), "pid": batch["pid"]}
    batch["img"][3, 0, 0, 0] = float("nan")
    weights = {name: value.clone() for name, value in training.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"loss_m is nan.*loss_x is nan"):
        training.forward_backward(batch)
    for name, value in training.model.named_parameters():
        assert torch.equal(value, weights[name])


def test_skipping_a_nan_leaves_a_model_that_trains_and_tests_on(datamanager: Any) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    training.options = TrainOptions(nonfinite="skip")
    training.set_model_mode("train")
    good = next(iter(datamanager.train_loader))
    bad = {"img": good["img"].clone(), "pid": good["pid"]}
    bad["img"][0] = float("inf")
    state = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.forward_backward(bad)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert np.isfinite(list(training.forward_backward(good).values())).all()


class BreaksInItsSecondStep(Tiny):
    """A model whose outputs are not finite any more from the second training step on."""

    steps = 0

    def forward(self, x: Any) -> Any:
        self.steps += self.training
        return super().forward(x * torch.inf if self.training and self.steps > 1 else x)


@pytest.mark.parametrize(("loss", "term"), [("sn", "loss_m is nan"), ("softmax", "CrossEntropyLoss is nan")])
def test_a_non_finite_loss_ends_the_run_with_its_checkpoint(
    loss: str, term: str, train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(models)["__model_factory"], "tiny", BreaksInItsSecondStep)
    done = train("loss.name", loss, "train.max_epoch", 3)
    assert done.code == 1
    message = done.err.strip().splitlines()[-1]
    assert message.startswith(f"torchreid-snloss: error: {term}")
    assert "in epoch 1, step 2" in message
    assert "the last checkpoint: none yet" in message


def test_torchreids_own_engines_can_not_skip_a_step(datamanager: Any, tmp_path: Path) -> None:
    training = make_engine(with_training_loop(engine.ImageTripletEngine), datamanager)
    training.options = TrainOptions(nonfinite="skip")
    with pytest.raises(ValueError, match="needs a MetricEngine; ImageTripletEngine can only stop"):
        training.run(save_dir=str(tmp_path), max_epoch=1)


def test_an_error_in_the_first_step_leaves_the_checkpoint_as_it_was(datamanager: Any, tmp_path: Path) -> None:
    class Fails(Tiny):
        after = 2

        def forward(self, x: Any) -> Any:
            out = super().forward(x)
            self.after -= self.training
            if self.after < 0:
                raise RuntimeError("no memory left")
            return out

    with pytest.raises(RuntimeError, match="no memory left"):
        make_engine(ImageSNEngine, datamanager, Fails()).run(save_dir=str(tmp_path), max_epoch=1)
    path = tmp_path / "model" / "model.pth.tar-0.2"  # the steps before it are saved
    content = path.read_bytes()
    again = make_engine(ImageSNEngine, datamanager, Fails())
    again.model.after = 0
    start = again.resume(path)
    with pytest.raises(RuntimeError, match="no memory left"):
        again.run(save_dir=str(tmp_path), max_epoch=1, start_epoch=start)
    assert path.read_bytes() == content


@pytest.mark.parametrize("amp_dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_with_loss_scaling(amp_dtype: torch.dtype) -> None:
    features = torch.randn(16, 64, requires_grad=True)
    for loss in (torchreid_snloss.SNLoss(), torchreid_snloss.HAP2SLoss(), torchreid_snloss.FIDILoss()):
        features.grad = None
        (loss(features.to(amp_dtype), torch.arange(4).repeat_interleave(4)) * 1024).backward()
        assert torch.isfinite(features.grad).all()
        assert features.grad.abs().max() > 0


def test_the_statistics_of_a_step(datamanager: Any) -> None:
    names = {ImageSNEngine: {"in_support"}, ImageHAP2SEngine: {"active"}, ImageFIDIEngine: {"u_pos", "u_neg"}}
    batch = next(iter(datamanager.train_loader))
    for cls, watched in names.items():
        training = make_engine(cls, datamanager)
        training.set_model_mode("train")
        summary = training.forward_backward(batch)
        assert set(summary) == {"loss_m", "loss_x", "acc", "d_pos", "d_neg", "anchors", *watched}
        assert summary["anchors"] == 1


def test_statistics_are_what_they_say() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [3.0, 4.0], [50.0, 0.0]])
    targets = torch.tensor([0, 0, 1, 1, 2])
    loss = torchreid_snloss.SNLoss(num_neighbors=1, normalize=False)
    loss(features, targets)
    assert not loss.statistics
    loss.collect_statistics = True
    loss(features, targets)
    expected = {"d_pos": 3.0, "anchors": 0.8, "in_support": 1.0}
    assert {name: loss.statistics[name].item() for name in expected} == pytest.approx(expected)
    d_neg = torch.cdist(features, features)[targets[:, None] != targets[None]].mean()
    torch.testing.assert_close(loss.statistics["d_neg"], d_neg)


@pytest.mark.parametrize("kind", ["empty", "no image", "cut off"])
def test_an_unreadable_image_is_named(kind: str, reid_data: Path, in_folder: Path, train: Callable[..., Done]) -> None:
    root = in_folder / "broken"
    shutil.copytree(reid_data, root)
    image = sorted(root.rglob("query/*.jpg"))[5]
    content = {"empty": b"", "no image": b"no image", "cut off": image.read_bytes()[:300]}[kind]
    image.write_bytes(content)
    options = ["data.root", root, "test.evaluate", True]
    if kind == "cut off":  # with a worker: its errors reach the process in another way, and it must not outlive it
        process = start_training(root, *process_options(*options), "data.workers", 1, cwd=in_folder)
        _, error = process.communicate(timeout=120)
        code = process.returncode
    else:
        code, _, error = train(*options)
    assert code == 1
    message = error.strip().splitlines()[-1]
    assert message.startswith("torchreid-snloss: error: ")
    assert f"can't read the image '{image}'" in message


def test_queries_without_a_match_are_told(reid_data: Path, in_folder: Path, train: Callable[..., Done]) -> None:
    root = in_folder / "unmatched"
    shutil.copytree(reid_data, root)
    gallery = sorted(root.rglob("bounding_box_test/*.jpg"))
    for image in gallery:
        if image.name.startswith(gallery[0].name[:4]):
            image.unlink()
    done = train("data.root", root, "train.max_epoch", 1)
    assert done.code == 0
    assert "2 of 16 queries of market1501 have no image of their identity" in done.out

    for image in gallery:
        image.unlink(missing_ok=True)
    first_of_each = {image.name[:4]: image for image in sorted(root.rglob("query/*.jpg"), reverse=True)}
    for image in root.rglob("query/*.jpg"):
        if image not in first_of_each.values():
            image.unlink()
    for image in first_of_each.values():  # under the same camera
        shutil.copy(image, gallery[0].parent)
    done = train("data.root", root, "test.ranks", [1])
    assert done.code == 2
    assert "no query of 'market1501' has an image of its identity under another camera" in done.err


def test_an_identity_with_one_image_is_told(reid_data: Path, in_folder: Path, train: Callable[..., Done]) -> None:
    root = in_folder / "single"
    shutil.copytree(reid_data, root)
    images = sorted(root.rglob("bounding_box_train/*.jpg"))
    for image in images[1:]:
        if image.name.startswith(images[0].name[:4]):
            image.unlink()
    done = train("data.root", root, "loss.name", "sn", "train.max_epoch", 1)
    assert done.code == 0
    assert "1 of 16 training identities have fewer than 4 images" in done.out


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model" / "model.pth.tar-1"
    save_checkpoint({"state_dict": {"w": torch.zeros(3)}, "epoch": 1}, path)

    def broken(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint({"state_dict": {"w": torch.ones(3)}, "epoch": 2}, path)
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["model.pth.tar-1"]
    assert find_newest(path.parent) == path
    assert find_newest(tmp_path) is None


def test_checkpoints_of_torchreid_with_a_numpy_rank1(tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar-7"
    for scalar in (np.float32(0.25), np.float64(0.25)):
        torch.save({"state_dict": {"w": torch.zeros(3)}, "epoch": 7, "rank1": scalar}, path)
        if not hasattr(torch.serialization, "safe_globals"):
            with pytest.raises(CheckpointError, match=r"needs torch 2\.5 or newer"):
                load_checkpoint(path)
            return
        assert load_checkpoint(path)["rank1"] == 0.25
    # As NumPy 1 wrote it.
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_checkpoint(path)["rank1"] == 0.25
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_old_keys_of_torchreids_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("data: {use_unlabeled_targets: True}\ntest: {visactmap: False}\n")
    cfg = torchreid_snloss.load_config(str(path))
    assert cfg.data.load_train_targets is True
    assert "test.visactmap is obsolete and ignored" in capsys.readouterr().out


def test_feature_extractor_loads_our_checkpoint(datamanager: Any, tmp_path: Path) -> None:
    model = models.build_model("osnet_x0_25", 16, loss="triplet", pretrained=False)
    training = make_engine(ImageSNEngine, datamanager, model)
    training.run(save_dir=str(tmp_path), max_epoch=1)
    path = str(tmp_path / "model" / "model.pth.tar-1")
    extractor = utils.FeatureExtractor("osnet_x0_25", path, image_size=(64, 32), device="cpu", verbose=False)
    assert extractor([datamanager.test_dataset["market1501"]["query"][0][0]]).shape == (1, 512)
    stored = torch.load(path, weights_only=True)["state_dict"]
    loaded = extractor.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items() if not name.startswith("classifier"))


def test_the_newest_is_told_by_content_not_by_the_files_time(tmp_path: Path) -> None:
    def save(name: str, epoch: int, batch: int = 0, run: str | None = None) -> Path:
        content = {
            "state_dict": {"w": torch.zeros(3)}, "epoch": epoch, "progress": {"seed": 1, "batch": batch},
            "random_states": random_states() if batch else None, "run": run,
        }  # fmt: skip
        save_checkpoint(content, tmp_path / f"model.pth.tar-{name}")
        return tmp_path / f"model.pth.tar-{name}"

    files = [save(str(epoch), epoch) for epoch in (2, 9, 10)] + [save("10.2", 10, 2), save("10.12", 10, 12)]
    for age, path in enumerate(files):  # the newest by its content is the oldest by its time
        os.utime(path, ns=(10**18 - age, 10**18 - age))
    assert find_newest(tmp_path) == files[-1]
    renamed = save("99", 3)
    assert find_newest(tmp_path) == files[-1]

    # A later run in the same folder, which got less far; a restart passes over checkpoints of another run.
    later = save("4", 4, run="2")
    save("5", 5, run="1")
    os.utime(later, ns=(0, 0))
    assert find_newest(tmp_path) == later
    assert find_newest(tmp_path, run="1") == tmp_path / "model.pth.tar-5"
    assert find_newest(tmp_path, run="3") is None
    assert renamed.exists()


def test_a_failure_after_a_step_does_not_train_it_twice(datamanager: Any, tmp_path: Path) -> None:
    class FailsToPrint(ImageSNEngine):
        after = 2

        def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
            summary = super().forward_backward(data)
            self.after -= 1
            if not self.after:
                raise OSError("no room for the progress line")
            return summary

    whole = make_engine(ImageSNEngine, datamanager)
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=1)
    with pytest.raises(OSError, match="no room"):
        make_engine(FailsToPrint, datamanager).run(save_dir=str(tmp_path), max_epoch=1)
    resumed = make_engine(ImageSNEngine, datamanager)
    start = resumed.resume(tmp_path / "model/model.pth.tar-0.2")
    resumed.run(save_dir=str(tmp_path), max_epoch=1, start_epoch=start)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
