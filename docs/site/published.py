"""What the site has where it is published: edit links, a link to the repository, and a list of versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PYPROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


def on_config(config: Any, **_: Any) -> Any:
    """Adds them if `repository` in pyproject.toml has an address. Without one the site is for reading from a disk."""
    setting = re.search(r'^repository = "(.*)"', _PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    if setting is None:
        raise ValueError(f"{_PYPROJECT} has no line: repository = ...")
    repository = setting[1].rstrip("/")
    if repository:
        config.repo_url = repository
        config.repo_name = "/".join(repository.split("/")[-2:])
        config.edit_uri = "edit/main/docs/"
        config.theme["features"].append("content.action.edit")
        config.extra["version"] = {"provider": "mike", "default": "latest"}
    return config
