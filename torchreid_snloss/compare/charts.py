"""The charts of the report, which `page.py` places: SVG in the text colour of the page around them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from torchreid_snloss.compare.backend import Figure, MaxNLocator, matplotlib
from torchreid_snloss.compare.ranked import DistanceHistograms
from torchreid_snloss.record import Features

__all__ = ["Curves", "cmc_curves", "feature_map", "histograms", "learning_curves", "loss_curves"]

# The colour-blind safe palette of Okabe and Ito, a little lighter or darker so that it shows on white and on black.
_COLORS = ["#8c8c8c", "#d55e00", "#2f8fd0", "#00a67a", "#cf7fb0", "#c79a00", "#7e6bd1", "#58b4d9"]
_MARKERS = "osD^vP*X"
_INK = "#0a0b0c"  # a placeholder for the text colour of the page
_HREF = "{http://www.w3.org/1999/xlink}href"
_SVG_METADATA = ("Creator", "Date", "Format", "Type")  # left out of the file
ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "torchreid-snloss",  # the same figure gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _INK),
}

Curves = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]
"""The x and y values of each seed, by loss."""


def learning_curves(curves: Curves, label: str) -> Markup:
    """Plots an evaluation metric by epoch: the mean over seeds, with a band from the lowest to the highest value.

    Args:
        curves: The epochs and the values. All seeds of a loss have the same epochs.
        label: The label of the y axis.
    """
    return _mean_curves(curves, "epochs trained", label)


def cmc_curves(curves: Curves) -> Markup:
    """Plots the CMC curves: the mean over seeds, with a band from the lowest to the highest value.

    Args:
        curves: The ranks k, and the percentage of queries with a match among the first k gallery images.
    """
    return _mean_curves(curves, "rank k", "queries with a match, %")


def _mean_curves(curves: Curves, x_label: str, y_label: str) -> Markup:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for number, (loss, of_seeds) in enumerate(curves.items()):
            x = of_seeds[0][0]
            values = np.array([y for _, y in of_seeds])
            color, marker = _color(number), _MARKERS[(number + number // len(_COLORS)) % len(_MARKERS)]
            axes.plot(x, values.mean(axis=0), color=color, marker=marker, markersize=4, label=loss)
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=9)
        return _svg(figure, f"{y_label} by {x_label}: {', '.join(curves)}")


def loss_curves(loss: str, terms: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Markup:
    """The terms of one loss by epoch.

    Args:
        loss: The name of the loss.
        terms: The epochs and the values by the name of the term.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axes = figure.subplots()
        for number, (name, (x, y)) in enumerate(terms.items()):
            color, linestyle = _COLORS[(2, 1, 3, 0)[number % 4]], ("-", "--", ":", "-.")[number % 4]
            axes.plot(x, y, color=color, linestyle=linestyle, label=name)
        axes.set(xlabel="epochs trained", title=loss)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(loc="best", fontsize=9)
        return _svg(figure, f"Terms of {loss} by epoch")


def histograms(loss: str, before: DistanceHistograms, after: DistanceHistograms) -> Markup:
    """The distances between queries and gallery images of the same person and of different people.

    Args:
        loss: The name of the loss.
        before: The distances before training.
        after: The distances after training.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        for axes, when, distances in zip(figure.subplots(1, 2), ("before", "after"), (before, after)):
            kinds = {"different people": (distances.different, 1, None), "same person": (distances.same, 2, "///")}
            for label, (shares, color, hatch) in kinds.items():
                axes.stairs(shares, distances.edges, fill=True, color=_COLORS[color], alpha=0.35)
                axes.stairs(shares, distances.edges, color=_COLORS[color], label=label, hatch=hatch, linewidth=1.3)
            axes.set(xlabel="distance", yticks=[])
            axes.set_title(f"{loss}, {when}: overlap {distances.overlap:.0%}", fontsize=9)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        return _svg(figure, f"Distances with {loss}, before and after training")


def feature_map(title: str, query: Features, gallery: Features, pids: Sequence[int], metric: str, kind: str) -> Markup:
    """Plots the features of some identities in two dimensions.

    Args:
        title: The title of the chart.
        query: The features of the queries, whose markers are outlined.
        gallery: The features of the gallery.
        pids: The identities to show.
        metric: The distance between features, `"euclidean"` or `"cosine"`.
        kind: How the map is made, `"tsne"` or `"pca"`.
    """
    features = np.concatenate([query.features, gallery.features])
    labels = np.concatenate([query.pids, gallery.pids])
    chosen = np.isin(labels, pids)
    is_query = (np.arange(len(labels)) < len(query.pids))[chosen]
    features, labels = features[chosen], labels[chosen]
    if metric == "cosine":
        features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    if features.shape[1] == 1:
        features = np.concatenate([features, np.zeros_like(features)], axis=1)
    if kind == "pca":
        points = PCA(n_components=2, random_state=0).fit_transform(features)
    else:
        perplexity = min(30.0, (len(features) - 1) / 3)
        points = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, pid in enumerate(pids):
            color, marker = _color(number), _MARKERS[number // len(_COLORS) % len(_MARKERS)]
            for of_query, rim in ((False, "none"), (True, _INK)):
                x, y = points[(labels == pid) & (is_query == of_query)].T
                axes.scatter(x, y, s=34, color=color, marker=marker, edgecolors=rim, linewidths=1)
        axes.set(xticks=[], yticks=[], title=title)
        axes.grid(False)
        axes.spines[["top", "right"]].set_visible(True)
        return _svg(figure, f"Map of test features, {title}")


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element for an HTML page, with `label` as the text for screen readers."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_SVG_METADATA))
    svg = ElementTree.fromstring(stream.getvalue().replace(_INK, "currentColor"))
    for name in ("width", "height"):  # the page sets the size
        del svg.attrib[name]
    svg.attrib.update({"role": "img", "aria-label": label})
    # Ids must be unique within the page, so the ids of each chart get a prefix.
    prefix = f"{zlib.crc32(label.encode()):x}-"
    for element in svg.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == _HREF:
                element.set(name, value.replace("#", f"#{prefix}"))
            else:
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
    return Markup(ElementTree.tostring(svg, encoding="unicode"))  # safe: tostring has escaped all text
