"""The package's docstrings for the site: Sphinx's roles and directives become Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod):`\.?([^`]+)`")
_MATH = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n|\s*\n)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example::?\n\n?((?: +.*\n|\s*\n)+)", re.MULTILINE)
_SPHINX = re.compile(r":(?:class|func|meth|mod|math):`|^ *\.\. math::|(?<!`)``(?!`)", re.MULTILINE)


class SphinxToMarkdown(Extension):
    """Rewrites every docstring when it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A docstring without Sphinx's markup.

    Args:
        text: the docstring, dedented; one without Sphinx's markup is Markdown already, and stays as it is.
    """
    if not _SPHINX.search(text):
        return text
    text = _MATH.sub(lambda m: f"{m[1]}\\[{' '.join(m[2].split())}\\]\n\n", text + "\n")
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = _ROLE.sub(lambda m: f"`{m[1].removeprefix('torchreid_snloss.')}`", text).replace("``", "`")
    text = re.sub(r"(?<=: )>(?=[ =])", r"\\>", text)  # else a quotation
    return _EXAMPLE.sub(_example, text).rstrip()


def _example(match: re.Match[str]) -> str:
    code = textwrap.dedent(match[1]).strip("\n")
    return f"Example:\n\n```{'pycon' if code.startswith('>>>') else 'python'}\n{code}\n```\n\n"
