"""The charts of evaluations, loss terms, distances and features, which `page.py` places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from torchreid_snloss.compare.backend import Figure, MaxNLocator, matplotlib
from torchreid_snloss.compare.drawing import (
    COLORS,
    INK,
    MARKERS,
    STYLE,
    Style,
    color_of,
    hover_strips,
    legend,
    legend_columns,
    shortened,
    styles_of,
    to_svg,
)
from torchreid_snloss.compare.ranked import DistanceHistograms
from torchreid_snloss.record import Features

__all__ = ["Curves", "feature_map", "histograms", "mean_curves", "term_curves"]

Curves = Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]
"""The x values, and the y values of each seed, by variant."""


def mean_curves(curves: Curves, x_label: str, y_label: str, dataset: str) -> Markup:
    """Plots curves of an evaluation, each the mean over seeds with a band from the lowest to the highest value.

    Args:
        curves: The curves.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        dataset: The test set.
    """
    width, styles = 4.4, styles_of(curves)
    with matplotlib.rc_context(STYLE):
        columns = legend_columns(curves, width)
        figure = Figure(figsize=(width, 2.9 + 0.2 * math.ceil(len(curves) / columns)), layout="constrained")
        axes = figure.subplots()
        texts: dict[float, list[tuple[float, str]]] = {}
        ends = []
        for variant, (x, of_seeds) in curves.items():
            values = np.array(of_seeds)
            color, marker, linestyle = styles[variant]
            means, lows, highs = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
            axes.plot(
                *(x, means),
                color=color,
                marker=marker,
                linestyle=linestyle,
                markersize=4,
                linewidth=1.3,
                label=shortened(variant),
            )
            if len(of_seeds) > 1:
                axes.fill_between(x, lows, highs, color=color, alpha=0.12, linewidth=0)
            for place, mean, low, high in zip(x, means, lows, highs):
                band = f" ({low:.1f} to {high:.1f})" if len(of_seeds) > 1 else ""
                texts.setdefault(place, []).append((mean, f"{variant} {mean:.1f}{band}"))
            ends.append(f"{texts[x[-1]][-1][1]} at {x[-1]:g}")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, columns)
        highest_first = {place: [text for _, text in sorted(of_place)[::-1]] for place, of_place in texts.items()}
        titles = ["\n".join([f"{x_label}: {place:g}", *highest_first[place]]) for place in sorted(texts)]
        strips = hover_strips(axes, sorted(texts))
        label = f"{y_label} by {x_label} on {dataset}: {', '.join(curves)}. Ends of the curves: {'; '.join(ends)}"
        return to_svg(figure, label, {strips: titles})


def term_curves(
    variant: str, epochs: Sequence[int], terms: Mapping[str, Sequence[float]], styles: Mapping[str, Style]
) -> Markup:
    """Plots the loss terms of one variant by epoch.

    Args:
        variant: The name of the variant.
        epochs: The epochs.
        terms: The values of each term in these epochs, by its name.
        styles: How each term is drawn.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axes = figure.subplots()
        for name, values in terms.items():
            color, marker, linestyle = styles[name]
            axes.plot(epochs, values, color=color, marker=marker, markersize=3, linestyle=linestyle, label=name)
        axes.set(xlabel="epochs trained", ylabel="mean per epoch")
        axes.set_title(shortened(variant), fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        legend(figure, legend_columns(terms, 3.4))
        titles = [
            "\n".join([f"epoch {epoch:g}", *(f"{name} {values[place]:.4g}" for name, values in terms.items())])
            for place, epoch in enumerate(epochs)
        ]
        ends = ", ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in terms.items())
        label = f"Loss terms of {variant} by epoch: {ends}"
        return to_svg(figure, label, {hover_strips(axes, epochs): titles})


def histograms(variant: str, before: DistanceHistograms, after: DistanceHistograms) -> Markup:
    """Plots the distances between queries and gallery images of the same person and of different people.

    Args:
        variant: The name of the variant.
        before: The distances before training.
        after: The distances after training.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        titles: dict[str, list[str]] = {}
        for axes, when, distances in zip(figure.subplots(1, 2), ("before", "after"), (before, after)):
            kinds = {"different people": (distances.different, 0, None), "same person": (distances.same, 1, "///")}
            for label, (shares, color, hatch) in kinds.items():
                percent = 100 * shares
                axes.stairs(percent, distances.edges, fill=True, color=COLORS[color], alpha=0.35)
                axes.stairs(percent, distances.edges, color=COLORS[color], label=label, hatch=hatch, linewidth=1.3)
            axes.set_xlabel("distance")
            axes.set_title(f"{when}: overlap {distances.overlap:.0%}", fontsize=9)
            bins = zip(distances.edges, distances.edges[1:], distances.same, distances.different)
            middles = (distances.edges[1:] + distances.edges[:-1]) / 2
            titles[hover_strips(axes, middles.tolist())] = [
                f"{when} training, distance {low:.2f} to {high:.2f}\n"
                f"same person {same:.1%}\ndifferent people {other:.1%}"
                for low, high, same, other in bins
            ]
        figure.axes[0].set_ylabel("share of the pairs, %")
        figure.suptitle(shortened(variant), fontsize=10)
        legend(figure, 2)
        label = (
            f"Distances with {variant}, before and after training: those between images of the same person and those "
            f"between images of different people overlap by {before.overlap:.0%} before and {after.overlap:.0%} after"
        )
        return to_svg(figure, label, titles)


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
    if not np.ptp(features, axis=0).any():  # a collapsed model; scikit-learn's t-SNE would end the process
        points = np.zeros((len(features), 2))
    elif kind == "pca":
        points = PCA(n_components=2, random_state=0).fit_transform(features)
    else:
        perplexity = min(30.0, (len(features) - 1) / 3)
        points = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 3.2), layout="constrained")
        axes = figure.subplots()
        titles = {}
        for number, pid in enumerate(pids):
            color, marker = color_of(number), MARKERS[number // len(COLORS) % len(MARKERS)]
            for of_query, rim in ((False, "none"), (True, INK)):
                x, y = points[(labels == pid) & (is_query == of_query)].T
                if len(x):
                    name = f"points-{number}-{'query' if of_query else 'gallery'}"
                    style: dict[str, Any] = {"color": color, "marker": marker, "edgecolors": rim}
                    axes.scatter(x, y, s=34, linewidths=1, gid=name, **style)
                    titles[name] = f"identity {pid}, {'query' if of_query else 'gallery'}"
        names = ("first component", "second component") if kind == "pca" else ("t-SNE 1", "t-SNE 2")
        axes.set(xticks=[], yticks=[], xlabel=names[0], ylabel=names[1])
        axes.set_title(shortened(title), fontsize=10)
        axes.grid(False)
        axes.spines[["top", "right"]].set_visible(True)
        label = f"Map of test features, {title}: {len(labels)} images of {len(pids)} identities"
        return to_svg(figure, label, titles)
