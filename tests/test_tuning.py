"""`torchreid-snloss-compare --tune`: its trials, its interruption, and what it may not look at."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, interrupt_at, process_options, run, start

from torchreid_snloss import load_config
from torchreid_snloss.compare.command import _parser, _plan, _unchanged
from torchreid_snloss.compare.images import images_digests
from torchreid_snloss.compare.jobs import Place
from torchreid_snloss.compare.plan import Plan
from torchreid_snloss.compare.runs import Run, RunFailedError
from torchreid_snloss.compare.search import search_space
from torchreid_snloss.compare.tuning import Tuning
from torchreid_snloss.compare.variants import Variant
from torchreid_snloss.config import ConfigError
from torchreid_snloss.evaluation import Ranking
from torchreid_snloss.losses import Interval
from torchreid_snloss.record import Features, Recorder

pytest.importorskip("optuna")

PLACE = Place({}, True, lambda: 0)
COMPARE = ("-m", "torchreid_snloss.compare")
VARIANTS = """
mild:
  loss.name: hap2s
  search: {train.lr: {low: 1e-4, high: 1e-2, log: true}, loss.hap2s.margin: [0.1, 0.3, null]}
"""


def _arguments(root: Path, folder: Path, trials: int = 3, folds: int = 1) -> list[str]:
    (folder / "trial.yaml").write_text(VARIANTS)
    flags = ["--variants", "trial.yaml", "--baselines", "control", "--seeds", "1", "--tune", str(trials)]
    flags += ["--folds", str(folds)]
    data = ["--root", str(root), "-s", "market1501", "-t", "market1501"]
    own = ("data.val_fraction", 0.25, "data.save_dir", "log", "train.max_epoch", 3, "test.eval_freq", 1)
    return ["--config-file", str(ROOT / "configs/small.yaml"), *data, *flags, *process_options(*own)]


def _tuned(folder: Path, trials: int = 3) -> list[dict[str, Any]]:
    content = json.loads((folder / f"log/compare/plain/tuned-{trials}/results.json").read_text())
    return list(content["tuning"])


@pytest.fixture(scope="module")
def tuned(reid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which a control and a variant were tuned with 3 trials each, and what was printed."""
    folder = tmp_path_factory.mktemp("tuned")
    done = run(*COMPARE, *_arguments(reid_data, folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.compare
def test_each_variant_has_its_trials_and_runs_with_the_best(tuned: tuple[Path, str], reid_data: Path) -> None:
    folder, out = tuned
    control, mild = _tuned(folder)
    assert [part["variant"] for part in (control, mild)] == ["control", "mild"]
    assert set(control["trials"][0]["values"]) == {"train.lr"}
    assert set(mild["trials"][0]["values"]) == {"train.lr", "loss.hap2s.margin"}
    for part in (control, mild):
        assert [trial["number"] for trial in part["trials"]] == [0, 1, 2]
        assert part["trials"][0]["values"]["train.lr"] == 0.0015  # the config's own
        ended = [trial for trial in part["trials"] if trial["state"] == "finished"]
        best = max(ended, key=lambda trial: trial["curve"]["3"])
        found = folder / "log/compare/plain/tuning" / part["variant"] / "best-of-3.yaml"
        config, settings = (
            load_config(str(path))
            for path in (found, folder / "log/compare/plain/tuned-3" / part["variant"] / "seed-1/settings.yaml")
        )
        for key, value in best["values"].items():
            section, name = key.rsplit(".", 1)
            for cfg in (config, settings):
                node = cfg
                for part_of_key in section.split("."):
                    node = node[part_of_key]
                assert node[name] == value
        assert config.data.val_fraction == settings.data.val_fraction == 0  # all identities are trained on
    # The config runs as it is.
    done = run(
        *("-m", "torchreid_snloss", "--config-file", str(found), "train.max_epoch", "1", "data.save_dir", "own"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob("trial-*/model"))
    logs = [path.read_text() for path in folder.glob("log/compare/plain/tuning/*/trial-*/train.log-*")]
    assert logs
    assert all(set(re.findall(r"Evaluating (\S+)", log)) == {"validation"} for log in logs)
    report = (folder / "log/compare/plain/tuned-3/report.html").read_text()
    for part in (control, mild):
        assert f"<summary>All 3 trials of {part['variant']}</summary>" in report
        best = max((t for t in part["trials"] if t["state"] == "finished"), key=lambda trial: trial["curve"]["3"])
        assert all(f">{key} {value}</code>" in report for key, value in best["values"].items())
    assert out.count("on the held-out identities") + out.count("ended early") >= 6


@pytest.mark.compare
def test_a_tuning_that_was_interrupted_makes_the_same_trials(
    tuned: tuple[Path, str], reid_data: Path, tmp_path: Path
) -> None:
    process = start(*COMPARE, *_arguments(reid_data, tmp_path), cwd=tmp_path)
    second = tmp_path / "log/compare/plain/tuning/mild/trial-1"
    errors = interrupt_at(process, second, "epoch: [1/3][", 200)
    assert "the tuning was interrupted; repeat the command to resume" in errors
    done = run(*COMPARE, *_arguments(reid_data, tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mild, trial 0 (1 of 3):" not in done.stdout
    assert "mild, trial 1 (2 of 3):" in done.stdout
    assert _tuned(tmp_path) == _tuned(tuned[0])


@pytest.mark.compare
def test_a_tuning_with_folds_that_was_interrupted_goes_on_in_its_fold(reid_data: Path, tmp_path: Path) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for folder in (whole, interrupted):
        folder.mkdir()
    done = run(*COMPARE, *_arguments(reid_data, whole, 2, folds=2), cwd=whole)
    assert done.returncode == 0, done.stderr
    process = start(*COMPARE, *_arguments(reid_data, interrupted, 2, folds=2), cwd=interrupted)
    trial = interrupted / "log/compare/plain/tuning/mild/trial-0"
    errors = interrupt_at(process, trial / "fold-1", "epoch: [1/3][", 200)
    assert "the tuning was interrupted; repeat the command to resume" in errors
    first = (trial / "fold-0/record/record.json").stat().st_mtime_ns
    done = run(*COMPARE, *_arguments(reid_data, interrupted, 2, folds=2), cwd=interrupted)
    assert done.returncode == 0, done.stderr
    assert (trial / "fold-0/record/record.json").stat().st_mtime_ns == first
    assert _tuned(interrupted, 2) == _tuned(whole, 2)
    assert [part["folds"] for part in _tuned(whole, 2)] == [2, 2]
    assert not list(tmp_path.rglob("fold-*/model"))
    held_out = []
    for fold in (0, 1):
        (log,) = (whole / f"log/compare/plain/tuning/mild/trial-0/fold-{fold}").glob("train.log-*")
        assert "4 of 16 training identities are held out" in log.read_text()
        record = np.load(log.parent / "record/validation-after.npz")
        held_out.append({Path(path).name[:4] for path in record["query_paths"]})
    assert not held_out[0] & held_out[1]
    found = load_config(str(whole / "log/compare/plain/tuning/mild/best-of-2.yaml"))
    assert (found.data.val_fraction, found.data.val_fold) == (0, 0)


@pytest.mark.compare
def test_the_test_set_does_not_change_what_is_chosen(tuned: tuple[Path, str], reid_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "poisoned"
    shutil.copytree(reid_data, root)
    for folder in ("query", "bounding_box_test"):
        (images,) = root.rglob(folder)
        for number, path in enumerate(sorted(images.glob("*.jpg"))):  # the people of the test set become two
            camera = re.search(r"_c(\d)", path.name)[1]  # type: ignore[index]
            path.rename(images / f"{1499 + number % 2}_c{camera}s1_{number:06}_00.jpg")
    done = run(*COMPARE, *_arguments(root, tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _tuned(tmp_path) == _tuned(tuned[0])
    poisoned, plain = (
        [run["mAP"] for run in json.loads((place / "log/compare/plain/tuned-3/results.json").read_text())["runs"]]
        for place in (tmp_path, tuned[0])
    )
    assert all(one != other for one, other in zip(poisoned, plain, strict=True))


def _tuning(folder: Path, variant: Variant, folds: int = 1, trials: int = 3) -> Tuning:
    flags = ["--tune", str(trials), "--folds", str(folds), "data.val_fraction", "0.25", "data.save_dir", str(folder)]
    return Tuning(_plan(_parser().parse_args(flags)), variant, 0)


def test_what_is_searched(tmp_path: Path) -> None:
    sn = _tuning(tmp_path, Variant("sn", {"loss.name": "sn", "loss.sn.scale": 20})).space
    assert sn["train.lr"] == Interval(0.00006, 0.0015, log=True)
    assert sn["loss.sn.weight_m"] == Interval(0.01, 0.5, log=True)
    assert "loss.sn.scale" not in sn  # the variant sets it
    assert {"loss.sn.num_neighbors", "loss.sn.squeeze_weight"} < set(sn)
    polynomial = {"loss.name": "hap2s", "loss.hap2s.weighting": "polynomial"}
    weights = _tuning(tmp_path, Variant("polynomial", polynomial)).space
    assert {key for key in weights if key.startswith("loss.hap2s")} == {
        f"loss.hap2s.{key}" for key in ("alpha", "margin", "weight_m")
    }
    alone = _tuning(tmp_path, Variant("alone", {"loss.name": "triplet"})).space
    assert set(alone) == {"train.lr"}  # a weight beside nothing changes nothing but the learning rate
    off = {"loss.name": "hap2s+sn", "loss.hap2s.weight_m": 0}
    assert not [key for key in _tuning(tmp_path, Variant("off", off)).space if key.startswith("loss.hap2s")]
    own = Variant("own", {"loss.name": "sn"}, {"loss.sn.num_neighbors": Interval(2, 8)})
    assert _tuning(tmp_path, own).space == {"loss.sn.num_neighbors": Interval(2, 10)}  # with the config's own value


def test_a_search_space_with_a_wrong_value_is_refused(tmp_path: Path) -> None:
    for search, message in (
        ({"loss.sn.scale": Interval(-3, 2)}, "own: search: loss.sn: scale must be greater than 0"),
        ({"loss.sn.squeeze": ("support", "none")}, "own: search: loss.sn: squeeze must be one of"),
        ({"loss.sn.num_neighbors": Interval(0.5, 20, log=True)}, "num_neighbors needs whole numbers as ends, got 0.5"),
        ({"loss.sn.scales": (1, 2)}, "own: search: unknown config key 'loss.sn.scales', did you mean loss.sn.scale"),
    ):
        with pytest.raises(ValueError, match=message):
            _tuning(tmp_path, Variant("own", {"loss.name": "sn"}, search))


def test_a_trial_that_was_interrupted_before_it_had_values_gets_the_same(tmp_path: Path) -> None:
    variant, values = Variant("sn", {"loss.name": "sn"}), []
    for folder, is_interrupted in (("whole", False), ("interrupted", True)):
        tuning = _tuning(tmp_path / folder, variant)
        tuning._open()
        for _ in range(2):
            trial = tuning._next()
            if is_interrupted:
                tuning = _tuning(tmp_path / folder, variant)
                trial = tuning._next()
            values.append({key: tuning._suggest(trial, key) for key in tuning.space})
            tuning._study.tell(trial, 0.5)
    assert values[:2] == values[2:]


def test_the_draws_are_the_same_for_all_rows_and_differ_between_splits(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in "ab"]
    for root in roots:
        root.mkdir()
    flags = ["--tune", "3", "--roots", *map(str, roots), "--"]
    flags += ["data.val_fraction", "0.25", "data.save_dir", str(tmp_path)]
    plan = _plan(_parser().parse_args(flags))
    drawn = []
    for loss, split in (("sn", 1), ("sn", 2), ("fidi", 1)):
        tuning = Tuning(plan, Variant(loss, {"loss.name": loss}), split)
        tuning._open()
        rates = []
        for number in range(3):
            rates.append(tuning._suggest(trial := tuning._next(), "train.lr"))
            tuning._study.tell(trial, number / 10)
        drawn.append(rates)
    assert drawn[0] == drawn[2]
    assert drawn[0][0] == drawn[1][0]  # the config's own
    assert not set(drawn[0][1:]) & set(drawn[1][1:])


def test_trials_with_other_settings_and_damaged_journals_are_named(tmp_path: Path) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    first = _tuning(tmp_path, variant)
    first._open()
    _tuning(tmp_path, variant)
    _tuning(tmp_path, Variant("own", {"loss.name": "sn", "loss.fidi.beta": 2}))  # which SN does not use
    with pytest.raises(ValueError, match=r"holds trials with other settings \(loss\.name was sn, is fidi"):
        _tuning(tmp_path, Variant("own", {"loss.name": "fidi"}))
    journal = tmp_path / "compare/plain/tuning/own/journal.log"
    journal.write_text("{]\n" + journal.read_text())
    with pytest.raises(ValueError, match=r"the journal of a tuning, '.*', is damaged: .*; remove this file, and"):
        _tuning(tmp_path, variant)


def test_only_what_is_drawn_from_an_interval_has_fewer_digits(tmp_path: Path) -> None:
    options = {"loss.name": "sn", "loss.sn.scale": 9.876543, "loss.sn.squeeze_weight": 0.1234567}
    space = {"loss.sn.scale": Interval(3, 50, log=True), "loss.sn.squeeze_weight": (0.1234567, 0.7654321)}
    tuning = _tuning(tmp_path, Variant("own", options, space))
    tuning._open()
    tried = []
    for number in range(6):
        trial = tuning._next()
        tried.append({key: tuning._suggest(trial, key) for key in tuning.space})
        tuning._study.tell(trial, number / 10)
    assert tried[0] == {"loss.sn.scale": 9.876543, "loss.sn.squeeze_weight": 0.1234567}
    assert {values["loss.sn.squeeze_weight"] for values in tried} == {0.1234567, 0.7654321}
    assert all(values["loss.sn.scale"] == float(f"{values['loss.sn.scale']:.4g}") for values in tried[1:])
    assert [trial.values for trial in tuning.trials] == tried[:3]  # those that are judged and written down


def test_trials_on_other_images_are_named(tmp_path: Path) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    plan = _tuning(tmp_path, variant)._plan
    Tuning(plan, variant, 0, "abc")._open()
    Tuning(plan, variant, 0, "abc")
    with pytest.raises(ConfigError, match=r"\(the images were others than those of data\.root reid-data\)"):
        Tuning(plan, variant, 0, "def")
    old = Variant("old", {"loss.name": "sn"})  # as an earlier version left it
    Tuning(plan, old, 0)._open()
    Tuning(plan, old, 0, "abc")


def test_trials_with_other_values_or_another_space_are_named(tmp_path: Path) -> None:
    options = {"loss.name": "hap2s"}
    _tuning(tmp_path, Variant("own", options, {"loss.hap2s.margin": (0.1, 0.3)}))._open()
    with pytest.raises(ConfigError, match=r"\(loss\.hap2s\.margin was 0\.3, is 0\.1\)"):
        _tuning(tmp_path, Variant("own", {**options, "loss.hap2s.margin": 0.1}, {"loss.hap2s.margin": (0.1, 0.3)}))
    with pytest.raises(ConfigError, match=r"\(search loss\.hap2s\.sigma was None, is \(0\.5, 1\.0\)\)"):
        _tuning(tmp_path, Variant("own", options, {"loss.hap2s.margin": (0.1, 0.3), "loss.hap2s.sigma": (0.5, 1.0)}))


def test_the_first_trial_has_the_configs_own_values(tmp_path: Path) -> None:
    settings = _tuning(tmp_path, Variant("sn", {"loss.name": "sn", "loss.sn.squeeze_weight": 0.0}))._default
    space = search_space(Variant("sn", {"loss.name": "sn"}), settings)
    assert "loss.sn.squeeze_weight" not in space  # no logarithmic scale has a 0
    assert "loss.sn.scale" in space
    options = {"loss.name": "hap2s", "loss.hap2s.margin": None}
    with pytest.raises(ConfigError, match=r"own: search: loss\.hap2s\.margin is None in the config, which the first"):
        _tuning(tmp_path, Variant("own", options, {"loss.hap2s.margin": Interval(0.1, 0.5)}))


def test_the_space_is_extended_to_the_configs_own_value(tmp_path: Path) -> None:
    settings = _tuning(tmp_path, Variant("sn", {"loss.name": "sn", "loss.sn.scale": 500}))._default
    space = search_space(Variant("sn", {"loss.name": "sn"}), settings)
    assert space["loss.sn.scale"].high == 500  # type: ignore[union-attr]


def test_a_journal_whose_last_line_was_cut_off_goes_on(tmp_path: Path) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    first = _tuning(tmp_path, variant)
    first._open()
    for _ in range(2):
        trial = first._next()
        values = {key: first._suggest(trial, key) for key in first.space}
    journal = tmp_path / "compare/plain/tuning/own/journal.log"
    complete = journal.read_bytes()
    for cut in (20, 2000):
        journal.write_bytes(complete[:-cut])
        again = _tuning(tmp_path, variant)
        assert journal.read_bytes().endswith(b"}\n")
        assert again.trials
        again._taken.add(0)
        trial = again._next()
        assert trial.number == 1
        assert {key: again._suggest(trial, key) for key in again.space}.keys() == values.keys()


def test_the_lock_of_a_process_that_was_killed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variant = Variant("own", {"loss.name": "sn"})
    _tuning(Path("log"), variant)._open()
    lock = Path("log/compare/plain/tuning/own/journal.log.lock")
    lock.symlink_to("log/compare/plain/tuning/own/journal.log")  # relative to another folder, as Optuna makes it
    began = time.monotonic()
    _tuning(Path("log"), variant)
    assert time.monotonic() - began < 20
    assert not lock.is_symlink()


def test_a_row_without_anything_to_try_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fixed: --tune has nothing to try"):
        _tuning(tmp_path, Variant("fixed", {"loss.name": "softmax", "train.lr": 0.01}))


def test_values_that_do_not_fit_together_are_a_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = _tuning(tmp_path, Variant("own", {"loss.name": "sn"}))
    tuning._open()

    def refuse(*_: Any) -> None:
        raise ConfigError("batch_size must be a multiple of num_instances")

    monkeypatch.setattr(Plan, "trial", refuse)
    assert tuning.execute(PLACE) == 0
    assert [trial.state for trial in tuning.trials] == ["failed"]
    assert tuning.left == 2
    assert "own, trial 0 (1 of 3): failed, batch_size must be a multiple" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="the program is a script of sh")
def test_a_trial_below_the_median_of_the_earlier_ones_is_ended_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    tuning = _tuning(tmp_path, variant)
    tuning._open()
    for _ in range(2):
        trial = tuning._next()
        for key in tuning.space:
            tuning._suggest(trial, key)
        trial.report(0.9, 20)  # the pruner waits for a quarter of 60 epochs
        tuning._study.tell(trial, 0.9)
    features = Features(np.zeros((2, 4), np.float32), np.arange(2), np.arange(2), np.array(["a", "b"]))
    ranking = Ranking(np.ones(2, np.float32), 0.2, 0.2, np.full(2, 0.2))
    Recorder(tmp_path / "made").add_evaluation(20, "validation", ranking, features, features)
    program = tmp_path / "python"  # a run that is evaluated, and then trains on for a minute
    record = tmp_path / "compare/plain/tuning/own/trial-2/record"
    program.write_text(f"#!/bin/sh\ncp -r {tmp_path / 'made'} {record}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    began = time.monotonic()
    assert tuning.execute(PLACE) == 0
    assert time.monotonic() - began < 30
    assert "own, trial 2 (3 of 3): below the median, ended early" in capsys.readouterr().out
    for found in (tuning, _tuning(tmp_path, variant)):
        assert [trial.state for trial in found.trials] == ["finished", "finished", "pruned"]
        assert found.trials[2].curve == {20: 0.2}
        assert found.best.number == 0
        assert found.left == 0


def test_trials_go_on_with_another_test_set_and_not_with_other_people(reid_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(reid_data, root)
    options = ["data.val_fraction", "0.25", "data.workers", "0", "use_gpu", "False"]
    flags = ["--root", str(root), "--tune", "3", "--", *options]
    plan = _plan(_parser().parse_args(flags))
    sn = Variant("sn", {"loss.name": "sn"})

    def digests() -> tuple[str, str]:
        digest = images_digests()
        trial = plan.trial(sn, 0, 0, {}).settings
        return digest(trial), digest(next(run.settings for run in plan.runs() if run.variant == "sn"))

    before = digests()
    next(root.rglob("query/*.jpg")).unlink()
    after = digests()
    assert after[0] == before[0]
    assert after[1] != before[1]
    next(root.rglob("bounding_box_train/*.jpg")).unlink()
    assert digests()[0] != before[0]


def test_a_config_that_changes_meanwhile_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {max_epoch: 10}")
    flags = ["--config-file", str(path), "--tune", "2", "--label-noise", "0.1", "data.val_fraction", "0.25"]
    plan = _plan(_parser().parse_args(flags))
    variant = plan.variants[0]
    path.write_text("train: {max_epoch: 60}")
    assert plan.trial(variant, 0, 1, {}).settings.max_epoch == 10
    assert {run.settings.max_epoch for run in plan.runs()} == {10}
    path.unlink()
    assert plan.trial(variant, 0, 1, {}).settings.max_epoch == 10
    assert _unchanged(plan, plan.runs(), lambda settings: "") == []


def test_a_journal_that_can_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "compare/plain/tuning/own/journal.log").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"can't use the journal of a tuning, .*: .*Is a directory"):
        _tuning(tmp_path, Variant("own", {"loss.name": "sn"}))


@pytest.mark.parametrize(
    ("log", "code", "failed"),
    [
        ("epoch: 1\nerror: after 1 epochs 3 weights are not finite, a among them, and not saved\n", 1, True),
        ("epoch: 1\nTraceback\nerror: ValueError: no pairs\n", 1, True),
        ("epoch: 1\nerror: can't write the checkpoint 'x': [Errno 28] No space left on device\n", 1, False),
        ("epoch: 1\nerror: can't read the image 'x'\n", 1, False),
        ("epoch: 1\nerror: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", 1, False),
        ("epoch: 1\nerror: MemoryError\n", 1, False),
        ("epoch: 1\nerror: ConnectionResetError: [Errno 104] Connection reset by peer\n", 1, False),
        ("epoch: 1\nerror: RuntimeError: unable to write to file </torch_1>: No space left on device (28)\n", 1, False),
        ("epoch: 1\nerror: PermissionError: [Errno 13] Permission denied: 'x'\n", 1, False),
        ("epoch: 1\nerror: AcceleratorError: CUDA error: an illegal memory access was encountered\n", 1, False),
        ("error: train.batch_size 64 and the train.lr 0.1 of this trial do not fit\n", 2, True),
        ("error: data.save_dir 'log' can't be written to: [Errno 28] No space left on device\n", 2, False),
        ("epoch: 1\n", 1, False),  # there was no room for the line
    ],
)
def test_a_trial_that_lacked_room_is_made_again(
    log: str, code: int, failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = _tuning(tmp_path, Variant("own", {"loss.name": "sn"}))

    def fail(run: Run, *_: Any) -> int:
        run.folder.mkdir(parents=True)
        (run.folder / "settings.yaml").touch()
        (run.folder / "train.log-1").write_text(log)
        return code

    monkeypatch.setattr(Run, "execute", fail)
    tuning._open()
    first = tuning._next()
    for key in tuning.space:
        tuning._suggest(first, key)
    if failed:
        assert tuning.execute(PLACE) == 0
    else:
        with pytest.raises(RunFailedError, match=r"^own, trial 1 failed: .*; its log is .*train\.log-1$"):
            tuning.execute(PLACE)
    assert [trial.state for trial in tuning.trials] == ["running", "failed" if failed else "running"]


def _train_with(mean_aps: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets a run record this mAP after its last epoch, by its folder's name. Returns those that were made."""
    made: list[str] = []
    features = Features(np.zeros((2, 4), np.float32), np.arange(2), np.arange(2), np.array(["a", "b"]))

    def train(run: Run, place: Place, may_go_on: Callable[[], bool]) -> int:
        name = "/".join(run.folder.parts[-2:])
        if name not in mean_aps:
            return 130  # interrupted
        made.append(name)
        (run.folder / "model").mkdir(parents=True)
        (run.folder / "settings.yaml").write_text(run.settings.cfg_text)
        ranking = Ranking(np.ones(2, np.float32), mean_aps[name], 0.2, np.full(2, 0.2))
        Recorder(run.folder / "record").add_evaluation(
            run.settings.max_epoch, "validation", ranking, features, features
        )
        may_go_on()
        return 0

    monkeypatch.setattr(Run, "execute", train)
    return made


def test_a_trial_is_judged_by_the_mean_over_its_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    # The first one is best in its first fold, and the second one over all.
    mean_aps = {
        **{"trial-0/fold-0": 0.7, "trial-0/fold-1": 0.3, "trial-0/fold-2": 0.2},
        **{"trial-1/fold-0": 0.6, "trial-1/fold-1": 0.5},
    }
    made = _train_with(mean_aps, monkeypatch)
    tuning = _tuning(tmp_path, variant, folds=3)
    assert tuning.execute(PLACE) == 0
    assert "own, trial 0 (1 of 3): mAP 40.0% (70.0, 30.0, 20.0) on the held-out identities" in capsys.readouterr().out
    assert tuning.execute(PLACE) == 130
    assert made == [*mean_aps]
    assert [trial.state for trial in tuning.trials] == ["finished", "running"]

    mean_aps["trial-1/fold-2"] = 0.4
    tuning = _tuning(tmp_path, variant, folds=3)
    assert tuning.execute(PLACE) == 0
    assert made == [*mean_aps]  # those that were finished are not made again
    assert "own, trial 1 (2 of 3): mAP 50.0% (60.0, 50.0, 40.0) on the held-out" in capsys.readouterr().out
    for found in (tuning, _tuning(tmp_path, variant, folds=3)):
        assert found.best.number == 1
        assert [trial.mean_ap for trial in found.trials] == pytest.approx([0.4, 0.5])
        assert found.trials[1].curve == pytest.approx({60: 0.6, 120: 0.55, 180: 0.5})
        assert found.left == 1
    assert not list(tmp_path.rglob("model"))


def test_a_trial_ends_early_by_the_mean_over_the_same_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The people of the first fold are easier than the others, for all trials.
    rows = [(0.8, 0.4, 0.4), (0.8, 0.4, 0.4), (0.81, 0.41, 0.3), (0.81, 0.3, 0.9), (0.7, 0.9, 0.9)]
    mean_aps = {f"trial-{n}/fold-{fold}": value for n, row in enumerate(rows) for fold, value in enumerate(row)}
    made = _train_with(mean_aps, monkeypatch)
    tuning = _tuning(tmp_path, Variant("own", {"loss.name": "sn"}), folds=3, trials=len(rows))
    for _ in rows:
        assert tuning.execute(PLACE) == 0
    trials = tuning.trials
    assert [trial.state for trial in trials] == ["finished"] * 3 + ["pruned"] * 2  # not at the end of a last fold
    assert [trial.mean_ap for trial in trials] == pytest.approx([1.6 / 3, 1.6 / 3, 1.52 / 3, 1.11 / 2, 0.7])
    assert made == [name for name in mean_aps if name not in ("trial-3/fold-2", "trial-4/fold-1", "trial-4/fold-2")]
    assert capsys.readouterr().out.count("below the median, ended early") == 2
    assert not list(tmp_path.rglob("model"))


def test_trials_with_other_folds_are_named(tmp_path: Path) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    _tuning(tmp_path / "two", variant, folds=2)._open()
    _tuning(tmp_path / "two", variant, folds=2)
    with pytest.raises(ConfigError, match=r"holds trials with other settings \(folds was 2, is 1\)"):
        _tuning(tmp_path / "two", variant)
    _tuning(tmp_path / "old", variant)._open()
    journal = tmp_path / "old/compare/plain/tuning/own/journal.log"
    text = re.sub(r'"(folds|data\.val_fold)": ?\d,? ?', "", journal.read_text())  # as an earlier version left it
    journal.write_text(re.sub(r", ?}", "}", text))
    assert not re.search(r"folds|val_fold", journal.read_text())
    _tuning(tmp_path / "old", variant)
    with pytest.raises(ConfigError, match=r"\(folds was 1, is 2\)"):
        _tuning(tmp_path / "old", variant, folds=2)


def test_without_folds_a_trial_has_the_folder_that_it_always_had(tmp_path: Path) -> None:
    variant = Variant("own", {"loss.name": "sn"})
    folders = {
        folds: [
            str(_tuning(tmp_path, variant, folds)._plan.trial(variant, 0, 4, {}, fold).folder.relative_to(tmp_path))
            for fold in range(folds)
        ]
        for folds in (1, 2)
    }
    trial = "compare/plain/tuning/own/trial-4"
    assert folders == {1: [trial], 2: [f"{trial}/fold-0", f"{trial}/fold-1"]}
