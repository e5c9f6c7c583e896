"""The rows of a comparison: baselines, losses, a variants file; what is refused, and how runs share a machine."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_options

from torchreid_snloss.build import build_datamanager
from torchreid_snloss.compare import main
from torchreid_snloss.compare.command import _parser, _plan
from torchreid_snloss.compare.execution import Execution
from torchreid_snloss.compare.jobs import Place, check_jobs, run_side_by_side
from torchreid_snloss.compare.plan import Plan
from torchreid_snloss.compare.runs import Run, _wait
from torchreid_snloss.compare.tuning import Tuning
from torchreid_snloss.compare.variants import describe
from torchreid_snloss.config import ConfigError, load_config
from torchreid_snloss.record import Recorder, RecordError

TRIAL = """
wrt:
  loss.name: hap2s
  loss.hap2s.sigma: 1.0
  loss.hap2s.margin: null
  loss.hap2s.normalize: false
sn_far:
  loss: {name: sn, sn: {scale: 20, weight_m: 0.5}}
alone:
  loss.name: triplet
pml:
  loss.name: custom
  loss.custom.target: pytorch_metric_learning.losses.CircleLoss
  loss.custom.kwargs: {m: 0.4, gamma: 80}
"""


def _runs(*flags: str, options: tuple[str, ...] = ()) -> list[Run]:
    return _plan(_parser().parse_args([*flags, "--", *tiny_options(*options)])).runs()


def _by_variant(*flags: str, options: tuple[str, ...] = ()) -> dict[str, Run]:
    return {run.variant: run for run in _runs("--seeds", "1", *flags, options=options)}


def test_the_baselines_differ_in_their_batches_alone(reid_data: Path, tiny_model: None) -> None:
    runs = _by_variant("--losses", "hap2s", "--root", str(reid_data))
    batches = {}
    for name, run in runs.items():
        loader = build_datamanager(run.settings).train_loader
        batches[name] = [sorted(Counter(batch["pid"].tolist()).values()) for batch in loader]
    assert list(batches) == ["control", "softmax", "hap2s"]
    # 8 people of 4 images each; at random hardly ever.
    assert batches["control"] == batches["hap2s"] == [[4] * 8] * len(batches["hap2s"])
    assert all(sizes != [4] * 8 for sizes in batches["softmax"])
    values = [runs[name].settings.values for name in ("control", "softmax")]
    different = {key for key in values[0] if values[0][key] != values[1][key]}
    assert different == {"sampler.train_sampler", "data.save_dir"}
    assert [describe(run.settings) for run in runs.values()] == [
        "softmax, P x 4 batches", "softmax, random batches", "hap2s + softmax",
    ]  # fmt: skip


def test_the_control_has_the_configs_own_identity_batches() -> None:
    runs = _by_variant("--losses", "sn", options=("sampler.train_sampler", "RandomIdentitySampler"))
    samplers = {name: run.settings.train_sampler for name, run in runs.items()}
    assert samplers == {"control": "RandomIdentitySampler", "softmax": "RandomSampler", "sn": "RandomIdentitySampler"}


def test_all_rows_are_tested_alike(tmp_path: Path) -> None:
    assert {run.settings.normalize_feature for run in _runs("--losses", "triplet", "fidi", "sn")} == {True}
    own = ("test.normalize_feature", "False")
    assert {run.settings.normalize_feature for run in _runs("--losses", "sn", options=own)} == {False}


def test_a_variants_file_makes_rows_with_folders_of_their_own(tmp_path: Path, tiny_model: None) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text(TRIAL)
    runs = _by_variant("--variants", str(file), options=("data.save_dir", "log", "loss.sn.weight_m", "2"))
    assert list(runs) == ["control", "softmax", "wrt", "sn_far", "alone", "pml"]
    assert [describe(run.settings) for run in runs.values()][2:] == [
        "hap2s + softmax", "sn x 0.5 + softmax", "triplet", "custom + softmax",
    ]  # fmt: skip
    wrt = runs["wrt"].settings.values
    assert [wrt[f"loss.hap2s.{key}"] for key in ("sigma", "margin", "normalize")] == [1.0, None, False]
    assert runs["pml"].settings.values["loss.custom.kwargs"] == {"m": 0.4, "gamma": 80}
    assert runs["wrt"].folder == Path("log/compare/plain/wrt/seed-1")
    assert runs["control"].settings.values["loss.sn.weight_m"] == 2  # what the options set holds for the other rows
    both = _by_variant("--variants", str(file), "--losses", "hap2s", "--baselines", "control")
    assert list(both) == ["control", "hap2s", "wrt", "sn_far", "alone", "pml"]


def test_triplet_is_compared_beside_softmax_unless_the_config_gives_a_weight() -> None:
    assert _by_variant("--losses", "triplet")["triplet"].settings.softmax_weight == 1
    given = ("loss.triplet.weight_x", "0.5")
    assert _by_variant("--losses", "triplet", options=given)["triplet"].settings.softmax_weight == 0.5


def test_each_split_has_runs_of_its_own(tmp_path: Path) -> None:
    roots = [str(tmp_path / name) for name in "ab"]
    for root in roots:
        Path(root).mkdir()
    runs = _runs("--losses", "sn", "--baselines", "none", "--seeds", "2", "--roots", *roots)
    assert [(run.split, run.seed, run.settings.root) for run in runs] == [
        (1, 1, roots[0]), (1, 2, roots[0]), (2, 1, roots[1]), (2, 2, roots[1]),
    ]  # fmt: skip
    assert len({run.folder for run in runs}) == 4


def test_runs_and_trials_on_another_data_root_are_not_taken_for_those_of_a_split(in_folder: Path) -> None:
    pytest.importorskip("optuna")
    for root in "abc":
        Path(root).mkdir()

    def plan(*roots: str) -> Plan:
        flags = ["--losses", "sn", "--baselines", "none", "--tune", "3", "--roots", *roots, "--"]
        return _plan(_parser().parse_args([*flags, "data.val_fraction", "0.25", "data.save_dir", "log"]))

    first = plan("a", "b")
    (variant,) = first.variants
    run = first.runs()[0]
    Recorder(run.folder / "record").add_epoch(1, {"loss": 1.0}, seconds=1.0)
    (run.folder / "settings.yaml").write_text(run.settings.cfg_text)
    Tuning(first, variant, 1)._open()

    same, other = plan("./a/", "c"), plan("c", "b")
    same.runs()[0].check()
    Tuning(same, variant, 1)
    with pytest.raises(ConfigError, match=r"other settings \(data\.root was a, is c\)"):
        other.runs()[0].check()
    with pytest.raises(ConfigError, match=r"other settings \(data\.root was a, is c\)"):
        Tuning(other, variant, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrt: {loss.name: hap2s, loss.hap2s.sigmaa: 1}", "wrt: unknown config key 'loss.hap2s.sigmaa', did you mean"),
        ("wrt: {loss.name: hap2s, loss.hap2s.sigma: -1}", "wrt: loss.hap2s: sigma must be greater than 0, got -1"),
        ("wrt: {loss.name: hap2s}\nwrt: {loss.name: sn}", "the key 'wrt' is there twice, in lines 1 and 2"),
        ("sn: {loss.sn.scale: 20}\nhap2s: {loss.name: hap2s}", "two rows are named 'sn'"),
        ("softmax: {loss.name: softmax}", "softmax is the name of a baseline, which --baselines adds"),
        ("control: {loss.name: softmax}", "control is the name of a baseline"),
        ("[1]", "must map names to options, got [1]"),
        ("", "must map names to options, got None"),
        ("a/b: {loss.name: sn}", "begin with a letter or digit and have only letters, digits and . _ + -, got 'a/b'"),
        ("..: {loss.name: sn}", "a name must begin with a letter or digit"),
        ("_a: {loss.name: sn}", "a name must begin with a letter or digit"),
        ("wrt: 3", "wrt must hold options, such as loss.name: hap2s, got 3"),
        ("wrt: {data.save_dir: x}", "wrt: data.save_dir is the same for all variants, leave it out"),
        ("wrt: {data.label_noise: 0.1}", "wrt: data.label_noise is the same for all variants"),
        ("wrt: {test.eval_freq: 2}", "wrt: test.eval_freq is the same for all variants"),
        ("wrt: {train.keep: 3}", "wrt: train.keep is the same for all variants"),
        ("wrt: {loss.name: sn, data.split_id: 1}", "wrt: data.split_id is the same for all variants"),
        ("wrt: {loss.name: sn, data.folder.test_fraction: 0.5}", "wrt: data.folder.test_fraction is the same"),
        ("wrt: {loss.name: sn, cuhk03.labeled_images: true}", "wrt: cuhk03.labeled_images is the same"),
        ("wrt: {loss.name: sn, search: {loss.sn.scale: 3}}", "search: loss.sn.scale must be a list of two or more"),
        ("wrt: {loss.name: sn, search: {loss.sn.scale: {low: 3, high: 2}}}", "search: loss.sn.scale: high must be"),
        ("Sn: {loss.name: hap2s}", "two rows are named 'sn' and 'Sn', the same folder on some systems"),
        ("sn.: {loss.name: hap2s}", "two rows are named 'sn' and 'sn.', the same folder"),
        ("Tuning: {loss.name: hap2s}", "Tuning is what a comparison names a file or folder of its own"),
        ("tuned-3: {loss.name: hap2s}", "tuned-3 is what a comparison names a file or folder of its own"),
        ("results.csv: {loss.name: hap2s}", "results.csv is what a comparison names a file or folder of its own"),
        (f"{'w' * 101}: {{loss.name: hap2s}}", "a name must have at most 100 bytes, got 101, 'www"),
        (f"{'漢' * 34}: {{loss.name: hap2s}}", "a name must have at most 100 bytes, got 102, '漢漢"),
        ("wrt: {loss.name: sn, loss: {name: hap2s}}", "wrt sets 'loss.name' more than once"),
        ("wrt: &a {loss.name: sn, loss: *a}", "can't read the variants file 'trial.yaml': an alias refers to what"),
        ("wrt: {loss.name: sn, test.evaluate: true}", "wrt: test.evaluate is the same for all variants, leave it out"),
        ("wrt: {loss.name: sn, model.resume: x}", "wrt: model.resume is the same for all variants, leave it out"),
        ("wrt: {loss.name: sn, search: {train.max_epoch: [1, 2]}}", "wrt: search: train.max_epoch is the same for all"),
        ("wrt: {loss.name: sn, search: {data.val_fraction: [0.1, 0.2]}}", "search: data.val_fraction is the same for"),
        ("wrt: {loss.name: sn, search: {data.val_fold: [0, 1]}}", "search: data.val_fold is the same for all trials"),
        (
            "wrt: {loss.name: sn, search: {test.rerank: [true, false]}}",
            "search: test.rerank is the same for all trials",
        ),
        (
            "wrt: {loss.name: sn, search: {data.split_id: [0, 1]}}",
            "wrt: search: data.split_id is the same for all trials",
        ),
        (
            "wrt: {loss.name: sn, search: {market1501.use_500k_distractors: [true, false]}}",
            "is the same for all trials",
        ),
        (
            "wrt: {loss.name: sn, search: {loss.fidi.beta: [1, 2]}}",
            "wrt: search: loss.fidi.beta is not used by the loss of this row, sn: leave it out",
        ),
        (
            "wrt: {loss.name: hap2s, search: {loss.hap2s.alpha: [5, 10]}}",
            "search: loss.hap2s.alpha is not used with loss.hap2s.weighting exponential: leave it out",
        ),
        (
            "wrt: {loss.name: sn, search: {loss.sn.scales: [5, 10]}}",
            "wrt: search: unknown config key 'loss.sn.scales', did you mean loss.sn.scale",
        ),
        ("wrt: [", "can't read the variants file"),
    ],
)
def test_a_broken_variants_file_is_one_line(
    text: str, message: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("trial.yaml").write_text(text)
    assert main(["--variants", "trial.yaml", "--losses", "sn", "--", "data.save_dir", "log"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert not Path("log").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "nowhere.yaml"], "can't read the variants file 'nowhere.yaml'"),
        (["--variants", ""], "can't read the variants file ''"),
        (["--losses", "sn", "control", "--"], "--losses got 'control', which is no loss but a baseline"),
        (["--tune", "3"], "--tune judges its trials by training identities that are held out: set data.val_fraction"),
        (["--tune", "-1"], "--tune must be at least 0, got -1"),
        (["--folds", "4"], "--folds 4 needs --tune, whose trials are judged by the mean over the folds"),
        (["--tune", "3", "--folds", "0", "data.val_fraction", "0.25"], "--folds must be at least 1, got 0"),
        (["--tune", "3", "--folds", "5", "data.val_fraction", "0.25"], "with data.val_fraction 0.25 there are only 4:"),
        (["--tune", "3", "--folds", "4"], "--tune judges its trials by training identities that are held out"),
        (
            ["--tune", "3", "data.val_fraction", "0.25", "data.val_fold", "1"],
            "--tune sets data.val_fold itself, as",
        ),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--jobs", "5000"], "the number of CPU cores, got 5000"),
        (["--roots", "nowhere", "--"], "--roots: there is no folder 'nowhere'"),
        (["--roots", ".", "./", "--"], "--roots must name each root once, got ['.', '.']"),
        (["--losses", "sn", "--baselines", "none", "--", "test.held_out_only", "True"], "leave test.evaluate, model"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: list[str], message: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "use_gpu", "False", "data.save_dir", "log"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert not Path("log").exists()


def test_the_held_out_identities_are_the_same_for_all_rows_of_a_tuning(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    Path("trial.yaml").write_text("own: {loss.name: sn, data.val_fraction: 0.5}")
    flags = ["--variants", "trial.yaml", "data.val_fraction", "0.25", "data.save_dir", "log"]
    assert main(["--tune", "3", *flags]) == 2
    assert "own: data.val_fraction is the same for all variants, leave it out" in capsys.readouterr().err
    assert _runs("--variants", "trial.yaml", options=("data.val_fraction", "0.25"))[-1].settings.val_fraction == 0.5
    Path("trial.yaml").write_text("own: {loss.name: sn, data.val_fold: 1}")
    assert main(["--tune", "3", *flags]) == 2
    assert "own: data.val_fold is the same for all variants, leave it out" in capsys.readouterr().err


def test_a_tuning_for_which_nobody_is_held_out_is_refused_before_its_first_trial(
    reid_data: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    flags = ["--losses", "sn", "--root", str(reid_data), "--tune", "3"]
    for options, message in (
        (["data.val_fraction", "0.001"], "data.val_fraction 0.001 would hold out 0 of 16 training identities"),
        (["--folds", "3", "data.val_fraction", "0.05"], "data.val_fold 2 would hold out 0 of 16 training identities"),
        (
            ["--train-fraction", "0.25", "--folds", "5", "data.val_fraction", "0.2"],
            "data.val_fold 2 would hold out 0 of 4 training identities",
        ),
    ):
        assert main([*flags, *options, "use_gpu", "False", "data.save_dir", "log"]) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        assert message in shown.err
        assert "trial" not in shown.out


def test_a_file_in_the_place_of_a_row_is_named(
    reid_data: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Path("log/compare/plain/sn")
    row.parent.mkdir(parents=True)
    row.write_text("")
    arguments = ["--losses", "sn", "--root", str(reid_data), "use_gpu", "False", "data.save_dir", "log"]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "'log/compare/plain/sn' is a file, but a folder is needed there: remove it, or rename the row" in errors


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_an_interruption_while_runs_are_only_passed_over_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = _runs("--losses", "sn", options=("data.save_dir", str(tmp_path)))
    execution = Execution(1, use_gpu=False)
    monkeypatch.setattr(Run, "finished", lambda _: True)
    monkeypatch.setattr("builtins.print", _interrupting(print))
    assert execution.train(runs) == 128 + signal.SIGINT
    assert capsys.readouterr().err.endswith("the comparison was interrupted; repeat the command to resume\n")


def _interrupting(show: Any) -> Any:
    """A `print` at whose first line Ctrl-C comes."""
    lines = iter([signal.SIGINT])

    def shown(*values: Any, **options: Any) -> None:
        for number in lines:
            os.kill(os.getpid(), number)
        show(*values, **options)

    return shown


def test_what_draws_the_batches_of_softmax_is_named() -> None:
    texts = {}
    for sampler in ("SequentialSampler", "RandomDomainSampler", "RandomIdentitySampler"):
        runs = _by_variant("--losses", "sn", options=("sampler.train_sampler", sampler))
        texts[sampler] = describe(runs["control"].settings)
    assert texts == {
        "SequentialSampler": "softmax, batches of SequentialSampler",
        "RandomDomainSampler": "softmax, batches of RandomDomainSampler",
        "RandomIdentitySampler": "softmax, P x 4 batches",
    }


@pytest.mark.parametrize("visible", [None, "0, 2,3"])
def test_each_of_the_tasks_side_by_side_has_a_gpu_of_its_own(
    visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_jobs(3, use_gpu=True)
    with pytest.raises(ConfigError, match="--jobs must be at most 3, the number of GPUs, got 4"):
        check_jobs(4, use_gpu=True)
    together, places = threading.Barrier(3), []

    def task(place: Place) -> int:
        together.wait(timeout=20)
        places.append(place)
        return 0

    assert run_side_by_side([task] * 3, 3, use_gpu=True) == 0
    gpus = ["0", "1", "2"] if visible is None else ["0", "2", "3"]
    assert sorted(place.variables["CUDA_VISIBLE_DEVICES"] for place in places) == gpus
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_jobs(1, use_gpu=True)  # a run itself says that there is none


def test_triplet_has_softmax_beside_it_as_all_losses_have() -> None:
    runs = _by_variant("--losses", "triplet", "triplet+sn", "sn+triplet")
    assert {name: run.settings.softmax_weight for name, run in runs.items()} == dict.fromkeys(runs, 1.0)


def test_all_rows_train_in_this_packages_step() -> None:
    runs = _by_variant("--losses", "triplet", "sn")
    assert {name: run.settings.torchreids_step for name, run in runs.items()} == dict.fromkeys(runs, False)
    assert {"control", "softmax", "triplet"} < set(runs)


def test_tasks_run_side_by_side_with_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    together, places = threading.Barrier(2), []

    def task(place: Place) -> int:
        together.wait(timeout=20)  # breaks unless two are here at a time
        places.append(place)
        return 0

    assert run_side_by_side([task] * 4, 2, use_gpu=False) == 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    assert {place.variables["OMP_NUM_THREADS"] for place in places} == {str(max(1, cores // 2))}
    assert not any(place.alone for place in places)


def test_runs_side_by_side_print_whole_lines_and_how_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            length = super().write(text)
            time.sleep(0.02)  # lets the other thread in
            return length

    together, minutes = threading.Barrier(2), itertools.count(10, 10)
    clock = [0.0]
    both_ran = threading.Barrier(2, action=lambda: clock.__setitem__(0, 60.0 * next(minutes)))

    class TenMinutes:
        variant = "sn"

        def __init__(self, number: int) -> None:
            self.name, self.folder = f"sn, seed {number}", f"sn/seed-{number}"

        def finished(self) -> bool:
            return False

        def execute(self, place: Place) -> int:
            together.wait(timeout=20)
            both_ran.wait(timeout=20)
            return 0

        def summary(self) -> str:
            return "mAP 50.0%"

    out = Slow()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("torchreid_snloss.compare.execution.time.monotonic", lambda: clock[0])
    runs: list[Any] = [TenMinutes(number) for number in range(1, 7)]
    assert Execution(2, use_gpu=False).train(runs) == 0
    lines = out.getvalue().splitlines()
    assert sorted(line for line in lines if line.startswith("=>")) == [
        f"=> run {n} of 6: sn, seed {n}, in sn/seed-{n}" for n in range(1, 7)
    ]
    ends = [re.fullmatch(r"   sn, seed \d: mAP 50.0%; (\d) to go(?:, about (\d+) min)?", line) for line in lines]
    left = {found[1]: found[2] for found in ends if found}
    assert len(lines) == 12
    # Two that end at the same time may both say that four are left.
    assert left.items() <= {"5": "30", "4": "20", "3": "20", "2": "10", "1": "10", "0": None}.items()
    assert {"4", "2", "0"} <= left.keys()


def test_a_failure_stops_the_others_and_leaves_out_the_rest() -> None:
    ended: list[str] = []

    def waits(place: Place) -> int:
        while not place.stop_requests():
            time.sleep(0.01)
        ended.append("stopped")
        return 143

    def fails(place: Place) -> int:
        time.sleep(0.05)
        ended.append("failed")
        return 2

    never: Any = lambda place: ended.append("ran")  # noqa: E731
    assert run_side_by_side([waits, fails, never], 2, use_gpu=False) == 2
    assert ended == ["failed", "stopped"]


def test_tasks_run_in_another_thread_than_the_main_one() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_side_by_side, [lambda place: 0], 1, use_gpu=False).result() == 0


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_signal_stops_all_tasks() -> None:
    begun = threading.Barrier(3)
    requests: list[int] = []

    def quick(place: Place) -> int:
        begun.wait(timeout=20)
        while not place.stop_requests():
            time.sleep(0.01)
        return 128 + signal.SIGTERM

    def slow(place: Place) -> int:
        quick(place)
        time.sleep(0.5)  # the other task ends in the meantime, which must not count as a second request
        requests.append(place.stop_requests())
        return 128 + signal.SIGTERM

    threading.Thread(target=lambda: (begun.wait(timeout=20), os.kill(os.getpid(), signal.SIGINT))).start()
    assert run_side_by_side([quick, slow, quick, quick], 2, use_gpu=False) == 128 + signal.SIGINT
    assert requests == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes a program that runs are to be instead of a training."""
    if os.name == "nt":
        pytest.skip("a shell script, and signals of POSIX")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "$PROGRAM" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return lambda text: monkeypatch.setenv("PROGRAM", text)


def test_a_trial_that_is_ended_early_has_no_message_of_its_own(
    tmp_path: Path, program: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    program("import sys, time; print('stopped', file=sys.stderr, flush=True); time.sleep(60)")
    (run,) = _runs("--losses", "sn", "--baselines", "none", "--seeds", "1", options=("data.save_dir", str(tmp_path)))
    beside_others = Place({}, alone=False, stop_requests=lambda: 0)
    assert run.execute(beside_others, lambda: False) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == ""


def test_a_run_that_crashes_ends_its_row_only(
    tmp_path: Path, program: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    program("import os, signal, sys; os._exit(255) if 'fidi' in sys.argv[-1] else os.kill(os.getpid(), signal.SIGSEGV)")
    flags = ("--losses", "sn", "fidi", "--baselines", "none", "--seeds", "1")
    runs = _runs(*flags, options=("data.save_dir", str(tmp_path)))
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "train.log-1").write_text("error: of an earlier attempt")
    os.utime(runs[0].folder / "train.log-1", (0, 0))
    execution = Execution(1, use_gpu=False)
    assert execution.train(runs) == 0
    assert execution.failed == {
        "sn": "sn, seed 1 failed: it was ended by SIGSEGV",
        "fidi": "fidi, seed 1 failed: exit code 255",
    }
    # The reason is said at once: nobody may get to see the last lines.
    assert "   sn, seed 1 failed: it was ended by SIGSEGV; any other rows go on\n" in capsys.readouterr().out


def test_a_run_that_starts_anew_does_not_resume_from_what_is_there(
    tmp_path: Path, program: Callable[[str], None]
) -> None:
    program("")
    (run,) = _runs("--losses", "sn", "--baselines", "none", "--seeds", "1", options=("data.save_dir", str(tmp_path)))
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model/model.pth.tar-2").write_bytes(b"of an earlier run without a record")
    assert run.execute(Place({}, alone=True, stop_requests=lambda: 0)) == 0
    assert not (run.folder / "model").exists()


def test_settings_are_compared_when_a_run_starts_too(tmp_path: Path, program: Callable[[str], None]) -> None:
    program("")
    options = ("data.save_dir", str(tmp_path))
    flags = ("--losses", "sn", "--baselines", "none", "--seeds", "1")
    (first,), (second,) = (_runs(*flags, options=(*options, "train.lr", lr)) for lr in ("0.1", "0.2"))
    second.check()  # as at the start of a comparison, while the folder is free
    (first.folder / "record").mkdir(parents=True)
    (first.folder / "record/record.json").touch()
    (first.folder / "settings.yaml").write_text(first.settings.cfg_text)
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(train.lr was 0.1, is 0.2\)"):
        second.execute(Place({}, alone=True, stop_requests=lambda: 0))
    for key, others in (("loss.fidi.beta", []), ("loss.sn.scale", ["loss.sn.scale was 10.0, is 2.0"])):
        (third,) = _runs(*flags, options=(*options, "train.lr", "0.1", key, "2"))
        assert third.other_settings() == others  # of the loss that is trained with alone


def test_a_config_that_is_loaded_in_a_thread_leaves_the_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    out = sys.stdout
    with ThreadPoolExecutor(2) as pool:
        old_key = ("data.use_unlabeled_targets", True)  # of which a run of its own prints a line
        loads = [
            pool.submit(load_config, str(ROOT / "configs/small.yaml"), old_key, lambda line: None) for _ in range(30)
        ]
        while not all(future.done() for future in loads):
            assert sys.stdout is out
    assert all(future.result().data.load_train_targets for future in loads)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_run_ends_if_its_results_can_not_be_read() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:

        def fails() -> bool:
            raise RecordError("damaged")

        with pytest.raises(RecordError, match="damaged"):
            _wait(process, lambda: 0, fails)
        assert process.returncode == -signal.SIGTERM


def test_the_shipped_variants_are_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    runs = _by_variant("--variants", "configs/variants/trial.yaml", "--losses", "hap2s", "--baselines", "none")
    assert list(runs) == ["hap2s", "hap2s_p", "wrt", "circle", "multi_similarity"]


def test_a_run_does_not_go_on_alone_if_its_trial_can_not_be_judged() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def fail() -> bool:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        _wait(process, lambda: 0, fail)
    assert process.poll() is not None


def test_a_disk_that_becomes_full_between_two_runs_is_one_line(
    reid_data: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "settings.yaml")

    monkeypatch.setattr("torchreid_snloss.compare.execution.run_side_by_side", fail)
    assert main(["--losses", "sn", "--root", str(reid_data), "--", "use_gpu", "False", "data.save_dir", "log"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "can't write the results to 'log/compare/plain': [Errno 28] No space left on device" in errors
    assert "the runs are kept; repeat the command" in errors
    assert "traceback" not in errors
