"""What the charts of the report share: colours, markers, legends, and SVG in the text colour of the page."""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from torchreid_snloss.compare.backend import Axes, Figure, PolyCollection
from torchreid_snloss.compare.variants import CONTROL, SOFTMAX

__all__ = [
    "COLORS",
    "INK",
    "MARKERS",
    "STYLE",
    "Style",
    "color_of",
    "hover_strips",
    "legend",
    "legend_columns",
    "seeds_text",
    "shortened",
    "styles_of",
    "to_svg",
]

# The colour-blind safe palette of Okabe and Ito, a little lighter or darker so that each has a contrast of 3 to 1 on
# the white and on the black of the page, and three more colours. Variants differ in their markers, too.
COLORS = ("#d55e00", "#2f8fd0", "#00a67a", "#b58900", "#7e6bd1", "#c26fa2", "#8a9a2b", "#a5673f", "#e0405a", "#2f9fb3")
MARKERS = "sD^vP*X<>ph"
_LINES = ("-", "--", ":", "-.")
_BASELINE_STYLES = {CONTROL: ("#6d747c", "o", "-"), SOFTMAX: ("#858c94", "o", "--")}
_OWN_COLORS = ("triplet", "sn", "hap2s", "fidi")  # names that have the first colours to themselves
_LONGEST_NAME = 28  # characters of a variant's name in a chart
INK = "#0a0b0c"  # a placeholder for the text colour of the page
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SVG_METADATA = ("Creator", "Date", "Format", "Type")  # left out of the file
ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "torchreid-snloss",  # the same figure gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
}


class Style(NamedTuple):
    """How a variant is drawn."""

    color: str
    marker: str
    linestyle: str


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """Gives each variant, or each loss term, a style by its name, so that it looks the same in every report.

    The baselines are grey and the losses have fixed colours. Of other names that ask for the same colour, the first in
    the alphabet gets it; their order in the comparison does not matter.
    """
    styles = {name: Style(*style) for name, style in _BASELINE_STYLES.items()}
    styles |= {name: Style(COLORS[place], MARKERS[place], "-") for place, name in enumerate(_OWN_COLORS)}
    first, number = len(_OWN_COLORS), len(COLORS) - len(_OWN_COLORS)
    taken: set[tuple[int, int]] = set()
    for name in sorted({*names} - {*styles}):
        wanted = zlib.crc32(name.encode()) % number
        line, place = next(
            found
            for step in range(len(taken) + 1)
            if (found := (step // number, first + (wanted + step) % number)) not in taken
        )
        taken.add((line, place))
        styles[name] = Style(COLORS[place], MARKERS[(place + line) % len(MARKERS)], _LINES[line % len(_LINES)])
    return styles


def color_of(number: int) -> str:
    """The colour of the item with this number, from 0; the colours repeat."""
    return COLORS[number % len(COLORS)]


def shortened(name: str) -> str:
    """A name for a chart: a long one without its middle, since similar names often differ at the end."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[1 - half :]}"


def legend_columns(names: Iterable[str], width: float) -> int:
    """How many columns of a legend fit below a figure that is `width` inches wide."""
    inches = np.array([0.5 + 0.075 * len(shortened(name)) for name in names])  # the handle, and 9 points a letter
    fitting = [
        columns
        for columns in range(1, len(inches) + 1)
        if sum(part.max() for part in np.array_split(inches, columns)) <= width
    ]
    return max(fitting, default=1)


def legend(figure: Figure, columns: int) -> None:
    """Puts the legend of the first axes below everything, where it covers no curve."""
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=9)


def seeds_text(by_seed: Mapping[int, float], sign: str = "") -> str:
    """The values of the seeds in words, such as `"seed 1: 52.3, seed 2: 54.0"`, with a sign where `sign` is `"+"`."""
    return ", ".join(f"seed {seed}: {value:{sign}.1f}" for seed, value in by_seed.items())


def hover_strips(axes: Axes, centers: Sequence[float], along: str = "x") -> str:
    """Covers the axes with strips that can't be seen, one around each of the places, for `to_svg` to give them texts.

    Whoever points anywhere in a strip sees its text, however small and close the points in it are.

    Args:
        axes: The axes, whose limits must be final, and which have no strips yet.
        centers: The places in ascending order, in the axes' units.
        along: The axis of the places, `"x"` or `"y"`.

    Returns:
        The id of the strips.
    """
    low, high = sorted(axes.get_xlim() if along == "x" else axes.get_ylim())
    middles = [(left + right) / 2 for left, right in itertools.pairwise(centers)]
    edges = [min(low, centers[0]), *middles, max(high, centers[-1])]
    corners = [[(start, 0.0), (end, 0.0), (end, 1.0), (start, 1.0)] for start, end in itertools.pairwise(edges)]
    transform = axes.get_xaxis_transform()
    if along == "y":
        corners, transform = [[(y, x) for x, y in strip] for strip in corners], axes.get_yaxis_transform()
    name = f"strips-{axes.figure.axes.index(axes)}"
    strips = PolyCollection(corners, transform=transform, facecolors=INK, gid=name, zorder=10)
    axes.add_collection(strips, autolim=False)
    return name


def to_svg(figure: Figure, label: str, titles: Mapping[str, str | Sequence[str]] | None = None) -> Markup:
    """The figure as an `<svg>` element for an HTML page.

    Args:
        figure: The figure.
        label: The text for screen readers.
        titles: What browsers show where the pointer is: by the id of an artist one text, or a text for each of the
            strips that `hover_strips` has drawn.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_SVG_METADATA))
    svg = ElementTree.fromstring(stream.getvalue().replace(INK, "currentColor"))
    for name in ("width", "height"):  # the page sets the size
        del svg.attrib[name]
    svg.attrib.update({"role": "img", "aria-label": label})
    for gid, texts in (titles or {}).items():
        _add_titles(svg, gid, texts)
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


def _add_titles(svg: ElementTree.Element, gid: str, texts: str | Sequence[str]) -> None:
    group = next(element for element in svg.iter(f"{_SVG}g") if element.get("id") == gid)
    shapes = [group] if isinstance(texts, str) else group.findall(f".//{_SVG}path")
    for shape, text in zip(shapes, [texts] if isinstance(texts, str) else texts, strict=True):
        if shape is not group:
            shape.attrib = {"d": shape.attrib["d"], "class": "strip", "fill": "currentColor", "fill-opacity": "0"}
        title = ElementTree.Element(f"{_SVG}title")
        title.text = text
        shape.insert(0, title)
