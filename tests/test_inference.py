"""Features in a file, models as ONNX, and what the command lines say of themselves."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, Done, Tiny, tiny_options
from PIL import Image
from torch import Tensor
from torchreid import models, utils

from torchreid_snloss import build_model, cli, compare, get_default_config, load_config
from torchreid_snloss.checkpoint import save_checkpoint
from torchreid_snloss.evaluation import rank_features
from torchreid_snloss.inference import export, features
from torchreid_snloss.losses import LOSSES

MAINS = {
    "torchreid-snloss": cli.main,
    "torchreid-snloss-compare": compare.main,
    "torchreid-snloss-features": features.main,
    "torchreid-snloss-export": export.main,
}


class Interrupted(Tiny):
    """Gets a Ctrl-C with the second batch."""

    batches = 0

    def forward(self, x: Tensor) -> Any:
        self.batches += 1
        if self.batches == 2:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


class Half(Tiny):
    """A model with pretrained weights, but for a layer of its own before the features."""

    def __init__(self, *args: Any, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pretrained:
            weights = torch.load("half.pth")
            self.load_state_dict(
                {**weights, "classifier.weight": self.classifier.weight, "classifier.bias": self.classifier.bias}
            )
        self.projection = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class WithConstant(Tiny):
    """Computes with a number that a trace takes for a constant."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (1 + float(x.abs().mean())) + float(x[0, 0, 0, 0])


class WithoutSymbol(Tiny):
    """Computes what ONNX has no operation for."""

    def forward(self, x: Tensor) -> Any:
        return torch.linalg.eigvals(super().forward(x).view(-1, 16, 16)).real


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.pth.tar"
    save_checkpoint({"state_dict": Tiny().state_dict(), "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def images(reid_data: Path) -> Path:
    return reid_data / "market1501/Market-1501-v15.09.15/query"


@pytest.fixture
def run(
    in_folder: Path,
    tiny_model: None,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Done]:
    """Runs a command line in this process, with a tiny trained model, on the CPU: `run(main, flags, *options)`."""
    for name, cls in (
        ("interrupted", Interrupted),
        ("half", Half),
        ("constant", WithConstant),
        ("symbol", WithoutSymbol),
    ):
        monkeypatch.setitem(vars(models)["__model_factory"], name, cls)

    def command(main: Callable[[list[str]], int], flags: list[object], *options: object) -> Done:
        capsys.readouterr()
        given = tiny_options("use_gpu", False, "model.load_weights", weights, *options)
        code = main([*map(str, flags), "--", *given])
        return Done(code, *capsys.readouterr())

    return command


def extracted(weights: Path, images: list[Any]) -> Tensor:
    """The features by torchreid's extractor."""
    extractor = utils.FeatureExtractor("tiny", str(weights), image_size=(64, 32), device="cpu", verbose=False)
    result: Tensor = extractor(images)
    return result


def test_features_of_a_folder(run: Callable[..., Done], images: Path, weights: Path, tmp_path: Path) -> None:
    names = [*sorted(images.glob("*.jpg"))[:5]]
    for number, name in enumerate(names):  # by number, not by letter
        folder = tmp_path / "mine" / f"day {8 + number}"
        folder.mkdir(parents=True)
        Image.open(name).save(folder / "ümage.PNG")
    (tmp_path / "mine/notes.txt").touch()
    done = run(features.main, ["--images", "mine", "--output", "out/f.npz"], "loss.name", "sn", "test.batch_size", 2)
    assert done.code == 0, done.err
    assert "=> 1 files in mine are left out" in done.out
    assert '=> 5 features of 256 numbers, of length 1, are in "out/f.npz"' in done.out
    with np.load("out/f.npz") as file:
        assert set(file) == {"features", "paths", "about"}
        assert list(file["paths"]) == [f"mine/day {8 + number}/ümage.PNG" for number in range(5)]
        expected = extracted(weights, list(map(str, names)))
        expected = expected / expected.square().sum(dim=1, keepdim=True).sqrt()
        np.testing.assert_allclose(file["features"], expected, rtol=1e-4, atol=1e-6)
        about = json.loads(str(file["about"]))
    assert {key: about[key] for key in ("data.height", "data.width", "test.normalize_feature")} == {
        "data.height": 64,
        "data.width": 32,
        "test.normalize_feature": True,
    }
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != "f.npz"]


def test_features_of_a_list_with_mirror_images(
    run: Callable[..., Done], images: Path, weights: Path, tmp_path: Path
) -> None:
    names = sorted(images.glob("*.jpg"))[:3][::-1]
    (tmp_path / "lists").mkdir()
    lines = [str(names[0]), "", "../one.jpg", str(names[2])]
    (tmp_path / "one.jpg").write_bytes(names[1].read_bytes())
    (tmp_path / "lists/list.txt").write_text("\n".join(lines))
    assert run(features.main, ["--images", "lists/list.txt"], "test.flip", True).code == 0
    arrays = [np.asarray(Image.open(name).convert("RGB").resize((32, 64), Image.Resampling.BILINEAR)) for name in names]
    both = [extracted(weights, given) for given in (arrays, [np.ascontiguousarray(a[:, ::-1]) for a in arrays])]
    with np.load("features.npz") as file:
        assert [Path(path).name for path in file["paths"]] == [names[0].name, "one.jpg", names[2].name]
        np.testing.assert_allclose(file["features"], (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-5)


def test_features_of_a_test_set_give_its_results(
    run: Callable[..., Done], command_line: Callable[..., Done], reid_data: Path, weights: Path
) -> None:
    options = ["loss.name", "sn", "test.flip", True]
    flags = ["--root", reid_data, "-t", "market1501"]
    assert run(features.main, flags, *options).code == 0
    with np.load("features.npz") as file:
        query, gallery = (file["splits"] == split for split in ("query", "gallery"))
        assert set(file["datasets"]) == {"market1501"}
        ranking = rank_features(
            *(file["features"][of] for of in (query, gallery)),
            *(file[labels][of] for labels in ("pids", "camids") for of in (query, gallery)),
        )
        assert [int(Path(path).name[:4]) for path in file["paths"]] == list(file["pids"])
    tested = run(cli.main, flags, *options, "test.evaluate", True)
    assert f"mAP: {ranking.mean_ap:.1%}\n" in tested.out


def test_a_head_of_the_model_and_its_newest_checkpoint(run: Callable[..., Done], images: Path) -> None:
    head = ["model.embedding", "[8]", "model.neck", "bnneck"]
    cfg = load_config(options=tiny_options("use_gpu", False, *head))
    model = build_model(cfg, 5).eval()
    for epoch in (1, 2):
        torch.nn.init.normal_(next(model.parameters()))
        save_checkpoint({"state_dict": model.state_dict(), "epoch": epoch}, f"log/model/model.pth.tar-{epoch}")
    newest = ["model.resume", "auto", "model.load_weights", "", "data.save_dir", "log"]
    assert run(features.main, ["--images", next(images.glob("*.jpg"))], *head, *newest).code == 0
    with np.load("features.npz") as file:
        image = np.asarray(Image.open(str(file["paths"][0])).convert("RGB").resize((32, 64), Image.Resampling.BILINEAR))
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        given = torch.from_numpy(((image / 255 - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            np.testing.assert_allclose(file["features"], model(given), rtol=1e-4, atol=1e-5)


PRETRAINED = ("model.pretrained", True, "model.load_weights", "")
HACNN = ("model.name", "hacnn", "data.height", 160, "data.width", 64)


@pytest.mark.parametrize("main", [features.main, export.main])
@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        (["--images", "empty"], [], "--images 'empty' has no images"),
        (["--images", "none"], [], "--images 'none' can't be read: No such file or directory"),
        (["--images", "list.txt"], [], "--images 'list.txt': 1 of its 2 files do not exist, first 'nowhere/1.jpg'"),
        (["--images", "one.jpg", "--output", "x"], [], "--output must end in .{ending}, got 'x'"),
        (["--images", "one.jpg", "--output", "one.jpg/x.{ending}"], [], "can't be written: "),
        (["--images", "one.jpg"], ["model.load_weights", ""], "the model has no trained weights, but random ones in"),
        (["--images", "one.jpg"], [*HACNN, *PRETRAINED], "the model has no trained weights, but random ones in"),
        (["--images", "one.jpg"], ["model.name", "half", *PRETRAINED], "in 2 layers, projection.weight among them"),
        (["--images", "one.jpg"], ["model.load_weights", "", "model.resume", "auto"], "auto: no checkpoint in"),
        (["--images", "one.jpg"], ["data.type", "video"], "data.type is video"),
        (["--images", "one.jpg"], ["model.embedding", "[8]"], "belongs to another model"),
        (["--root", "nowhere"], [], "the data is not there"),
    ],
)
def test_what_is_refused(
    main: Any, flags: list[str], options: list[str], words: str, run: Callable[..., Done], images: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.jpg").write_bytes(next(images.glob("*.jpg")).read_bytes())
    (tmp_path / "list.txt").write_text("one.jpg\nnowhere/1.jpg\n")
    torch.save(Tiny().state_dict(), tmp_path / "half.pth")
    before = [path for path in tmp_path.rglob("*") if path.is_file()]
    ending = "npz" if main is features.main else "onnx"
    done = run(main, [flag.format(ending=ending) for flag in flags], *options)
    assert done.code == 2, done.err
    assert len(done.err.splitlines()) == 1
    assert words.format(ending=ending) in done.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == before


def test_torchrun_is_refused(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "start it without torchrun" in run(features.main, ["--images", "x"]).err


def test_an_image_that_cannot_be_read_is_named(run: Callable[..., Done], images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jpg").write_bytes(next(images.glob("*.jpg")).read_bytes())
    (tmp_path / "mine/b.jpg").write_bytes(b"no image")
    for workers in (0, 1):
        done = run(features.main, ["--images", "mine"], "data.workers", workers)
        assert done.code == 1
        assert "error: can't read the image 'mine/b.jpg': " in done.err
        assert len(done.err.splitlines()) == 1
    assert not list(tmp_path.glob("*features*"))


def test_ctrl_c_leaves_the_old_file(run: Callable[..., Done], images: Path, tmp_path: Path) -> None:
    (tmp_path / "features.npz").write_bytes(b"old")
    done = run(features.main, ["--images", images], "model.name", "interrupted", "test.batch_size", 4)
    assert (done.code, done.err) == (130, "torchreid-snloss-features: stopped by SIGINT\n")
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]
    assert (tmp_path / "features.npz").read_bytes() == b"old"


def test_a_progress_bar_counts_batches(run: Callable[..., Done], images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    run(features.main, ["--images", images], "test.batch_size", 4)
    assert re.search(r"images features: +\d+%.*/4 ", terminal.getvalue())


def run_onnx(path: str, given: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": given.numpy()})[0])


@pytest.mark.parametrize("flip", [False, True])
def test_export_for_any_batch(flip: bool, run: Callable[..., Done], images: Path, weights: Path) -> None:
    done = run(export.main, ["--images", images], "loss.name", "sn", "test.flip", flip)
    assert done.code == 0, done.err
    assert re.search(r'=> "model.onnx" takes any number of images, 64 pixels high and 32 wide; on 8 images', done.out)
    model = Tiny()
    model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    model.eval()
    for batch in (1, 5):
        given = torch.randn(batch, 3, 64, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(given) + (model(given.flip(3)) if flip else 0)
        expected = expected / expected.square().sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(run_onnx("model.onnx", given), expected, rtol=1e-3, atol=1e-4)
    about = {prop.key: prop.value for prop in onnx.load("model.onnx").metadata_props}
    assert (about["data.height"], about["data.width"], about["feature_dim"]) == ("64", "32", "256")
    assert json.loads(about["data.norm_mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(about["data.norm_std"]) == [0.229, 0.224, 0.225]
    assert (about["test.normalize_feature"], about["test.flip"]) == ("true", str(flip).lower())


def test_export_for_a_batch_and_images_of_the_test_set(
    run: Callable[..., Done], reid_data: Path, tmp_path: Path, weights: Path
) -> None:
    flags = ["--batch", 3, "--output", "a b/x.onnx", "--root", reid_data]
    done = run(export.main, flags)
    assert done.code == 0, done.err
    given = torch.ones(3, 3, 64, 32)
    lengths = run_onnx("a b/x.onnx", given).norm(dim=1)
    assert not torch.allclose(lengths, torch.ones(3))  # the test of softmax alone does not normalise
    with pytest.raises(Exception, match=r"[Gg]ot: 2 Expected: 3"):
        run_onnx("a b/x.onnx", given[:2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("constant", r"constant as ONNX computes other features than torch: the largest difference is \d"),
        ("symbol", "torch can't export symbol to ONNX for batches of any size \\(--batch 1 exports for one image\\): "),
    ],
)
def test_a_model_that_cannot_be_exported(
    name: str, words: str, run: Callable[..., Done], images: Path, tmp_path: Path
) -> None:
    done = run(export.main, ["--images", images], "model.name", name)
    assert done.code == 1
    assert re.search(f"^torchreid-snloss-export: error: {words}", done.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", ["0", "x", "-1"])
def test_a_wrong_batch(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        export.main(["--batch", batch])
    assert ended.value.code == 2
    assert f"must be from 1 to 65536, got '{batch}'" in capsys.readouterr().err


@pytest.mark.parametrize("program", MAINS)
def test_version_and_help(program: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "torchreid_snloss/__init__.py").read_text())
    assert version is not None
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            MAINS[program]([flag])
        assert ended.value.code == 0
    printed, _, text = capsys.readouterr().out.partition("\n")
    assert printed == f"torchreid-snloss {version[1]}"
    assert f"usage: {program} " in text
    (losses,) = re.findall(r"^losses \(loss.name.*: (.*)$", text, re.MULTILINE)
    assert losses.split(", ") == ["softmax", "triplet", *LOSSES, "custom"]
    listed = re.findall(r"^  (configs/\S+\.yaml)  +\S", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
    for name in listed:  # in a folder without them
        if "/variants/" not in name:
            assert load_config(name) != get_default_config()
