"""What the site builds itself: the table of every key, and formulas as MathML."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Mapping
from typing import Any

from latex2mathml.converter import convert

from torchreid_snloss import config
from torchreid_snloss.config import keys
from torchreid_snloss.engine import MetricEngine
from torchreid_snloss.losses import LOSSES

_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_ARG = re.compile(r"(\w+): (.*?)(?=\n\w+(?:, \w+)*: |\Z)", re.DOTALL)
_SEE = re.compile("see ", re.IGNORECASE)  # the base's text
_DEFAULT = re.compile(r" Default is (?:True|False|[\d.]*\d)(.*?)\.(?= |$)")


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Puts the table of keys where a page has the mark for it. A page without sections gets the room of their list."""
    if page is not None and "\n## " not in markdown:
        page.meta["hide"] = ["toc"]
    return markdown.replace("<!-- every key -->", keys_page()) if "<!-- every key -->" in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Puts MathML, which browsers draw themselves, in the place of TeX."""
    return _MATH.sub(_to_mathml, html)


def _to_mathml(match: re.Match[str]) -> str:
    tag, tex = match[1], html.unescape(match[2])
    return f'<{tag} class="arithmatex">{convert(tex, display="block" if tag == "div" else "inline")}</{tag}>'


def keys_page() -> str:
    """A table for each section of the config, of every key in it: type, range, default, meaning."""
    notes, table = meanings(), keys.all_keys()
    sections: dict[str, list[str]] = {}
    for key, leaf in config.leaves(config.get_default_config()):
        value = dict(leaf) if isinstance(leaf, Mapping) else leaf
        parts = key.split(".")
        section = ".".join(parts[:2]) if len(parts) > 2 else parts[0]
        default = "where there is a GPU" if key == "use_gpu" else f"`{value!r}`"
        allowed = table[key].range
        bounds = f"{allowed.bounds}{', or None' if allowed.none else ''}"
        row = f"| `{key}` | {allowed.kind.__name__} | {bounds} | {default} | {_cell(notes[key])} |"
        sections.setdefault(section if len(parts) > 1 else "use_gpu", []).append(row)
    pieces = []
    sections["use_gpu"] = sections.pop("use_gpu")  # last
    for section, rows in sections.items():
        intro = keys.SECTIONS.get(section, "")
        head = f"## {section}\n\n" + (f"{intro[:1].upper()}{intro[1:]}.\n\n" if intro else "")
        pieces.append(f"{head}| key | type | range | default | meaning |\n|---|---|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(pieces)


def meanings() -> dict[str, str]:
    """What each key means, as the code says: the tables of keys, and the docstrings of the losses and of the engine."""
    engine = arguments(MetricEngine)
    found = {key: known.text for key, known in keys.all_keys().items() if known.text}
    for name, loss in LOSSES.items():
        shared = arguments(loss.__mro__[1])
        texts = {**shared, **{key: text for key, text in arguments(loss).items() if not _SEE.match(text)}}
        texts |= {key: engine[key] for key in keys.WEIGHTS}
        found |= {f"loss.{name}.{key}": text for key, text in texts.items()}
    return found | {"use_gpu": engine["use_gpu"]}


def arguments(cls: type) -> dict[str, str]:
    """The `Args:` of a class's docstring, each without line breaks."""
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n((?: .*\n|\n)+)", text + "\n", re.MULTILINE)
    body = inspect.cleandoc(section[1]) if section else ""
    return {name: " ".join(meaning.split()) for name, meaning in _ARG.findall(body)}


def _cell(text: str) -> str:
    text = _DEFAULT.sub(lambda m: f" The default is {m[1].strip(' ,()')}." if m[1].strip() else "", text)
    text = text.replace("|", "\\|")
    return text[:1].upper() + text[1:].rstrip(".")
