"""Draws each loss as a function of distance, by calling the losses themselves.

python docs/site/penalties.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor
from torchreid import losses as reid_losses

from torchreid_snloss import FIDILoss, HAP2SLoss, SNLoss
from torchreid_snloss.losses import MetricLoss, StatisticsCollector

IMAGES = Path(__file__).parent.parent / "images"
BLUE, ORANGE, GREEN = "C0", "C1", "C2"
# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {"light": ["#0072B2", "#D55E00", "#009E73"], "dark": ["#56B4E9", "#E69F00", "#009E73"]}
INK = {"light": "#222222", "dark": "#dddddd"}
GREY = "#888888"

Curve = NDArray[np.float64]


def of_distances(loss: MetricLoss, positive: list[Tensor], negative: list[Tensor]) -> tuple[Curve, Curve]:
    """The values of an anchor at the given distances, and their slopes.

    Args:
        loss: any loss.
        positive: the distances of each positive, (N,) or (1,).
        negative: the distances of each negative, (N,) or (1,).

    Returns:
        The values, (N,), and the slopes by each distance, (N, positives + negatives).
    """
    distances = torch.stack(torch.broadcast_tensors(*positive, *negative), dim=1).requires_grad_()
    is_positive = (torch.arange(distances.shape[1]) < len(positive)).expand_as(distances)
    columns = loss.select_references(distances.detach(), is_positive, ~is_positive, StatisticsCollector())
    masks = (is_positive, ~is_positive)
    if columns is None:
        values, slopes = loss.anchor_values(distances.detach(), *masks, StatisticsCollector())
    else:
        values, there = loss.anchor_values(
            distances.detach().gather(1, columns), *(m.gather(1, columns) for m in masks), StatisticsCollector()
        )
        slopes = torch.zeros_like(distances).scatter_add_(1, columns, there)
    return values.numpy(), slopes.detach().numpy()


def numbers(start: float, end: float) -> Tensor:
    """The values of a panel's axis."""
    return torch.linspace(start, end, 401, dtype=torch.float64)


def at(value: float) -> Tensor:
    """A single distance."""
    return torch.tensor([value], dtype=torch.float64)


def sn_separation(axes: Axes) -> None:
    """Draws the separation of one positive and one negative."""
    gap = numbers(-0.5, 0.5)
    for scale, colour in ((10.0, BLUE), (50.0, ORANGE)):
        loss = SNLoss(scale=scale, squeeze_weight=0.0)
        values, _ = of_distances(loss, [at(1.0)], [1.0 + gap])
        axes.plot(gap, values, color=colour, label=f"s = {scale:.0f}")
    axes.axvline(0, color=GREY, lw=1)
    axes.set(title="SN: separation", xlabel="negative's $-$ positive's distance", ylabel="loss of an anchor",
             ylim=(0, 8), xticks=[-0.4, -0.2, 0, 0.2, 0.4])  # fmt: skip
    axes.legend(loc="upper right")


def sn_squeeze(axes: Axes) -> None:
    """Draws the squeeze of a positive at 0.5 and one that moves away."""
    spread = numbers(0.0, 1.0)
    ahead = [at(1.2), at(1.2)]  # with 3 images in the support, a positive farther than these negatives is not in it
    for squeeze, colour, style, width in (
        ("nearest", GREEN, "-", 5),
        ("support", BLUE, "-", 2.2),
        ("all", ORANGE, "--", 2.2),
    ):
        both = [
            of_distances(
                SNLoss(num_neighbors=3, scale=1e-9, squeeze_weight=weight, squeeze=squeeze),  # type: ignore[arg-type]
                [at(0.5), 0.5 + spread], ahead,
            )[0]
            for weight in (1.0, 0.0)
        ]  # fmt: skip
        axes.plot(spread, both[0] - both[1], style, color=colour, label=squeeze, lw=width)
    axes.axvline(0.7, color=GREY, lw=1)
    axes.text(0.72, 0.02, "outside the\nsupport", color=GREY, fontsize="x-small", va="bottom")
    axes.set(title="SN: squeeze", xlabel="spread: distance $-$ nearest's", ylabel="squeeze", ylim=(-0.05, 1.1),
             xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "0.25", "0.5", "0.75", "1"])  # fmt: skip
    axes.legend(loc="upper left")


WEIGHTINGS: list[tuple[str, str, Callable[[], HAP2SLoss]]] = [
    (r"$\sigma$ = 0.05", BLUE, lambda: HAP2SLoss(sigma=0.05, margin=100.0)),
    (r"$\sigma$ = 0.5", ORANGE, lambda: HAP2SLoss(sigma=0.5, margin=100.0)),
    (r"$\alpha$ = 10", GREEN, lambda: HAP2SLoss(weighting="polynomial", margin=100.0)),
]


def hap2s_share(axes: Axes) -> None:
    """Draws the share of the weight of one of two images in a set."""
    moving = numbers(0.0, 2.0)
    for name, colour, make in WEIGHTINGS:
        values, _ = of_distances(make(), [at(1.0), moving], [at(1.0)])  # 100 + D+ - 1
        to_positives = values - 99.0
        values, _ = of_distances(make(), [at(1.0)], [at(1.0), moving])  # 100 + 1 - D-
        to_negatives = 101.0 - values
        with np.errstate(invalid="ignore"):
            for style, mean, label in (("-", to_positives, name), ("--", to_negatives, None)):
                axes.plot(moving, (mean - 1) / (moving.numpy() - 1), style, color=colour, label=label)
    axes.plot([0, 1, 1, 2], [0, 0, 1, 1], color=GREY, lw=1.2, label="batch-hard", zorder=1)
    axes.set(
        title="HAP2S: weight", xlabel="distance d, the other at 1", ylabel="share of the weight", ylim=(-0.03, 1.03)
    )
    axes.legend(loc=(0.01, 0.38), fontsize="x-small", borderpad=0, handlelength=1)


def hap2s_slope(axes: Axes) -> None:
    """Draws the slope by the distance that varies."""
    moving = numbers(0.0, 2.0)
    for name, colour, make in WEIGHTINGS:
        _, slopes = of_distances(make(), [at(1.0), moving], [at(1.0)])
        axes.plot(moving, slopes[:, 1], color=colour, label=name)
        _, slopes = of_distances(make(), [at(1.0)], [at(1.0), moving])
        axes.plot(moving, slopes[:, 2], "--", color=colour)
    axes.axhline(0, color=GREY, lw=1)
    for style, name in (("-", "positive"), ("--", "negative")):
        axes.plot([], [], style, color=GREY, label=name)
    axes.legend(*(found[-2:] for found in axes.get_legend_handles_labels()), loc=(0.57, 0.55), fontsize="small")
    axes.set(title="HAP2S: slope", xlabel="distance d, the other at 1", ylabel="slope of the loss")


def fidi(axes: Axes, slope: bool) -> None:
    """Draws the term of a pair, or its slope, beside torchreid's hinge."""
    d = numbers(0.0, 2.0)
    loss = FIDILoss()
    far = at(1e6)  # a negative so far away that it adds nothing
    same, same_slope = of_distances(loss, [d], [far])
    other, other_slope = of_distances(loss, [at(0.0)], [d])
    axes.plot(d, same_slope[:, 0] if slope else same, color=BLUE, label="positive (k = 1)")
    axes.plot(d, other_slope[:, 1] if slope else other, color=ORANGE, label="negative (k = 0)")
    hinge = reid_losses.TripletLoss(margin=0.3).ranking_loss
    moving = d.clone().requires_grad_()
    for colour, triplet in ((BLUE, lambda x: (at(1.0)[0], x)), (ORANGE, lambda x: (x, at(1.0)[0]))):
        terms = torch.stack([hinge(*(t[None] for t in triplet(x)), torch.ones(1)) for x in moving])
        (gradient,) = torch.autograd.grad(terms.sum(), moving)
        line = (gradient if slope else terms).detach()
        axes.plot(d, line, ":", color=colour, lw=2, label="triplet's hinge" if colour == BLUE else None)
    if slope:
        axes.axhline(0, color=GREY, lw=1)
    else:
        bound = float(of_distances(loss, [at(1e6)], [far])[0][0])
        axes.axhline(bound, color=GREY, lw=1)
        axes.text(1.5, bound + 0.04, f"C = {bound:.2f}", va="bottom", color=GREY, fontsize="small")
    axes.set(title=f"FIDI: {'slope' if slope else 'term of a pair'}", xlabel="distance d", xlim=(0, 2),
             ylabel="slope of the term" if slope else "term")  # fmt: skip
    if not slope:
        axes.set_ylim(0, 5)
        axes.legend(loc="upper left", fontsize="x-small", borderpad=0, labelspacing=0.3)


PANELS: dict[str, Callable[[Axes], None]] = {
    "sn-separation": sn_separation,
    "sn-squeeze": sn_squeeze,
    "hap2s-weight": hap2s_share,
    "hap2s-slope": hap2s_slope,
    "fidi-term": lambda axes: fidi(axes, slope=False),
    "fidi-slope": lambda axes: fidi(axes, slope=True),
}


def style(background: str) -> Any:
    """The settings of matplotlib for a light or a dark page."""
    ink = INK[background]
    return {
        "axes.prop_cycle": cycler(color=COLOURS[background]),
        "font.size": 13,
        "axes.titlesize": 14,
        "axes.labelsize": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.xmargin": 0,
        "lines.linewidth": 2.2,
        "legend.frameon": False,
        "legend.handlelength": 1.4,
        "legend.fontsize": "small",
        "svg.hashsalt": "penalties",  # makes the files reproducible
        "savefig.transparent": True,
        **{f"{name}.color": ink for name in ("text", "xtick", "ytick")},
        **{f"axes.{name}": ink for name in ("edgecolor", "labelcolor", "titlecolor")},
    }


def main(folder: Path) -> None:
    """Writes each panel for light and for dark pages, and one image with all panels."""
    for background in INK:
        with plt.rc_context(style(background)):
            for name, draw in PANELS.items():
                figure, axes = plt.subplots(figsize=(3.8, 3.2), layout="constrained")
                draw(axes)
                end = "" if background == "light" else "-dark"
                figure.savefig(folder / f"penalties-{name}{end}.svg", metadata={"Date": None})
                plt.close(figure)
    with plt.rc_context({**style("light"), "savefig.transparent": False}):
        figure, axes = plt.subplots(2, 3, figsize=(10.7, 6.8), layout="constrained")
        for draw, each in zip(PANELS.values(), axes.T.flat):
            draw(each)
        figure.savefig(folder / "penalties.png", dpi=150, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
