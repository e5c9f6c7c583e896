"""The examples run, and the docstrings' examples are true."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run, tiny_options
from torchreid import models, utils

from torchreid_snloss import build_model, load_config, load_weights
from torchreid_snloss.checkpoint import save_checkpoint
from torchreid_snloss.inference import export, features


@pytest.fixture
def example(in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example in this process and returns what it prints. One that calls `register()` takes a new process."""

    def run_here(name: str, *arguments: str) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_swap_the_loss(reid_data: Path, tmp_path: Path) -> None:
    script = str(ROOT / "examples/swap_the_loss.py")
    done = run(script, "--root", str(reid_data), "--dataset", "market1501", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mAP:" in done.stdout


def test_own_main_gives_the_command_lines_results(reid_data: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/small.yaml").read_text())
    # What is left to the loss, the same for both.
    del config["sampler"], config["test"]["normalize_feature"]
    config["data"] |= {"sources": ["market1501"], "targets": ["market1501"], "root": str(reid_data), "workers": 0}
    config["train"] |= {"max_epoch": 1, "batch_size": 32, "print_freq": 1}
    config["test"]["visrank"] = False
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    own = run(str(ROOT / "examples/own_main.py"), "config.yaml", "loss.name", "hap2s", cwd=tmp_path)
    line = run("-m", "torchreid_snloss", "--config-file", "config.yaml", "loss.name", "hap2s", cwd=tmp_path)
    assert (own.returncode, line.returncode) == (0, 0), own.stderr + line.stderr
    for out in (own.stdout, line.stdout):
        assert out.count("=> test.normalize_feature: True, as loss 'hap2s' normalises features too") == 1
        assert out.count("=> sampler.train_sampler: IdentitySampler in place of RandomSampler") == 1
    terms, results = (
        [re.findall(pattern, out, re.DOTALL) for out in (own.stdout, line.stdout)]
        for pattern in (r"loss_m (\S+)", r"mAP: .*?Rank-20[^\n]*")
    )
    assert len(terms[0]) == 3
    assert terms[0] == terms[1]
    assert len(results[0]) == 1
    assert results[0] == results[1]

    # The checks too.
    bad = run(str(ROOT / "examples/own_main.py"), "config.yaml", "loss.name", "sn", "test.ranks", "[60]", cwd=tmp_path)
    assert "ConfigError: test.ranks must lie between 1 and 48 for 'market1501', got [60]" in bad.stderr


@pytest.mark.parametrize("module", ["sn", "hap2s", "fidi"])
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"torchreid_snloss.losses.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network as a run with the small config leaves them."""
    path = tmp_path_factory.mktemp("trained") / "model.pth.tar"
    cfg = load_config(str(ROOT / "configs/small.yaml"), ["use_gpu", False])
    save_checkpoint({"state_dict": build_model(cfg, 12).state_dict(), "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def own_images(reid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each person, with names that say the camera."""
    images = tmp_path_factory.mktemp("own") / "images"
    for source in sorted((reid_data / "market1501/Market-1501-v15.09.15/bounding_box_train").glob("*.jpg")):
        pid, camera, *_ = source.name.split("_")
        folder = images / f"person {pid}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / f"cam{camera[1]}_{source.stem[-9:]}.jpg")
    return images


def test_own_images(own_images: Path, tmp_path: Path) -> None:
    script = [str(ROOT / "examples/own_images.py"), "--images", str(own_images), "--epochs", "1", "--workers", "0"]
    done = run(*script, "--batch-size", "32", "--visrank", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mAP:" in done.stdout
    queries = re.search(r"ranked lists of (\d+) queries", done.stdout)
    assert queries is not None
    assert len(list((tmp_path / "log/own_images/visrank_own_images").iterdir())) == int(queries[1]) > 10
    done = run(*script, "--camera", r"lens(\d)", cwd=tmp_path)
    assert "no images found in" in done.stderr
    assert "that data.folder.camera does not match" in done.stderr


@pytest.mark.docs
def test_own_images_where_workers_import_the_script(own_images: Path, tmp_path: Path) -> None:
    """As on Windows, on macOS, and with Python 3.14."""
    (tmp_path / "sitecustomize.py").write_text("import multiprocessing\nmultiprocessing.set_start_method('spawn')\n")
    script = [str(ROOT / "examples/own_images.py"), "--images", str(own_images), "--epochs", "1", "--workers", "1"]
    done = run(*script, "--batch-size", "32", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("=> Loaded ImageFolder") == 2  # for training and query, of the main process alone
    assert "mAP:" in done.stdout


def trains(node: ast.stmt) -> bool:
    """Whether a statement does more than to import, to define, to read a config or to register."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return False
    if isinstance(node, ast.If):
        return ast.unparse(node.test) != "__name__ == '__main__'"
    harmless = r"(cfg|settings) = |torchreid_snloss\.register\(\)|['\"]"
    return re.match(harmless, ast.unparse(node)) is None


SCRIPTS = [*sorted((ROOT / "examples").glob("*.py")), ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_imported_by_a_loaders_workers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    whole = [text] if path.suffix == ".py" else re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for script in whole:
        if path.suffix == ".py" or re.search(r"\.run\(|\btrain\(", script):
            assert not [ast.unparse(node) for node in ast.parse(script).body if trains(node)]


def test_fine_tune(reid_data: Path, example: Callable[..., str]) -> None:
    model = models.build_model("osnet_x1_0", 751, loss="softmax", pretrained=False)
    torch.save(model.state_dict(), "zoo.pth")  # as the zoo's files are
    options = tiny_options("model.name", "osnet_x1_0", "data.root", reid_data, "train.max_epoch", 1, "use_gpu", False)
    assert "mAP:" in example("fine_tune.py", "--weights", "zoo.pth", *options)
    tuned = torch.load("log/fine_tune/model/model.pth.tar-1", weights_only=True)["state_dict"]
    change = (tuned["conv1.conv.weight"] - model.state_dict()["conv1.conv.weight"]).abs().max()
    assert 0 < change < 1e-3
    with pytest.raises(SystemExit, match=r"there is no file none.pth, and no --id"):
        example("fine_tune.py", "--weights", "none.pth")


@pytest.fixture
def own_features(own_images: Path, trained: Path, in_folder: Path) -> Path:
    """The file of features of a test set, as the command line leaves it."""
    model = ["--config-file", "configs/small.yaml", "--root", str(own_images), "-t", "folder"]
    options = ["model.load_weights", str(trained), "data.workers", "0", "use_gpu", "False"]
    assert features.main([*model, "--", *options]) == 0
    return in_folder / "features.npz"


def test_nearest_images(own_features: Path, example: Callable[..., str]) -> None:
    with np.load(own_features) as file:
        paths, distances = list(file["paths"]), np.linalg.norm(file["features"] - file["features"][2], axis=1)
    printed = example("nearest_images.py", str(own_features), "--image", paths[2], "--number", "4")
    first, *nearest = printed.splitlines()
    assert first == paths[2]
    found = sorted((distance, path) for index, (distance, path) in enumerate(zip(distances, paths)) if index != 2)
    assert [float(line.split()[0]) for line in nearest] == [round(float(distance), 3) for distance, _ in found[:4]]


def test_rank_gallery(own_features: Path, example: Callable[..., str]) -> None:
    with np.load(own_features) as file:  # a gallery of 4 images
        query, gallery = (np.flatnonzero(file["splits"] == split) for split in ("query", "gallery"))
        pid = file["pids"][query[0]]
        same = file["pids"][gallery] == pid
        kept = [query[0], *gallery[same][-2:], *gallery[~same][:2]]
        np.savez("small.npz", **{name: file[name][kept] for name in file if name != "about"})
    printed = example("rank_gallery.py", "small.npz", "--lists", "1").splitlines()
    assert printed[0].startswith("1 queries, 4 gallery images: mAP ")
    assert [line.split(":")[0] for line in printed[1:3]] == ["Rank-1", ""]
    assert 0 < sum(" match " in line for line in printed[4:]) <= 2
    assert len(printed) <= 8


def test_onnx_features(own_images: Path, trained: Path, example: Callable[..., str]) -> None:
    images = sorted(map(str, own_images.rglob("*.jpg")))[:3]
    options = ["model.load_weights", str(trained), "use_gpu", "False"]
    assert export.main(["--config-file", "configs/small.yaml", "--images", images[0], *options]) == 0
    assert "(3, 512) features of osnet_x0_25 are in features.npy" in example("onnx_features.py", "model.onnx", *images)
    # torchreid's own extractor reads the same weights and gives the same features.
    extractor = utils.FeatureExtractor("osnet_x0_25", str(trained), image_size=(128, 64), device="cpu", verbose=False)
    expected = torch.nn.functional.normalize(extractor(images))
    np.testing.assert_allclose(np.load("features.npy"), expected, rtol=1e-3, atol=1e-4)


def test_own_loop(reid_data: Path, example: Callable[..., str]) -> None:
    given = ["--root", str(reid_data), "--dataset", "market1501", "--epochs", "2", "--workers", "0"]
    printed = example("own_loop.py", *given)
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert re.search(r"^mAP: \d+\.\d%, rank 1: \d", printed, re.MULTILINE)
    load_weights(models.build_model("osnet_x0_25", 16, pretrained=False), "own_loop.pth.tar", complete=True)


@pytest.mark.docs
def test_the_notebook(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    notebook = json.loads((ROOT / "examples/first_steps.ipynb").read_text(encoding="utf-8"))
    assert len(notebook["cells"]) == 10
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        text = cell.replace('"train.max_epoch", "10"', '"train.max_epoch", "1"')
        assert (text != cell) == (number == 1)
        exec(compile(text, f"cell {number}", "exec"), names)
    assert (in_folder / "model.onnx").is_file()
