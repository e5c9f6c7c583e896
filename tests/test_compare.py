"""`torchreid-snloss-compare` as a user runs it, and its report."""

from __future__ import annotations

import csv
import html.parser
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, interrupt_at, process_options, record_run, run, start, wait_for
from PIL import Image

from torchreid_snloss import get_default_config, resolve
from torchreid_snloss.compare import main
from torchreid_snloss.compare.command import _parser, _plan
from torchreid_snloss.compare.export import write_csv, write_json
from torchreid_snloss.compare.page import write_page
from torchreid_snloss.compare.ranked import average_precisions
from torchreid_snloss.compare.results import Results
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.evaluation import Ranking, nearest_gallery
from torchreid_snloss.record import RecordError, read_features, read_record


def _arguments(reid_data: Path, *options: str, flags: tuple[str, ...] = ("--seeds", "1")) -> list[str]:
    config = str(ROOT / "configs/small.yaml")
    own = process_options("train.max_epoch", 6, "data.save_dir", "log", *options)
    data = ["--root", str(reid_data), "-s", "market1501", "-t", "market1501"]
    return ["--config-file", config, *data, "--losses", "softmax", "sn", "--baselines", "softmax", *flags, *own]


COMPARE = ("-m", "torchreid_snloss.compare")


@pytest.fixture(scope="module")
def compared(
    reid_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which a comparison was run, and the process with its output."""
    folder = tmp_path_factory.mktemp("compared")
    done = run(*COMPARE, *_arguments(reid_data), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def _final(log: str) -> list[str]:
    """The results that torchreid printed for the last evaluation, in the table's order: mAP, mINP, rank-1, 5, 10."""
    last = log[log.rindex("** Results **") :]
    names = ("mAP", "mINP", "Rank-1 ", "Rank-5 ", "Rank-10")
    return [re.search(rf"{name} *: ([\d.]+)%", last)[1] for name in names]  # type: ignore[index]


@pytest.mark.compare
def test_the_table_is_what_torchreid_printed(compared: tuple[Path, Any]) -> None:
    folder, done = compared
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    header, _, *rows = rows
    names = ["mAP", "mINP", "rank-1", "rank-5", "rank-10"]
    columns = ["dataset", "variant", "trained with", "seeds", "mAP", "mAP - softmax", *names[1:], "s/epoch", "peak MiB"]
    assert header == columns
    assert [row[:4] for row in rows] == [
        ["market1501", "softmax", "softmax, random batches", "1"],
        ["market1501", "sn", "sn x 0.1 + softmax", "1"],
    ]
    differences = [row.pop(5) for row in rows]
    compare = folder / "log/compare/plain"
    with open(compare / "results.csv") as file:
        table = list(csv.DictReader(file))
    runs = json.loads((compare / "results.json").read_text())["runs"]
    for row, line, one in zip(rows, table, runs):
        loss = row[1]
        (log,) = (compare / loss / "seed-1").glob("train.log-*")
        printed = _final(log.read_text())
        assert row[4:9] == printed
        assert [f"{float(line[name]):.1f}" for name in names] == printed
        assert [f"{100 * one[name]:.1f}" for name in ("mAP", "mINP")] == printed[:2]
        assert (one["variant"], one["seed"], line["seeds"], line["mAP sd"]) == (loss, 1, "1", "")
        assert 0 < float(row[9]) < 60
        assert 100 < float(row[10]) < 8000
    mean, low, high = (float(text) for text in re.findall(r"[-+][\d.]+", differences[1]))
    assert differences[0] == ""
    assert low < mean < high
    assert mean == pytest.approx(100 * (runs[1]["mAP"] - runs[0]["mAP"]), abs=0.06)
    verdict = "no difference shown" if low <= 0 <= high else "ahead" if mean > 0 else "behind"
    assert f"market1501: sn, mAP - softmax: {differences[1]}, {verdict} (one seed: " in done.stdout


@pytest.fixture
def recorded_runs(tmp_path: Path) -> list[Run]:
    """Runs as training leaves them: two losses with two seeds, evaluated on two test sets whose names are markup."""
    image = tmp_path / "<i>0001_c1.jpg"
    Image.new("RGB", (64, 128)).save(image)
    runs = []
    for loss, level in (("softmax", 0.4), ("sn", 0.6)):
        for seed in (1, 2):
            mean_ap = level + seed / 100
            curve = np.linspace(level, 1, 12, dtype=np.float32)
            ranking = Ranking(curve, mean_ap, level / 2, np.full(12, mean_ap))
            options = ("data.targets", ["<b>one", "two&amp;"], "loss.name", loss, "train.seed", seed)
            folder = tmp_path / loss / str(seed)
            runs.append(record_run(folder, loss, image, *options, evaluate=lambda *_, ranking=ranking: ranking))
    return runs


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no < in file names")
def test_the_report_escapes_names_and_paths(recorded_runs: list[Run], tmp_path: Path) -> None:
    command = "torchreid-snloss-compare --root '<u>' \udcff"  # and a byte of a path that is no UTF-8
    write_page(Results.of(recorded_runs), recorded_runs, tmp_path / "report.html", command, "pca")
    parsed = _Tags()
    parsed.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"b", "i", "u"} & {tag for tag, _ in parsed.tags}
    assert parsed.texts.count("softmax, sn on <b>one, two&amp;") == 2  # title and heading
    assert "torchreid-snloss-compare --root '<u>' ?" in parsed.texts
    assert {attrs["title"] for tag, attrs in parsed.tags if tag == "img"} == {"<i>0001_c1.jpg"}


def test_the_reports_table_names_the_test_sets_and_where_training_began(
    recorded_runs: list[Run], tmp_path: Path
) -> None:
    write_page(Results.of(recorded_runs), recorded_runs, tmp_path / "report.html", "", "pca")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = re.search(r"<table>.*?</table>", text, re.DOTALL)[0]  # type: ignore[index]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", table, re.DOTALL)[1:]
    names = [re.search(r"<th.*?>(.*?)<", row)[1] for row in rows]  # type: ignore[index]
    of_set = ["before training", "softmax", "sn"]
    assert names == ["&lt;b&gt;one", *of_set, "two&amp;amp;", *of_set]
    cells = [re.findall(r"<td.*?>(.*?)</td>", row) for row in rows]
    # By 0.6 + seed / 100 they are 0.61 and 0.62. The evaluations before training are the same here, and averaged.
    numbers = ["61.5 ± 0.7", "30.0 ± 0.0", "60.0 ± 0.0", "74.5 ± 0.0", "92.7 ± 0.0"]
    assert [cells[3][1], *cells[3][3:7]] == [cells[7][1], *cells[7][3:7]] == numbers
    assert (
        cells[1] == cells[5] == ["2", "51.5 ± 0.7", "", "25.0 ± 0.0", "50.0 ± 0.0", "68.2 ± 0.0", "90.9 ± 0.0", "", ""]
    )
    assert "the networks of all rows, mAP 41.5 to 61.5" in table


def test_results_as_files(recorded_runs: list[Run], tmp_path: Path) -> None:
    results = Results.of(recorded_runs, unchanged=recorded_runs)
    write_csv(results, tmp_path / "results.csv")
    write_json(results, tmp_path / "results.json")
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["dataset"], line["variant"], line["seeds"]) for line in lines] == [
        ("<b>one", "softmax", "2"), ("<b>one", "sn", "2"), ("two&amp;", "softmax", "2"), ("two&amp;", "sn", "2"),
    ]  # fmt: skip
    line = lines[1]
    assert (line["mAP"], line["mAP sd"], line["s/epoch"], line["mAP lost"]) == ("61.5", "0.707107", "3.5", "0")
    content = json.loads((tmp_path / "results.json").read_text())
    figure = content["table"][1]["figures"]["mAP"]
    assert (round(figure["mean"], 6), round(figure["spread"], 6), figure["digits"]) == (61.5, 0.707107, 1)
    assert [(one["variant"], one["seed"], one["dataset"]) for one in content["runs"]][:2] == [
        ("softmax", 1, "<b>one"), ("softmax", 1, "two&amp;"),
    ]  # fmt: skip


def test_average_precisions_of_a_run_whose_record_has_none(recorded_runs: list[Run]) -> None:
    """Records of 0.2 have features only."""
    run = recorded_runs[0]
    pids, kept = run.average_precisions("<b>one")
    np.testing.assert_allclose((pids, kept), (np.arange(12) % 4, np.full(12, 0.41)))
    path = run.folder / "record/<b>one-after.npz"
    arrays = dict(np.load(path))
    # Every feature is that of its identity, so all matches come first.
    level = {f"{split}_features": np.eye(4, 8, dtype=np.float32)[pids] for split in ("query", "gallery")}
    del arrays["average_precisions"]
    np.savez(path, **{**arrays, **level})
    pids, computed = run.average_precisions("<b>one")
    np.testing.assert_array_equal((pids, computed), (np.arange(12) % 4, np.ones(12)))
    cfg = get_default_config()
    cfg.data.save_dir, cfg.test.rerank_in_training = str(run.folder), True
    drawn = np.random.default_rng(0)
    level = {f"{split}_features": drawn.normal(size=(12, 8)).astype(np.float32) for split in ("query", "gallery")}
    np.savez(path, **{**arrays, **level})
    _, computed = Run(run.variant, resolve(cfg)).average_precisions("<b>one")
    features = run.features("<b>one", after=True)
    np.testing.assert_array_equal(computed, average_precisions(*features, "euclidean", rerank=True))
    assert not np.array_equal(computed, average_precisions(*features, "euclidean"))


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.mark.compare
def test_the_report_is_one_file_with_everything(compared: tuple[Path, Any]) -> None:
    folder, _ = compared
    text = (folder / "log/compare/plain/report.html").read_text()
    parsed = _Tags()
    parsed.feed(text)
    sections = ["Results", "Learning", "CMC", "Distances", "Map of test features", "Ranked lists", "How this was made"]
    assert [name for name in parsed.texts if name in sections] == 2 * sections  # the contents, and the headings
    assert {f"torch {torch.__version__}", f"Python {platform.python_version()}"} <= {
        part for text in parsed.texts for part in text.split(", ")
    }
    # Nothing is loaded from elsewhere.
    links = [value for _, attrs in parsed.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert links
    beside = {link for link in links if not str(link).startswith(("data:", "#"))}
    assert beside == {"results.csv", "results.json"}
    assert all((folder / "log/compare/plain" / str(name)).is_file() for name in beside)
    # Seeds, a forest plot, two learning curves, two of terms, CMC, two histograms, a map before and two after.
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 1 + 1 + 2 + 2 + 1 + 2 + 3
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    # 8 queries, each with a list of 10 images for both losses. Right are those images that show the query's person.
    queries = re.findall(r'<article class="query".*?</article>', text, re.DOTALL)
    assert len(queries) == 8
    marked = []
    for query in queries:
        query_image, *shown = re.findall(r'title="(\d+)_c(\d)', query)
        marks = re.findall(r'<li class="(right|wrong)">', query)
        assert marks == ["right" if image[0] == query_image[0] else "wrong" for image in shown]
        assert query_image not in shown  # no image of its identity from its own camera
        marked += marks
    assert len(marked) == 8 * 2 * 10
    assert set(marked) == {"right", "wrong"}


@pytest.mark.compare
def test_the_ranked_lists_are_those_of_the_evaluation(compared: tuple[Path, Any]) -> None:
    folder, _ = compared
    for loss in ("softmax", "sn"):
        record = folder / "log/compare/plain" / loss / "seed-1/record"
        evaluations = read_record(record).evaluations["market1501"]
        assert sorted(evaluations) == [0, 2, 4, 6]  # before training, and at most five times during it
        for epoch, after in ((0, False), (6, True)):
            features = read_features(record, "market1501", after)
            precisions = average_precisions(*features, "euclidean")
            np.testing.assert_allclose(np.nanmean(precisions), evaluations[epoch]["mAP"], rtol=1e-6)
            query, gallery = features
            labels = (query.pids, gallery.pids, query.camids, gallery.camids)
            first = nearest_gallery(query.features, gallery.features, *labels, topk=1)[0][:, 0]
            np.testing.assert_allclose(np.mean(gallery.pids[first] == query.pids), evaluations[epoch]["cmc"][0])


@pytest.mark.compare
def test_finished_runs_are_not_run_again(
    compared: tuple[Path, Any], reid_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, done = compared
    monkeypatch.chdir(folder)
    checkpoints = {path: path.stat().st_mtime_ns for path in folder.rglob("model.pth.tar*")}
    assert main(_arguments(reid_data)) == 0
    again = capsys.readouterr().out
    assert again.count("already finished") == 2
    tables = [[line for line in text.splitlines() if line[:1] == "|"] for text in (done.stdout, again)]
    assert tables[0] == tables[1]
    assert checkpoints == {path: path.stat().st_mtime_ns for path in folder.rglob("model.pth.tar*")}
    assert (
        main(_arguments(reid_data, "train.lr", "0.01", "train.keep", "1")) == 2
    )  # how many are kept changes no result
    assert "holds a run with other settings (train.lr was 0.0015, is 0.01)" in capsys.readouterr().err


@pytest.mark.compare
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_an_interrupted_comparison_goes_on_to_the_same_results(
    compared: tuple[Path, Any], reid_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*COMPARE, *_arguments(reid_data)]
    command[command.index("--losses") + 1 : command.index("--baselines") + 2] = ["sn", "--baselines", "none"]
    process = start(*command, cwd=tmp_path)
    folder = tmp_path / "log/compare/plain/sn/seed-1"
    errors = interrupt_at(process, folder, "epoch: [1/6][1/", 120)
    assert "run 1 of 1: sn, seed 1 was interrupted; repeat the command to resume" in errors
    assert list((folder / "model").glob("model.pth.tar-*"))
    monkeypatch.chdir(tmp_path)
    assert main(command[2:]) == 0
    logs = sorted(folder.glob("train.log-*"), key=os.path.getmtime)
    assert "=> Resuming from" in logs[-1].read_text()
    results = [json.loads((place / "log/compare/plain/results.json").read_text()) for place in (compared[0], tmp_path)]
    (whole,) = (one for one in results[0]["runs"] if one["variant"] == "sn")
    (resumed,) = results[1]["runs"]
    for key in ("mAP", "mINP", "cmc"):
        assert resumed[key] == whole[key]


@pytest.mark.compare
@pytest.mark.skipif(os.name == "nt" or (os.cpu_count() or 1) < 2, reason="signals are POSIX's, and a job needs a core")
def test_runs_side_by_side_are_interrupted_together_and_go_on(
    reid_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*COMPARE, *_arguments(reid_data, flags=("--seeds", "1", "--jobs", "2"))]
    process = start(*command, cwd=tmp_path)
    folders = [tmp_path / "log/compare/plain" / name / "seed-1" for name in ("softmax", "sn")]
    wait_for(process, folders[0], "epoch: [1/6][1/", 120)
    errors = interrupt_at(process, folders[1], "epoch: [1/6][1/", 120)
    assert "was interrupted; repeat the command to resume" in errors
    for folder in folders:
        assert list((folder / "model").glob("model.pth.tar-*"))
    monkeypatch.chdir(tmp_path)
    assert main(command[2:]) == 0
    assert {run["variant"] for run in json.loads((folders[0].parents[1] / "results.json").read_text())["runs"]} == {
        "softmax",
        "sn",
    }
    for folder in folders:
        assert "=> Resuming from" in max(folder.glob("train.log-*"), key=os.path.getmtime).read_text()


@pytest.mark.compare
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--variants", "unknown.yaml"), "own: unknown config key 'loss.sn.scal'"),
        (("--variants", "twice.yaml"), "the key 'own' is there twice, in lines 1 and 2"),
        (("--tune", "3"), "--tune judges its trials by training identities that are held out"),
        (("--jobs", "5000"), "the number of CPU cores, got 5000"),
    ],
)
def test_bad_input_changes_nothing_of_what_is_finished(
    flags: tuple[str, ...], message: str, compared: tuple[Path, Any], reid_data: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, _ = compared
    monkeypatch.chdir(folder)
    Path("unknown.yaml").write_text("own: {loss.name: sn, loss.sn.scal: 3}")
    Path("twice.yaml").write_text("own: {loss.name: sn}\nown: {loss.name: fidi}")
    before = {path: path.read_bytes() for path in Path("log").rglob("*") if path.is_file()}
    assert main(_arguments(reid_data, flags=("--seeds", "1", *flags))) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert {path: path.read_bytes() for path in Path("log").rglob("*") if path.is_file()} == before


@pytest.mark.slow  # a minute
def test_noise_is_shown_beside_the_unchanged(compared: tuple[Path, Any], reid_data: Path) -> None:
    folder, _ = compared
    flags = ("--seeds", "1", "--label-noise", "--outliers", "0.2")
    done = run(*COMPARE, *_arguments(reid_data, flags=flags), cwd=folder)
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / "log/compare/label-noise-0.1+outliers-0.2/results.json").read_text())["table"]
    plain = json.loads((folder / "log/compare/plain/results.json").read_text())["table"]
    for noisy, clean in zip(table, plain):
        figures = {name: figure["mean"] for name, figure in noisy["figures"].items()}
        assert figures["mAP unchanged"] == clean["figures"]["mAP"]["mean"]
        assert figures["mAP lost"] == pytest.approx(figures["mAP unchanged"] - figures["mAP"])
    assert len(list(folder.glob("log/compare/label-noise-0.1+outliers-0.2/sn/seed-1/outliers/*.png"))) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "snn"], "loss.name must be one of softmax, triplet, sn, hap2s, fidi, custom, got 'snn'"),
        (["--losses", "custom"], "loss.name custom needs a criterion: set loss.custom.target, such as"),
        (["--losses", "sn", "sn"], "--losses must name each loss once"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", "1" + "0" * 400], "--seeds must be at most 1,000, got 1000"),
        (["--seeds", "1", "--label-noise", "nan"], "--label-noise must be finite, at least 0 and below 1, got nan"),
        (["--label-noise", "2"], "--label-noise must be at least 0 and below 1, got 2.0"),
        (["--train-fraction", "0"], "--train-fraction must be above 0 and at most 1, got 0.0"),
        (["--seeds", "1", "loss.name", "sn"], "loss.name is set by --losses"),
        (["--seeds", "1", "train.seed", "4"], "train.seed is set by --seeds"),
        (["--seeds", "1", "test.evaluate", "True"], "leave test.evaluate, model.resume, train.start_epoch"),
        (["--seeds", "1", "train.start_epoch", "1"], "leave test.evaluate, model.resume, train.start_epoch"),
        (["--seeds", "1", "data.outliers", "0.1"], "data.outliers is set by --outliers, leave it out"),
        (["--losses", "sn", "train.lr", "1"], "put `--` between the losses and the option train.lr"),
        (["--config-file", "nowhere.yaml"], "can't read the config file 'nowhere.yaml'"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_any_run(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


TWO_ROWS = """
broken: {loss.name: sn, train.batch_size: 4096}
good: {loss.name: sn}
"""


def _two_rows(reid_data: Path, *flags: str) -> list[str]:
    """A comparison of a row that always fails and another one."""
    Path("two.yaml").write_text(TWO_ROWS)
    flags = ("--variants", "two.yaml", "--baselines", "none", *flags)
    arguments = _arguments(reid_data, "train.max_epoch", "1", "data.val_fraction", "0.25", flags=flags)
    del arguments[arguments.index("--losses") : arguments.index("--variants")]
    return arguments


@pytest.mark.compare
def test_a_row_that_fails_does_not_keep_the_others_from_their_table(
    reid_data: Path, in_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(_two_rows(reid_data, "--seeds", "2")) == 1
    shown = capfd.readouterr()
    assert "torchreid-snloss: error: " in shown.err  # the message of the run itself
    assert len(list(Path("log/compare/plain/broken").glob("*"))) == 1  # a second seed would fail, too
    (log,) = Path("log").glob("compare/plain/broken/seed-1/train.log-*")
    last = shown.err.splitlines()[-1]
    assert last.startswith("torchreid-snloss-compare: broken, seed 1 failed: ")
    assert "batch" in last
    assert last.endswith(f"; its log is {log}")
    table = json.loads(Path("log/compare/plain/results.json").read_text())["table"]
    assert [(row["variant"], row["seeds"]) for row in table] == [("good", 2)]
    assert "| good " in shown.out
    # The failed run leaves nothing that stops one with another batch size, and the others are not repeated.
    arguments = _two_rows(reid_data, "--seeds", "2")
    Path("two.yaml").write_text(TWO_ROWS.replace("4096", "2048"))
    assert main(arguments) == 1
    shown = capfd.readouterr()
    assert "other settings" not in shown.err
    assert shown.out.count("already finished") == 2


@pytest.mark.compare
def test_a_row_whose_first_trial_fails_does_not_keep_the_others_from_their_table(
    reid_data: Path, in_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    assert main(_two_rows(reid_data, "--seeds", "1", "--tune", "2")) == 1
    shown = capfd.readouterr()
    assert shown.err.splitlines()[-1].startswith("torchreid-snloss-compare: broken, trial 0 failed: ")
    assert "broken, trial 1" not in shown.out
    content = json.loads(Path("log/compare/plain/tuned-2/results.json").read_text())
    assert [row["variant"] for row in content["table"]] == ["good"]
    assert [part["variant"] for part in content["tuning"]] == ["good"]


def test_a_comparison_in_which_all_rows_fail_has_no_table(
    reid_data: Path, in_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(reid_data, "train.batch_size", "4096")) == 1
    shown = capfd.readouterr()
    assert [line.split(",")[0] for line in shown.err.splitlines()[-2:]] == [
        "torchreid-snloss-compare: softmax", "torchreid-snloss-compare: sn",
    ]  # fmt: skip
    assert not Path("log/compare/plain/results.csv").exists()


def test_results_of_other_images_are_refused_and_a_data_root_may_be_moved(
    reid_data: Path, in_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(reid_data, "train.max_epoch", "1", flags=("--baselines", "none", "--seeds", "1"))
    arguments[arguments.index("--losses") + 1 : arguments.index("--baselines")] = ["sn"]
    assert main(arguments) == 0
    place = arguments.index("--root") + 1
    shutil.copytree(reid_data, "moved")
    assert main([*arguments[:place], "moved", *arguments[place + 1 :]]) == 0
    assert "already finished" in capfd.readouterr().out
    image = next(Path("moved").rglob("bounding_box_train/*.jpg"))
    image.unlink()
    assert main([*arguments[:place], "moved", *arguments[place + 1 :]]) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert f"(the images were others, those of data.root {reid_data}, not moved): set another data.save_dir" in errors


def test_a_folder_that_can_not_be_written_to_is_named(
    reid_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log").write_text("a file")
    assert main(_arguments(reid_data)) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "the results can't be written to 'log/compare/plain'" in errors


def test_two_comparisons_do_not_train_in_one_folder(
    reid_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="POSIX's locks")
    monkeypatch.chdir(tmp_path)
    folder = Path("log/compare/plain/softmax/seed-1")
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(_arguments(reid_data)) == 2
    assert f"another process is training in {folder}" in capsys.readouterr().err
    assert not list(folder.glob("train.log-*"))


def test_a_damaged_record_is_named_before_any_run(
    reid_data: Path, recorded_runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("log/compare/plain/sn/seed-1")  # the second run
    shutil.copytree(recorded_runs[0].folder / "record", folder / "record")
    for settings in ("loss: [", "loss: {name: nope}", "loss: {name: sn+nope}", "loss: {sn: {weight_m: {}}}"):
        (folder / "settings.yaml").write_text(settings)
        assert main(_arguments(reid_data)) == 2
        errors = capsys.readouterr().err
        assert f"the settings of the run in {folder} are damaged: " in errors
        assert errors.endswith("; remove that folder\n")
        assert errors.count("\n") == 1
    (folder / "settings.yaml").write_text(_settings_of(reid_data, "sn"))
    record = folder / "record/record.json"
    text = record.read_text()
    for damaged in (text[:-9], text.replace('"mAP"', '"map"'), "[]"):
        record.write_text(damaged)
        assert main(_arguments(reid_data)) == 2
        errors = capsys.readouterr().err
        assert f"the record of a run is damaged, in '{record}': " in errors
        assert f"remove '{record}' to begin a new one; a comparison then makes the run again" in errors
        assert errors.count("\n") == 1
    assert not list(Path("log").rglob("train.log-*"))


def _settings_of(reid_data: Path, loss: str) -> str:
    """The config of a run of `_arguments`, as the comparison saves it."""
    plan = _plan(_parser().parse_args(_arguments(reid_data)))
    return next(run.settings.cfg_text for run in plan.runs() if run.variant == loss)


def test_damaged_or_foreign_features_end_the_report_with_a_line(recorded_runs: list[Run], tmp_path: Path) -> None:
    features = recorded_runs[2].folder / "record" / "<b>one-after.npz"
    whole = dict(np.load(features))
    fewer = {name: value[:-1] for name, value in whole.items()}
    np.savez(features, **fewer)
    with pytest.raises(RecordError, match="were tested on other images"):
        write_page(Results.of(recorded_runs), recorded_runs, tmp_path / "report.html", "", "pca")
    features.write_bytes(features.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"the record of a run is damaged, in '.*<b>one-after\.npz'"):
        write_page(Results.of(recorded_runs), recorded_runs, tmp_path / "report.html", "", "pca")
    assert not (tmp_path / "report.html").exists()
