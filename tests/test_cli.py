"""The command line as a user runs it: on files, a few times as a process, else in this one."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Done, Tiny, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchreid_snloss import ImageSNEngine, get_default_config
from torchreid_snloss.config import load_config
from torchreid_snloss.losses import LOSSES
from torchreid_snloss.run.program import prepare_imports

# What a torchreid user has: a softmax config, as those in upstream's configs/.
EXISTING = {
    "model": {"name": "tiny", "pretrained": False},
    "data": {
        "type": "image",
        "sources": ["market1501"],
        "targets": ["market1501"],
        "height": 64,
        "width": 32,
        "combineall": False,
        "transforms": ["random_flip"],
        "workers": 0,
        "save_dir": "log/existing",
    },
    "use_gpu": False,
    "loss": {"name": "softmax", "softmax": {"label_smooth": True}},
    "train": {
        "optim": "amsgrad",
        "lr": 0.0015,
        "max_epoch": 1,
        "batch_size": 32,
        "fixbase_epoch": 1,
        "open_layers": ["classifier"],
        "lr_scheduler": "single_step",
        "stepsize": [60],
        "print_freq": 100,
    },
    "test": {"batch_size": 100, "dist_metric": "euclidean", "normalize_feature": False, "evaluate": False,
             "eval_freq": -1, "rerank": False},
}  # fmt: skip


@pytest.fixture
def existing(tmp_path: Path, reid_data: Path, tiny_model: None) -> list[str]:
    """The arguments that run torchreid's own main script on an existing config."""
    path = tmp_path / "existing.yaml"
    path.write_text(yaml.safe_dump(EXISTING))
    return ["--config-file", str(path), "--root", str(reid_data)]


def run_process(*arguments: str, cwd: Path, fresh: bool = False) -> Done:
    """The command line in a process of its own, with a model of torchreid's."""
    done = run("-m", "torchreid_snloss", *arguments, "model.name", "osnet_x0_25", cwd=cwd, fresh=fresh)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("loss", ["softmax", "triplet", "sn", "hap2s", "fidi"])
def test_existing_config_with_the_loss_named(
    loss: str, existing: list[str], command_line: Callable[..., Done], reid_data: Path, tmp_path: Path
) -> None:
    def start(*options: str) -> Done:
        if loss == "sn":  # one as processes
            return run_process(*existing, *options, cwd=tmp_path)
        return command_line(*existing, *options)

    options = ["loss.name", loss] if loss != "softmax" else []
    options += ["loss.triplet.weight_x", "1"] if loss == "triplet" else []
    trained = start(*options)
    assert trained.code == 0, trained.err
    assert "mAP:" in trained.out
    swapped = "sampler.train_sampler: IdentitySampler in place of RandomSampler" in trained.out
    assert swapped == (loss != "softmax")
    assert ("sampler.num_instances 2 may train better than 4" in trained.out) == swapped  # from scratch
    assert ("loss_m" in trained.out) == (loss in ("sn", "hap2s", "fidi"))
    assert ("=> test.normalize_feature: False in the config" in trained.out) == (loss in ("sn", "hap2s", "fidi"))

    # The screen is short, however few batches there are it has a loss, and the log has all of it and more.
    log = tmp_path / "log" / "existing"
    lines, text = trained.out.splitlines(), next(log.glob("train.log-*")).read_text()
    assert lines.index("=> Start training") < 25
    images = len(list(reid_data.rglob("bounding_box_train/*.jpg")))
    assert re.search(rf"^  train +16 +{images} +6   market1501$", trained.out, re.MULTILINE)
    assert [line.split("\t")[0] for line in lines if line.startswith("epoch:")] == ["epoch: [1/1][3/3]"]
    assert "  model: name " in trained.out
    assert "norm_mean" not in trained.out
    assert not re.search("Show configuration|Building train|Extracting|=> Loaded|seed: 1", trained.out)
    assert all(
        words in text for words in ("Show configuration", "Building train", "Extracting", "=> Loaded", "seed: 1")
    )
    assert set(lines) <= set(text.splitlines())

    # TensorBoard's training and tests count steps.
    events = EventAccumulator(str(log))
    events.Reload()
    assert [event.step for event in events.Scalars("Train/lr")] == [0, 1, 2]
    assert [event.step for name in ("rank1", "mAP", "mINP") for event in events.Scalars(f"Test/market1501/{name}")] == [
        *[3, 3, 3]
    ]

    # The checkpoint evaluates to what training ended with, torchreid's own (softmax, triplet) included.
    checkpoint = str(log / "model" / "model.pth.tar-1")
    tested = start(
        *options, "model.load_weights", checkpoint, "test.evaluate", "True", "test.visrank", str(loss == "sn")
    )
    assert tested.code == 0, tested.err
    results = [out[out.index("** Results **") :].splitlines()[:7] for out in (trained.out, tested.out)]
    assert results[0] == results[1]
    assert len(list(log.glob("visrank_market1501/*.jpg"))) == (16 if loss == "sn" else 0)


def test_resume_goes_on_where_the_checkpoint_ends(
    existing: list[str], command_line: Callable[..., Done], tmp_path: Path
) -> None:
    options = ["loss.name", "sn", "train.max_epoch", "2", "train.fixbase_epoch", "0"]
    assert command_line(*existing, *options).code == 0
    checkpoint = str(tmp_path / "log" / "existing" / "model" / "model.pth.tar-2")
    resumed = command_line(*existing, *options, "train.max_epoch", "3", "model.resume", checkpoint)
    assert resumed.code == 0, resumed.err
    assert "epoch: [3/3][3/3]" in resumed.out
    assert "epoch: [2/3]" not in resumed.out


SMALL = ["--config-file", str(ROOT / "configs/small.yaml"), "data.workers", "0"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Where the small config was run for an epoch, and what it printed."""
    folder = tmp_path_factory.mktemp("small")
    options = ["data.height", "64", "data.width", "32", "train.max_epoch", "1", "test.visrank_topk", "5"]
    return folder, run_process(*SMALL, *options, cwd=folder)


def test_small_config_shortened(small: tuple[Path, Done]) -> None:
    folder, done = small
    assert done.code == 0, done.err
    assert "Drawing the synthetic pedestrians" in done.out
    assert done.out.count("mAP:") == len(list((folder / "log/small").glob("events.out*"))) == 1
    assert len(list((folder / "log/small/visrank_synthetic").glob("*.jpg"))) == 200
    assert (folder / "log/small/model/model.pth.tar-1").is_file()


BAD = [
    (["loss.nam", "sn"], ["unknown config key 'loss.nam'", "did you mean loss.name"]),
    (["loss.name", "snn"], ["loss.name must be one of softmax, triplet, sn, hap2s, fidi", "'snn'"]),
    (["model.load_weights", "nowhere.pth"], ["model.load_weights: there is no file 'nowhere.pth'"]),
    (["data.sources", "['dukemtmcreid']", "data.root", "MISSING"], ["can't load the data", "data.root 'MISSING'"]),
    (["loss.name", "sn", "train.batch_size", "4"], ["at least 2 identities", "train.batch_size 4"]),
    (["train.batch_size", "4096"], ["train.batch_size 4096 is larger than the training set"]),
    (["loss.name", "sn", "loss.sn.weight_x", "0"], ["train.fixbase_epoch 1", "nothing in loss 'sn' depends"]),
    (["train.lr"], ["KEY VALUE", "'train.lr', has no value"]),
    (["train.lr", "fast"], ["train.lr must be of type float", "'fast'"]),
    (["train.lr", "-1"], ["train.lr must be above 0", "got train.lr -1.0"]),
    (["loss.name", "sn", "loss.sn.scale", "-1"], ["loss.sn: scale must be greater than 0, got -1.0"]),
    (["loss.name", "sn", "loss.sn.weight_m", "0", "loss.sn.weight_x", "0"], ["not both 0"]),
    (["loss.name", "sn", "loss.sn.weight_m", "nan"], ["loss.sn.weight_m must be finite", "got loss.sn.weight_m nan"]),
    (["loss.name", "sn", "data.type", "video"], ["there is no video data set 'market1501'", "mars", "data.modules"]),
    (["model.name", "osnet"], ["model.name: Unknown model: osnet"]),
    (["model.name", "hacnn"], ["hacnn does not take images of data.height 64", "expected (160, 64)"]),
    (["model.resume", "nowhere.pth"], ["model.resume: there is no file 'nowhere.pth'"]),
    (["data.sources", "['market']"], ["there is no image data set 'market'", "data.modules"]),
    (["data.targets", "[]"], ["data.targets must be a list of 1 or more names, all different; got data.targets []"]),
    (["data.transforms", "['random_flipp']"], ["data.transforms must be one of random_flip", "'random_flipp'"]),
    (["data.workers", "None"], ["data.workers must have a value", "None"]),
    (["data.save_dir", "existing.yaml"], ["data.save_dir 'existing.yaml' can't be written to"]),
    (["loss.name", "sn", "train.batch_size", "30"], ["batch_size must be a multiple of num_instances", "30"]),
    (["loss.name", "sn", "train.batch_size", "128"], ["holds 32 identities", "only 16"]),
    (["loss.name", "triplet"], ["train.fixbase_epoch 1", "loss.triplet.weight_x 0"]),
    (["train.open_layers", "['fcc']"], ["train.open_layers: tiny has no ['fcc']"]),
    (["train.staged_lr", "True", "train.new_layers", "['fcc']"], ["train.new_layers", "has no ['fcc']"]),
    (
        ["train.stepsize", "[0]"],
        ["train.stepsize must be a list of 1 or more whole numbers from 1 to", "got train.stepsize [0]"],
    ),
    (["train.max_epoch", "0"], ["train.max_epoch must be at least 1; got train.max_epoch 0"]),
    (["test.ranks", "[1, 60]"], ["test.ranks must lie between 1 and 48", "[60]"]),
    (["test.ranks", "[1.5]"], ["test.ranks must be a list of whole numbers from 1 to", "got test.ranks [1.5]"]),
    (["sampler.train_sampler", "Random"], ["sampler.train_sampler must be one of", "IdentitySampler", "'Random'"]),
    pytest.param(
        ["use_gpu", "True"],
        ["use_gpu is True, but torch finds no GPU"],
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
]


def assert_one_message(done: Done, words: list[str]) -> None:
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err
    assert "epoch: [" not in done.out
    message = [line for line in done.err.splitlines() if line.startswith("torchreid-snloss: error: ")]
    assert len(message) == 1
    for word in words:
        assert word in message[0]


def name(value: object) -> str | None:
    return "_".join(value)[:40] if isinstance(value, list) else None


@pytest.mark.parametrize(("options", "words"), BAD, ids=name)
def test_bad_input_is_one_message(
    options: list[str], words: list[str], existing: list[str], command_line: Callable[..., Done], tmp_path: Path
) -> None:
    if "MISSING" in options:
        existing = existing[:-2]
        (tmp_path / "MISSING" / "dukemtmc-reid").mkdir(parents=True)  # there: so no download is tried
    assert_one_message(command_line(*existing, *options), words)


def test_bad_input_is_the_exit_code_of_a_process(existing: list[str], tmp_path: Path) -> None:
    done = run_process(*existing, "loss.nam", "sn", cwd=tmp_path, fresh=True)
    assert_one_message(done, ["unknown config key 'loss.nam'"])
    assert len(done.err.splitlines()) == 1  # no warning of torchreid's comes before it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't read the config file"),
        ("loss: [", "can't read the config file"),
        ("loss", "must hold sections of keys"),
        ("loss: &a {sn: *a}", "must hold sections of keys"),
        ("loss: sn", "unknown config key 'loss'"),
        ("loss: {sn: {scales: 3}}", "unknown config key 'loss.sn.scales', did you mean loss.sn.scale"),
    ],
)
def test_bad_config_file(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_config(str(path))


def test_numbers_in_any_notation(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("train: {lr: 3e-4, weight_decay: 0}\nloss: {hap2s: {margin: null}, sn: {scale: 10}}\n")
    cfg = load_config(str(path), ["adam.beta1", "1", "loss.fidi.beta", "5e-1", "data.sources", "['a', 'b']"])
    assert (cfg.train.lr, cfg.train.weight_decay, cfg.adam.beta1, cfg.loss.fidi.beta) == (3e-4, 0.0, 1.0, 0.5)
    assert (cfg.loss.hap2s.margin, cfg.loss.sn.scale, cfg.data.sources) == (None, 10.0, ["a", "b"])


def test_config_defaults_are_the_losses_own() -> None:
    cfg = get_default_config()
    sn = {"num_neighbors": 10, "scale": 10.0, "squeeze_weight": 0.1, "squeeze": "support", "normalize": True}
    hap2s = {"weighting": "exponential", "sigma": 0.5, "alpha": 10.0, "margin": 0.3, "normalize": True}
    fidi = {"alpha": 1.05, "beta": 3.0, "normalize": True}
    for name, weight, defaults in (("sn", 0.1, sn), ("hap2s", 1.0, hap2s), ("fidi", 1.0, fidi)):
        assert cfg.loss[name] == {**defaults, "block_size": 0, "weight_m": weight, "weight_x": 1.0}
        for key, parameter in inspect.signature(LOSSES[name]).parameters.items():
            assert key == "reduction" or cfg.loss[name][key] == parameter.default
    weights = inspect.signature(ImageSNEngine).parameters
    assert (weights["weight_m"].default, weights["weight_x"].default) == (0.1, 1.0)


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume"])
@pytest.mark.parametrize("kind", ["code", "text", "truncated", "a list", "another model", "weights only"])
def test_bad_checkpoint_is_one_message(
    kind: str, key: str, existing: list[str], command_line: Callable[..., Done], tmp_path: Path
) -> None:
    path = tmp_path / "model.pth.tar-7"
    content: object = {"state_dict": Tiny().state_dict(), "epoch": 7}
    if kind == "code":
        content = {"state_dict": Attack(f"touch {tmp_path / 'ran'}")}
    elif kind == "a list":
        content = [1, 2, 3]
    elif kind == "another model":
        content = {"state_dict": {"layer.weight": torch.zeros(3)}, "epoch": 7, "optimizer": {}, "scheduler": {}}
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("not a checkpoint")
    done = command_line(*existing, key, str(path))
    assert not (tmp_path / "ran").exists()
    if (kind, key) == ("weights only", "model.load_weights"):
        assert done.code == 0
    else:
        assert_one_message(done, [str(path)])


def test_options_go_before_flags_and_flags_before_the_file(
    existing: list[str], command_line: Callable[..., Done], reid_data: Path
) -> None:
    # Upstream's order. `--` ends the list that a flag takes.
    flags = ["--root", "nowhere", "--transforms", "random_flip", "random_crop", "--", "model.name", "osnet_x0_25"]
    done = command_line(*existing[:2], *flags, "data.height", "48", "data.root", reid_data)
    assert done.code == 0, done.err
    (log,) = Path("log/existing").glob("train.log-*")
    text = log.read_text()
    assert "+ random crop" in text
    assert "48x32" in text
    assert f"root: {reid_data}" in text
    assert command_line(*existing, "-s", "market1501", "loss.name", "sn").code == 2


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["python", "-u", "-m", "torchreid_snloss", "loss.name", "sn"], {}, "1000"),
        (["python", "-m", "torchreid_snloss.compare"], {}, "1000"),
        (["python", "/usr/bin/torchreid-snloss-compare"], {}, "1000"),
        (["python", "train.py", "-m", "torch"], {}, None),
        (["python", "-m", "torch.distributed.run", "train.py"], {}, None),
        (["python", "-m", "torchreid_snloss"], {"GOMP_SPINCOUNT": "5"}, "5"),
        (["python", "-m", "torchreid_snloss"], {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_of_a_command_line_wait_for_a_short_time(
    words: list[str], environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back in the end
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["-m"] if "-m" in words[:3] else words[1:])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepare_imports()
        warnings.warn_explicit("Cython evaluation ...", UserWarning, "rank.py", 1, "torchreid.reid.metrics.rank")
        warnings.warn_explicit("Cython evaluation ...", UserWarning, "mine.py", 1, "mine")
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    quiet = words[1] not in ("train.py",) and "torch.distributed.run" not in words
    assert [str(each.filename) for each in told] == (["mine.py"] if quiet else ["rank.py", "mine.py"])


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("torchreid-snloss")
    done = subprocess.run([str(command), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--config-file", "--sources", "--targets", "--transforms", "--root"))


def test_an_untrained_network_scores_low_on_the_synthetic_people(
    small: tuple[Path, Done], command_line: Callable[..., Done]
) -> None:
    options = ["data.root", str(small[0] / "reid-data"), "test.evaluate", "True", "test.visrank", "False"]
    done = command_line(*SMALL, *options)
    assert done.code == 0, done.err
    (mean_ap,) = re.findall(r"mAP: ([\d.]+)%", done.out)
    assert float(mean_ap) < 10
