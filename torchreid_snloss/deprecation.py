"""Old names that keep working for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["renamed"]


def renamed(module: str, new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes a `__getattr__` for a module that resolves its deprecated names.

    Args:
        module: the module's `__name__`.
        new_names: for each old name, the full new one, such as `"torchreid_snloss.losses.means"`.
    """

    def find(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module, _, new_name = new_names[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} is now {new_names[name]}; the old name will be removed in 0.4",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(new_module), new_name)

    return find
