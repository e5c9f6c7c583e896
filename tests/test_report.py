"""The report of a trial with ten rows: its differences, its test sets and splits, its tuning."""

from __future__ import annotations

import datetime
import html.parser
import json
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import record_run
from PIL import Image

from torchreid_snloss.compare.charts import feature_map, mean_curves
from torchreid_snloss.compare.command import _parser, _plan
from torchreid_snloss.compare.drawing import COLORS, styles_of
from torchreid_snloss.compare.page import write_page
from torchreid_snloss.compare.provenance import Provenance
from torchreid_snloss.compare.results import Results
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.compare.tuning import Tuning
from torchreid_snloss.compare.variants import BASELINES, Variant
from torchreid_snloss.config import get_default_config, leaves
from torchreid_snloss.evaluation import Ranking, nearest_gallery
from torchreid_snloss.record import Features, Recorder, RecordError, read_record

VARIANTS = {
    "control": 0.0, "softmax": -0.2, "triplet": -0.3, "sn": 0.25, "hap2s": 0.3, "fidi": 0.0, "wrt": 0.01,
    "a_variant_with_a_name_that_is_long_enough_for_two_lines": -0.02, "circle": 0.02, "sn+triplet": 0.1,
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


def _evaluation(level: float, rng: np.random.Generator, queries: int) -> Ranking:
    precisions = np.clip(level + rng.normal(scale=0.05, size=queries), 0, 1)
    return Ranking(np.linspace(level, 1, 12, dtype=np.float32), float(precisions.mean()), level / 2, precisions)


def recorded_trial(
    folder: Path, rows: int = 4, splits: tuple[int, ...] = (0,), targets: tuple[str, ...] = ("one",)
) -> list[Run]:
    """The first of the variants with two seeds each, of which some are far ahead of the control and some far behind."""
    folder.mkdir(exist_ok=True)
    image = folder / "0001_c1.jpg"
    Image.new("RGB", (64, 128)).save(image)
    runs = []
    for number, (variant, ahead) in enumerate([*VARIANTS.items()][:rows]):
        for split in splits:
            for seed in (1, 2):
                rng = np.random.default_rng([number, split, seed])
                options = ("data.targets", list(targets), "train.seed", seed)

                def evaluate(epoch: int, dataset: str, rng: Any = rng, ahead: float = ahead, split: int = split) -> Any:
                    return _evaluation(0.1 if epoch == 0 else 0.4 + ahead + 0.1 * split, rng, 12)

                place = folder / variant / str(split) / str(seed)
                runs.append(record_run(place, variant, image, *options, split=split, evaluate=evaluate))
    return runs


def _report(runs: list[Run], folder: Path, tunings: tuple[Tuning, ...] = ()) -> str:
    write_page(Results.of(runs), runs, folder / "report.html", "", "pca", tunings)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ten_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The runs of a trial with ten rows, the last of which an earlier version recorded."""
    runs = recorded_trial(tmp_path_factory.mktemp("ten"), rows=10)
    path = runs[-1].folder / "record/record.json"
    content = json.loads(path.read_text())
    del content["sessions"]
    path.write_text(json.dumps(content))
    return runs


@pytest.fixture(scope="module")
def ten_rows(ten_runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    """The results of a trial with ten rows, and its report."""
    return Results.of(ten_runs), _report(ten_runs, tmp_path_factory.mktemp("report"))


def _charts(text: str, label: str) -> list[ElementTree.Element]:
    """The charts whose text for screen readers begins with the label."""
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return [chart for chart in charts if chart.attrib["aria-label"].startswith(label)]


def _intervals(chart: ElementTree.Element) -> list[tuple[float, float]]:
    """The ends of the lines of a forest plot, in the chart's units."""
    ends = []
    for element in chart.iter(f"{SVG}g"):
        if re.search(r"-interval-\d+$", element.get("id", "")):
            (path,) = element.iter(f"{SVG}path")
            start, end = re.findall(r"[ML] ([\d.]+) ", path.attrib["d"])
            ends.append((float(start), float(end)))
    return ends


def test_the_forest_has_a_line_for_each_difference(ten_rows: tuple[Results, str]) -> None:
    results, text = ten_rows
    for baseline in ("control", "softmax"):
        (chart,) = _charts(text, f"Difference of mAP to {baseline} on one")
        found = [row.differences[baseline] for row in results.rows if row.variant != baseline]
        values = np.array([(difference.low, difference.high) for difference in found])
        drawn = np.array(_intervals(chart))
        assert drawn.shape == values.shape == (9, 2)
        # Places in the chart are values times a scale plus an offset.
        scale, offset = np.polyfit(values.ravel(), drawn.ravel(), 1)
        assert scale > 0
        np.testing.assert_allclose(drawn, scale * values + offset, atol=0.01)
        names = [element.text for element in chart.iter(f"{SVG}text")]
        assert {*VARIANTS} - {baseline} - {*names} == {"a_variant_with_a_name_that_is_long_enough_for_two_lines"}
        assert "a_variant_with…for_two_lines" in names


def test_the_verdicts_are_those_of_the_intervals(ten_rows: tuple[Results, str]) -> None:
    _, text = ten_rows
    (control,) = re.findall(r"Compared with <em>control</em>:(.*?)</li>", text, re.DOTALL)
    verdicts = dict(re.findall(r"([a-z ]+): ([^;.]+)[;.]", " ".join(control.split())))
    words = {word.strip(): set(names.split(", ")) for word, names in verdicts.items()}
    assert {"sn", "hap2s"} <= words["ahead"]
    assert {"softmax", "triplet"} <= words["behind"]
    assert "fidi" in words["no difference shown"]
    cells = re.findall(
        r'<td class="(ahead|behind|no-difference-shown)">([-+][\d.]+) \[([-+][\d.]+), ([-+][\d.]+)\]</td>', text
    )
    assert len(cells) == 18
    for word, mean, low, high in cells:
        assert float(low) <= float(mean) <= float(high)
        level = float(low) <= 0 <= float(high)
        assert {"ahead": float(low) >= 0, "behind": float(high) <= 0, "no-difference-shown": level}[word]
    assert "The interval covers two sources of chance" in text
    assert text.count("10 variants on one") == 2  # title and heading


def test_a_difference_without_an_interval_has_its_reason(tmp_path: Path) -> None:
    runs = recorded_trial(tmp_path)
    for run in runs:
        if run.variant == "sn":  # as with a data set whose queries are of one identity
            path = run.folder / "record/one-after.npz"
            arrays = dict(np.load(path))
            arrays["average_precisions"][np.arange(12) % 4 != 1] = np.nan
            np.savez(path, **arrays)
    text = _report(runs, tmp_path)
    assert "no interval: sn, since queries of at least two identities must have a match" in " ".join(text.split())
    (chart,) = _charts(text, "Difference of mAP to control")
    assert len(_intervals(chart)) == 2
    assert " no interval" in [element.text for element in chart.iter(f"{SVG}text")]


def test_every_test_set_has_its_table_differences_and_curves(tmp_path: Path) -> None:
    text = _report(recorded_trial(tmp_path, targets=("one", "two")), tmp_path)
    for dataset in ("one", "two"):
        assert len(_charts(text, f"Difference of mAP to control on {dataset}")) == 1
        assert len(_charts(text, f"mAP, % by epochs trained on {dataset}")) == 1
        assert f'<th scope="rowgroup" class="rowgroup" colspan="3">{dataset}</th>' in text
    assert len(_charts(text, "queries with a match")) == 1
    assert "one, the first test set; so are the distances, maps and ranked lists below" in " ".join(text.split())
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)


def test_standard_deviations_are_those_over_seeds_of_the_mean_over_splits(tmp_path: Path) -> None:
    runs, unchanged = (recorded_trial(tmp_path / name, rows=2, splits=(1, 2)) for name in ("changed", "unchanged"))
    for row in Results.of(runs, unchanged).rows:
        # Both are the same, and far from one split to the other.
        assert row.metrics["mAP unchanged"] == row.metrics["mAP"]
        assert str(row.metrics["mAP lost"]) == "0.0 ± 0.0"
        assert row.metrics["s/epoch"].std == pytest.approx(0.5**0.5)  # 3 s and 4 s with the two seeds


def test_each_run_is_read_once_for_all_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, average_precisions = [], Run.average_precisions

    def noted(run: Run, dataset: str) -> Any:
        read.append((run.folder, dataset))
        return average_precisions(run, dataset)

    monkeypatch.setattr(Run, "average_precisions", noted)
    Results.of(recorded_trial(tmp_path, rows=4, targets=("one", "two")))
    assert len(read) == len(set(read)) == 4 * 2 * 2


def test_features_are_read_once_and_lists_are_as_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = recorded_trial(tmp_path, rows=2)
    query, gallery = runs[0].features("one", after=True)
    labels = (query.pids, gallery.pids, query.camids, gallery.camids)
    read, features = [], Run.features

    def noted(run: Run, dataset: str, after: bool) -> Any:
        read.append((run.variant, dataset, after))
        return features(run, dataset, after)

    monkeypatch.setattr(Run, "features", noted)
    shown = []
    for rerank in (False, True):
        runs = [replace(run, settings=replace(run.settings, rerank_in_training=rerank)) for run in runs]
        text = _report(runs, tmp_path)
        assert sorted(read) == [(name, "one", after) for name in ("control", "softmax") for after in (False, True)]
        read.clear()
        _, distances = nearest_gallery(query.features, gallery.features, *labels, topk=10, rerank=rerank)
        expected = {f"{value:.2f}" for value in (distances if rerank else np.sqrt(distances)).ravel()}
        shown.append(re.findall(r"<span>[✓✗] ([\d.]+)</span>", text))
        assert len(shown[-1]) == 8 * 2 * 10
        assert set(shown[-1]) <= expected
        assert ("They are re-ranked where the evaluation is" in text) == rerank
    assert shown[0] != shown[1]


def test_curves_of_several_splits_are_their_means(tmp_path: Path) -> None:
    runs = recorded_trial(tmp_path, splits=(1, 2))
    text = " ".join(_report(runs, tmp_path).split())
    assert "2 splits" in text
    assert "of the mean over the 2 splits" in text
    assert text.count("Each line is the mean of 2 seeds, each averaged over the 2 splits. The band around it goes") == 2
    assert "with seed 1 on the first split" in text
    # The last point of a curve stands where the table's mAP does: the places of all curves are affine in it.
    (chart,) = _charts(text, "mAP, % by epochs trained")
    lines = [
        np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.attrib["d"]), dtype=float)
        for group in chart.iter(f"{SVG}g")
        if "-line2d_" in group.get("id", "")
        for path in group.findall(f"{SVG}path")
        if "clip-path" in path.attrib and "stroke-opacity" not in path.attrib["style"]
    ]
    ends = np.array([line[-1][1] for line in lines if len(line) == 2 and line[0][0] < line[1][0]][-4:])
    values = np.array([row.metrics["mAP"].mean for row in Results.of(runs).rows], dtype=float)
    slope, offset = np.polyfit(values, ends, 1)
    assert slope < 0
    np.testing.assert_allclose(ends, slope * values + offset, atol=0.05)


def test_variants_that_differ_in_more_than_the_loss_are_told(tmp_path: Path) -> None:
    runs = recorded_trial(tmp_path)[:2]
    image = tmp_path / "0001_c1.jpg"
    ranking = _evaluation(0.4, np.random.default_rng(0), 12)
    own = ("data.targets", ["one"], "model.name", "osnet_x1_0", "test.dist_metric", "cosine")
    runs.append(record_run(tmp_path / "own", "own", image, *own, epochs=3, evaluate=lambda *_: ranking))
    text = " ".join(_report(runs, tmp_path).split())
    assert "resnet50 or osnet_x1_0 · 256 x 128 · 2 epochs or 3 epochs · batch 32" in text


class _Rows(html.parser.HTMLParser):
    """The rows of all tables, as the text of their cells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def recorded_tuning(
    folder: Path, variant: Variant, trials: dict[int, list[float] | None], folds: int = 1, max_epoch: int = 3
) -> Tuning:
    """A tuning whose trials had these mAPs by epoch; None for one that failed, and a short curve was pruned."""
    from optuna.trial import TrialState

    flags = ["--tune", str(len(trials)), "--folds", str(folds), "data.val_fraction", "0.25"]
    flags += ["data.save_dir", str(folder), "train.max_epoch", str(max_epoch)]
    tuning = Tuning(_plan(_parser().parse_args(flags)), variant, 0)
    tuning._open()
    for curve in trials.values():
        trial = tuning._next()
        for key in tuning.space:
            tuning._suggest(trial, key)
        for epoch, mean_ap in enumerate(curve or [], start=1):
            trial.report(mean_ap, epoch)
        if curve is None:
            tuning._study.tell(trial, state=TrialState.FAIL)
        elif len(curve) < folds * max_epoch:
            tuning._study.tell(trial, state=TrialState.PRUNED)
        else:
            tuning._study.tell(trial, curve[-1])
    return tuning


def test_the_tuning_section_tells_what_was_found(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trials: dict[int, list[float] | None] = {
        0: [0.1, 0.2, 0.3], 1: [0.1, 0.3, 0.42], 2: [0.05], 3: None, 4: [0.1, 0.2, 0.25], 5: [0.01, 0.02],
    }  # fmt: skip
    tuning = recorded_tuning(tmp_path, Variant("hap2s", {"loss.name": "hap2s"}), trials)
    other = recorded_tuning(tmp_path, BASELINES["control"], {0: [0.1, 0.2, 0.3]})
    runs = [run for run in recorded_trial(tmp_path, rows=5) if run.variant in ("control", "hap2s")]
    text = _report(runs, tmp_path, (tuning, other))
    parsed = _Rows()
    parsed.feed(text)
    found = next(row for row in parsed.rows if row[0] == "hap2s" and "train.lr" in row[1])
    assert found[2:] == ["30.0", "42.0", "1", "6", "2", "1"]
    best = tuning.trials[1]
    assert best.values != tuning.trials[0].values
    for key, value in best.values.items():
        own = tuning.trials[0].values[key]
        assert f"{key} {value} {'as in the config' if value == own else f'instead of {own}'}" in found[1]
    start = parsed.rows.index(["trial", "held-out mAP", "epochs", "state", *best.values])
    rows = parsed.rows[start + 1 : start + 7]
    assert [row[:4] for row in rows] == [
        ["0", "30.0", "3", "finished"],
        ["1", "42.0", "3", "finished"],
        ["2", "5.0", "1", "ended early"],
        ["3", "–", "0", "failed"],  # noqa: RUF001
        ["4", "25.0", "3", "finished"],
        ["5", "2.0", "2", "ended early"],
    ]
    assert [row[4:] for row in rows] == [[str(value) for value in trial.values.values()] for trial in tuning.trials]
    assert text.count("<summary>All 6 trials of hap2s</summary>") == 1
    (chart,) = _charts(text, "Trials of hap2s")
    assert {"finished", "ended early", "failed", "best so far"} <= {e.text for e in chart.iter(f"{SVG}text")}
    markers = [len(list(g.iter(f"{SVG}use"))) for g in chart.iter(f"{SVG}g") if "-line2d_" in g.get("id", "")]
    assert [number for number in markers if number > 1] == [3, 2]  # finished, ended early
    assert "<h2>Tuning</h2>" not in _report(runs, tmp_path)


def test_the_tuning_section_says_what_folds_are(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trials: dict[int, list[float] | None] = {0: [0.3, 0.4, 0.5], 1: [0.6, 0.5, 0.45], 2: [0.1, 0.2]}
    variant = Variant("hap2s", {"loss.name": "hap2s"})
    tuning = recorded_tuning(tmp_path, variant, trials, folds=3, max_epoch=1)  # the means over 1, 2 and 3 folds
    runs = [run for run in recorded_trial(tmp_path, rows=5) if run.variant in ("control", "hap2s")]
    text = _report(runs, tmp_path, (tuning,))
    parsed = _Rows()
    parsed.feed(text)
    found = next(row for row in parsed.rows if row[0] == "hap2s" and "train.lr" in row[1])
    assert found[2:] == ["50.0", "50.0", "0", "3", "1", "0"]
    start = parsed.rows.index(["trial", "held-out mAP", "epochs, all folds", "state", *tuning.best.values])
    assert [row[1:4] for row in parsed.rows[start + 1 : start + 4]] == [
        ["50.0", "3", "finished"], ["45.0", "3", "finished"], ["20.0", "2", "ended early"],
    ]  # fmt: skip
    assert "by the mean mAP over 3 folds" in " ".join(text.split())


@pytest.mark.parametrize("kind", ["tsne", "pca"])
def test_the_map_of_a_collapsed_model_is_drawn(kind: str) -> None:
    """scikit-learn's t-SNE ends the process if all features are equal."""
    pids, paths = np.arange(12) % 3, np.array(["image"] * 12)
    same = Features(np.ones((12, 8), dtype=np.float32), pids, np.zeros_like(pids), paths)
    assert "<svg" in feature_map("collapsed", same, same, [0, 1, 2], "euclidean", kind)


def _titles(chart: ElementTree.Element) -> list[str]:
    """What the chart shows where the pointer is, in the order of the places."""
    return [element.text or "" for element in chart.iter(f"{SVG}title")]


def _labels(chart: ElementTree.Element) -> set[str]:
    return {element.text or "" for element in chart.iter(f"{SVG}text")}


def test_only_what_differs_beyond_its_interval_is_bold(ten_rows: tuple[Results, str]) -> None:
    results, text = ten_rows
    style = text[text.index("<style>") : text.index("</style>")]
    bold = [selector.strip() for selector in re.findall(r"([^{}]+)\{[^{}]*font-weight: (?:bold|[6-9]00)", style)]
    assert bold == ["td.ahead, td.behind"]
    assert not re.findall(r"<(?:b|strong)>", text)
    marked = re.findall(r'<td class="(?:ahead|behind)">(.*?)</td>', text)
    found = [difference for row in results.rows for difference in row.differences.values()]
    assert marked == [str(difference) for difference in found if difference.low > 0 or difference.high < 0]
    assert 0 < len(marked) < len(found)


def test_a_row_shows_where_training_began(ten_runs: list[Run], ten_rows: tuple[Results, str]) -> None:
    parsed = _Rows()
    parsed.feed(ten_rows[1])
    (row,) = (row for row in parsed.rows if row[0].startswith("before training"))
    began = {(run.variant, run.seed): run.record().evaluations["one"][0]["mAP"] for run in ten_runs}
    of_seeds = [100 * np.mean([value for (_, seed), value in began.items() if seed == number]) for number in (1, 2)]
    assert row[1:3] == ["2", f"{np.mean(of_seeds):.1f} ± {np.std(of_seeds, ddof=1):.1f}"]
    rows = [100 * np.mean([value for (name, _), value in began.items() if name == variant]) for variant in VARIANTS]
    assert row[0].endswith(f"the networks of all rows, mAP {min(rows):.1f} to {max(rows):.1f}")


def _places(chart: ElementTree.Element, name: str) -> list[float]:
    """The x places of the markers in the groups of this name."""
    groups = [group for group in chart.iter(f"{SVG}g") if re.search(name, group.get("id", ""))]
    return [float(use.attrib["x"]) for group in groups for use in group.iter(f"{SVG}use")]


def test_each_seed_is_a_point(ten_rows: tuple[Results, str]) -> None:
    results, text = ten_rows
    mean_aps = {(result.variant, result.seed): 100 * result.mAP for result in results.results}
    (chart,) = _charts(text, "mAP of each seed on one")
    drawn, values = _places(chart, "-seeds-"), list(mean_aps.values())
    scale, offset = np.polyfit(values, drawn, 1)
    assert scale > 0
    np.testing.assert_allclose(drawn, scale * np.array(values) + offset, atol=0.01)
    mean = (mean_aps["sn", 1] + mean_aps["sn", 2]) / 2
    expected = f"sn: mean {mean:.1f}; seed 1: {mean_aps['sn', 1]:.1f}, seed 2: {mean_aps['sn', 2]:.1f}"
    assert _titles(chart)[[*VARIANTS].index("sn")] == expected
    (forest,) = _charts(text, "Difference of mAP to control")
    differences = [mean_aps[name, seed] - mean_aps["control", seed] for name in [*VARIANTS][1:] for seed in (1, 2)]
    drawn = _places(forest, "-seeds-")
    scale, offset = np.polyfit(differences, drawn, 1)
    np.testing.assert_allclose(drawn, scale * np.array(differences) + offset, atol=0.01)
    (found,) = (row.differences["control"] for row in results.rows if row.variant == "sn")
    assert _titles(forest)[2] == f"sn {found}, ahead; seed 1: {differences[4]:+.1f}, seed 2: {differences[5]:+.1f}"


def test_charts_have_both_labels_and_show_values_where_the_pointer_is(ten_rows: tuple[Results, str]) -> None:
    results, text = ten_rows
    axes = {
        "mAP of each seed": ("mAP, %", "variant"),
        "Difference of mAP to control": ("mAP - control, percentage points", "variant"),
        "mAP, % by epochs trained": ("epochs trained", "mAP, %"),
        "rank-1, % by epochs trained": ("epochs trained", "rank-1, %"),
        "Loss terms of sn ": ("epochs trained", "mean per epoch"),
        "queries with a match": ("rank k", "queries with a match, %"),
        "Distances with sn,": ("distance", "share of the pairs, %"),
        "Map of test features, sn:": ("first component", "second component"),
    }
    charts = {label: _charts(text, label) for label in axes}
    for label, (chart,) in charts.items():
        assert set(axes[label]) <= _labels(chart), label
        assert all(_titles(chart)), label
    ends = {row.variant: row.metrics["mAP"].mean for row in results.rows}
    began, ended = _titles(charts["mAP, % by epochs trained"][0])
    assert began.startswith("epochs trained: 0\n")
    lines = ended.splitlines()[1:]
    assert [line.split()[0] for line in lines] == sorted(ends, key=lambda name: -(ends[name] or 0))
    assert {f"{name} {mean:.1f}" for name, mean in ends.items()} == {line.split(" (")[0] for line in lines}
    assert _titles(charts["Loss terms of sn "][0]) == ["epoch 2\nloss 1.5"]
    assert len(_titles(charts["queries with a match"][0])) == 12
    assert len(_titles(charts["Distances with sn,"][0])) == 2 * 50
    assert "identity 3, query" in _titles(charts["Map of test features, sn:"][0])
    for chart in (chart for (chart,) in charts.values()):
        assert all("style" not in strip.attrib for strip in chart.iter() if strip.get("class") == "strip")


def test_a_band_needs_several_seeds() -> None:
    bands = []
    for seeds in (1, 2):
        chart = ElementTree.fromstring(
            mean_curves({"sn": ([1, 2], [[50, 60 + seed] for seed in range(seeds)])}, "rank k", "%", "one")
        )
        bands.append(sum("FillBetween" in element.get("id", "") for element in chart.iter()))
    assert bands == [0, 1]


def test_colours_go_by_name_and_not_by_order() -> None:
    names = ["wrt", "sn", "circle", "control", "fidi", "another", *(f"row-{number}" for number in range(15))]
    styles = styles_of(names)
    assert styles_of(reversed(names)) == styles
    assert {name: styles_of([name])[name] for name in ("sn", "hap2s", "control")} == {
        name: styles[name] for name in ("sn", "hap2s", "control")
    }
    assert styles_of(["wrt"])["wrt"] == styles_of(["wrt", "sn", "fidi", "triplet"])["wrt"]
    drawn = [(styles[name].color, styles[name].linestyle) for name in names]
    assert len({*drawn}) == len(names)


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG 2.2 defines it, from 1 to 21."""
    lights = []
    for color in (one, other):
        digits = color.removeprefix("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def test_colours_can_be_told_from_the_page_in_light_and_dark(ten_rows: tuple[Results, str]) -> None:
    grounds = [dict(re.findall(r"--(\w+): (#\w+);", rule)) for rule in re.findall(r":root \{([^}]*)\}", ten_rows[1])]
    assert len(grounds) == 2
    lines = [style.color for style in styles_of([]).values()]
    for colors in grounds:
        for name in ("ink", "soft", "right", "wrong", "link"):
            assert _contrast(colors[name], colors["ground"]) >= 4.5, name
        for color in (*COLORS, *lines):
            assert _contrast(color, colors["ground"]) >= 3, color


class _Elements(html.parser.HTMLParser):
    """All elements with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.found if tag in tags]


def test_the_page_can_be_used_with_a_keyboard_and_a_screen_reader(ten_rows: tuple[Results, str]) -> None:
    page = _Elements()
    page.feed(ten_rows[1])
    assert len(page.of("main")) == len(page.of("h1")) == 1
    assert page.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:]))  # noqa: RUF007
    assert all(attrs.get("scope") in ("col", "row", "rowgroup") for attrs in page.of("th"))
    scrolling = [*page.of("pre"), *(attrs for attrs in page.of("div") if attrs.get("class") == "scroll")]
    assert len(scrolling) == 3
    for attrs in scrolling:
        assert (attrs["tabindex"], attrs["role"]) == ("0", "region")
        assert len(attrs["aria-label"] or "") > 10
    alts = [attrs["alt"] or "" for attrs in page.of("img")]
    assert len(alts) == 8 + 8 * 10 * 10
    assert all(
        re.fullmatch(r"(Query|Rank \d+, a (correct|wrong) match): identity \d, camera \d", text) for text in alts
    )
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 40 for attrs in page.of("svg"))
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len({*ids}) == len(ids)
    # The contents, of which each leads to a section that is there.
    links = [(attrs["href"] or "")[1:] for attrs in page.of("a") if (attrs["href"] or "").startswith("#")]
    assert links == [attrs["id"] for attrs in page.of("section")]
    assert len(links) == 7
    assert sum(attrs.get("type") == "checkbox" for attrs in page.of("input")) == 8  # large pictures of each query


def test_the_page_says_where_its_numbers_come_from(ten_rows: tuple[Results, str]) -> None:
    text = ten_rows[1]
    origin = " ".join(text[text.index('<section id="origin">') :].split())
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    assert f"<dt>Runs</dt><dd>20, begun {today} " in origin
    assert f"torch {torch.__version__}, " in origin
    assert f"Python {platform.python_version()}</li>" in origin
    assert f"threads: {torch.get_num_threads()}), {platform.system()} {platform.machine()}</li>" in origin
    assert "date, versions and hardware of 1 of the runs" in origin
    assert 'href="results.csv"' in origin
    assert 'href="results.json"' in origin
    # Together, what differs and what is shared are the whole config.
    shared = dict(line.split(" ", 1) for line in re.findall(r"<pre.*?>(.*?)</pre>", text, re.DOTALL)[1].splitlines())
    parsed = _Rows()
    parsed.feed(text)
    start = next((number for number, row in enumerate(parsed.rows) if row[0] == "key"), len(parsed.rows))
    differing = {row[0] for row in parsed.rows[start + 1 :]}
    assert {*shared} | differing | {"train.seed", "data.save_dir"} == {*dict(leaves(get_default_config()))}
    assert shared["train.max_epoch"] == "2"


def test_where_runs_differ_is_a_table(tmp_path: Path) -> None:
    runs = recorded_trial(tmp_path, rows=2)
    image = tmp_path / "0001_c1.jpg"
    for seed, rate in ((1, 0.1), (2, 0.2)):
        ranking = _evaluation(0.4, np.random.default_rng(0), 12)
        options = ("data.targets", ["one"], "train.seed", seed, "train.lr", rate)
        runs.append(record_run(tmp_path / f"own{seed}", "own", image, *options, evaluate=lambda *_, r=ranking: r))
    found = Provenance.of(runs)
    default = str(get_default_config().train.lr)
    assert found.differing == {"train.lr": [default, default, "0.1 or 0.2"]}
    assert not any(line.startswith("train.lr ") for line in found.shared.splitlines())
    assert found.unknown == 0


def test_a_record_knows_each_process_that_trained(tmp_path: Path) -> None:
    for epoch in (1, 2):
        Recorder(tmp_path, epoch - 1).add_epoch(epoch, {"loss": 1.0}, seconds=1.0)
    sessions = read_record(tmp_path).sessions
    assert [set(session) for session in sessions] == 2 * [{"began", "versions", "hardware"}]
    path = tmp_path / "record.json"
    content = json.loads(path.read_text())
    for damaged in ({}, [1], [{"began": "now"}], [{**sessions[0], "hardware": 1}]):
        path.write_text(json.dumps({**content, "sessions": damaged}))
        with pytest.raises(RecordError, match="damaged"):
            read_record(tmp_path)
