"""What the charts of the report share: colours, markers, legends, and SVG in the text colour of the page."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from torchreid_snloss.compare.backend import Figure
from torchreid_snloss.compare.variants import CONTROL, SOFTMAX

__all__ = [
    "COLORS",
    "INK",
    "MARKERS",
    "STYLE",
    "Style",
    "color_of",
    "legend",
    "legend_columns",
    "shortened",
    "styles_of",
    "to_svg",
]

# The colour-blind safe palette of Okabe and Ito, a little lighter or darker so that it shows on white and on black, and
# three more colours. Variants differ in their markers, too.
COLORS = ("#d55e00", "#2f8fd0", "#00a67a", "#c79a00", "#7e6bd1", "#cf7fb0", "#8a9a2b", "#a5673f", "#e0405a", "#4fb7c9")
MARKERS = "sD^vP*X<>ph"
_BASELINE_STYLES = {CONTROL: ("#6d747c", "o", "-"), SOFTMAX: ("#a0a6ad", "o", "--")}
_LONGEST_NAME = 28  # characters of a variant's name in a chart
INK = "#0a0b0c"  # a placeholder for the text colour of the page
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


def styles_of(variants: Iterable[str]) -> dict[str, Style]:
    """Gives each variant a style: the baselines are grey, and the others have colours in their order."""
    others = [name for name in variants if name not in _BASELINE_STYLES]
    styles = {name: Style(*style) for name, style in _BASELINE_STYLES.items()}
    for number, name in enumerate(others):
        linestyle = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        styles[name] = Style(color_of(number), MARKERS[number % len(MARKERS)], linestyle)
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


def to_svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element for an HTML page, with `label` as the text for screen readers."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_SVG_METADATA))
    svg = ElementTree.fromstring(stream.getvalue().replace(INK, "currentColor"))
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
