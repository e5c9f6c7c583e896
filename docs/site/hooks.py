"""What the site builds itself: the table of every key, and formulas as MathML."""

from __future__ import annotations

import ast
import html
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

from latex2mathml.converter import convert

from torchreid_snloss import config
from torchreid_snloss.engine import MetricEngine
from torchreid_snloss.losses import LOSSES

_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_ARG = re.compile(r"(\w+): (.*?)(?=\n\w+(?:, \w+)*: |\Z)", re.DOTALL)
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
    """A table for each section of the config, of every key in it: type, default, meaning."""
    notes = meanings()
    sections: dict[str, list[str]] = {}
    for key, leaf in config.leaves(config.get_default_config()):
        value = dict(leaf) if isinstance(leaf, Mapping) else leaf
        parts = key.split(".")
        section = ".".join(parts[:2]) if parts[0] == "loss" and len(parts) > 2 else parts[0]
        default = "where there is a GPU" if key == "use_gpu" else f"`{value!r}`"
        row = f"| `{key}` | {type(value).__name__} | {default} | {_cell(notes.get(key, ''))} |"
        sections.setdefault(section if len(parts) > 1 else "use_gpu", []).append(row)
    pieces = []
    sections["use_gpu"] = sections.pop("use_gpu")  # last
    for section, rows in sections.items():
        intro = notes.get(f"{section}.", "")
        head = f"## {section}\n\n" + (f"{intro[:1].upper()}{intro[1:]}.\n\n" if intro else "")
        pieces.append(f"{head}| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(pieces)


def meanings() -> dict[str, str]:
    """What each key means, as the code says: comments in config.py, docstrings of the losses and of the engine.

    Returns:
        by key; a node's own comment under its name and a dot.
    """
    source = inspect.getsource(config)
    found: dict[str, str] = {}
    engine = arguments(MetricEngine)
    for name, loss in LOSSES.items():
        names = {"normalize", "block_size"}
        base = {key: text for key, text in arguments(loss.__mro__[1]).items() if key in names}
        texts = {**base, **{key: text for key, text in arguments(loss).items() if "see :class:" not in text}}
        found |= {f"loss.{name}.{key}": text for key, text in texts.items()}
        found |= {f"loss.{name}.{key}": engine[key] for key in ("weight_m", "weight_x")}
    found |= {"use_gpu": engine["use_gpu"]}
    return found | dict(comments(source))


def comments(source: str) -> Iterator[tuple[str, str]]:
    """The comments behind keys in the dictionaries of config.py.

    A comment belongs to the key that its line starts with; where a value goes on over lines, to that of its first.
    """
    behind = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Dict):
            yield from _comments_in(statement.value, "", behind)


def _comments_in(node: ast.Dict, path: str, behind: dict[int, str]) -> Iterator[tuple[str, str]]:
    lines = [key.lineno for key in node.keys if key is not None]
    for key, value in zip(node.keys, node.values):
        if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
            continue
        inner = isinstance(value, ast.Dict) and bool(value.keys)
        alone = lines.count(key.lineno) == 1 and not (inner and value.end_lineno == key.lineno)
        if alone and key.lineno in behind:
            yield f"{path}{key.value}" + ("." if inner else ""), behind[key.lineno]
        if isinstance(value, ast.Dict):
            yield from _comments_in(value, f"{path}{key.value}.", behind)


def arguments(cls: type) -> dict[str, str]:
    """The ``Args:`` of a class's docstring, each without line breaks."""
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n((?: .*\n|\n)+)", text + "\n", re.MULTILINE)
    body = inspect.cleandoc(section[1]) if section else ""
    return {name: " ".join(meaning.split()) for name, meaning in _ARG.findall(body)}


def _cell(text: str) -> str:
    text = _DEFAULT.sub(lambda m: f" The default is {m[1].strip(' ,()')}." if m[1].strip() else "", text)
    text = re.sub(r":(?:class|func|meth):`([^`]+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
    return text.rstrip(".")
