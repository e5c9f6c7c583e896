"""The report's charts, as SVG whose text and axes take the colour of the page around them."""

from __future__ import annotations

import html
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from torchreid_snloss.compare.ranked import Distances
from torchreid_snloss.record import Features

__all__ = ["cmc_curves", "feature_map", "histograms", "learning_curves", "loss_curves"]

# Okabe and Ito's colours for the colour-blind, a little lighter or darker, to be seen on white and on black.
_COLORS = ["#8c8c8c", "#d55e00", "#2f8fd0", "#00a67a", "#cf7fb0", "#c79a00", "#7e6bd1", "#58b4d9"]
_MARKERS = "osD^vP*X"
_LINKS = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
_INK = "#0a0b0c"  # stands for the page's own colour
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "torchreid-snloss",  # the same drawing is the same file
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
"""By loss, of each seed, x and y."""


def learning_curves(curves: Curves, label: str) -> str:
    """A figure of the evaluation by epoch, means over seeds with a band from the lowest to the highest."""
    return _lines(curves, "epochs trained", label)


def cmc_curves(curves: Curves) -> str:
    """The share of queries with a match among the first k images, likewise."""
    return _lines(curves, "rank k", "queries with a match, %")


def _lines(curves: Curves, x_label: str, y_label: str) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for number, (loss, runs) in enumerate(curves.items()):
            x = runs[0][0]
            values = np.array([y for _, y in runs])
            color, marker = _COLORS[number % len(_COLORS)], _MARKERS[(number + number // len(_COLORS)) % len(_MARKERS)]
            axes.plot(x, values.mean(axis=0), color=color, marker=marker, markersize=4, label=loss)
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=9)
        return _svg(figure, f"{y_label} by {x_label}: {', '.join(curves)}")


def loss_curves(loss: str, terms: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """The terms of one loss by epoch."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axes = figure.subplots()
        for number, (name, (x, y)) in enumerate(terms.items()):
            axes.plot(
                x, y, color=_COLORS[(2, 1, 3, 0)[number % 4]], linestyle=("-", "--", ":", "-.")[number % 4], label=name
            )
        axes.set(xlabel="epochs trained", title=loss)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(loc="best", fontsize=9)
        return _svg(figure, f"Terms of {loss} by epoch")


def histograms(loss: str, before: Distances, after: Distances) -> str:
    """Distances between queries and gallery, of the same and of different people, before and after training."""
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


def feature_map(title: str, query: Features, gallery: Features, pids: Sequence[int], metric: str, kind: str) -> str:
    """Images of some identities in two dimensions.

    Args:
        title: above it.
        query: features of a test set's queries, here dots with a rim.
        gallery: of its gallery.
        pids: the identities to show.
        metric: by which features are compared, ``"euclidean"`` or ``"cosine"``.
        kind: ``"tsne"`` or ``"pca"``.
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
            color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number // len(_COLORS) % len(_MARKERS)]
            for wanted, rim in ((False, "none"), (True, _INK)):
                mine = points[(labels == pid) & (is_query == wanted)]
                axes.scatter(mine[:, 0], mine[:, 1], s=34, color=color, marker=marker, edgecolors=rim, linewidths=1)
        axes.set(xticks=[], yticks=[], title=title)
        axes.grid(False)
        axes.spines[["top", "right"]].set_visible(True)
        return _svg(figure, f"Map of test features, {title}")


def _svg(figure: Figure, label: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Ids are the page's, not the drawing's; and the page sets the size.
    svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{zlib.crc32(label.encode())}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    opening = (
        f'<svg role="img" aria-label="{html.escape(label)}" {view[0]} xmlns="http://www.w3.org/2000/svg" {_LINKS}>'
    )
    return opening + svg[svg.index(">") + 1 :]
