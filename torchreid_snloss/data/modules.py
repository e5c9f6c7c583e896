"""Imports the modules that `data.modules` names, which register a user's own data sets, and names unknown data sets."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence

from torchreid import data

from torchreid_snloss.errors import text_of, where_raised

__all__ = ["import_modules", "unknown_dataset"]


def import_modules(names: Iterable[str]) -> None:
    """Imports Python files or modules by their names, each once in a process.

    Importing runs their code, as any import does. Afterwards `sys.path` ends with the folder of each file, or with the
    working directory for the name of a module, so that a loader's workers, which get `sys.path`, find the classes too.

    Args:
        names: Paths that end in `.py`, or names as in an `import` statement.

    Raises:
        ValueError: If there is no such file or module, its name belongs to another module, or its code raises an error.
    """
    for name in names:
        if name.endswith(".py"):
            folder, file = os.path.split(os.path.abspath(os.path.expanduser(name)))
            if not os.path.isfile(os.path.join(folder, file)):
                raise ValueError(f"data.modules: there is no file {name!r}")
            if "." in file.removesuffix(".py"):
                raise ValueError(
                    f"data.modules: a module's file must have no dots in its name but in .py, got {name!r}"
                )
            _import(name, file.removesuffix(".py"), folder)
            _check_is_file(name, file.removesuffix(".py"), os.path.join(folder, file))
        else:
            _import(name, name, os.getcwd())


def _import(given: str, module: str, folder: str) -> None:
    # At the end, so that a file in the folder does not take the place of a module that other code imports.
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # raised by the user's own code
        raised = where_raised(error)
        where = f" ({os.path.basename(raised[0].f_code.co_filename)}, line {raised[1]})" if raised else ""
        text = text_of(error)
        kind = "" if text == type(error).__name__ else f"{type(error).__name__}: "
        raise ValueError(f"data.modules: can't import {given!r}: {kind}{text}{where}") from error


def _check_is_file(given: str, module: str, path: str) -> None:
    found = getattr(sys.modules[module], "__file__", None)
    if found is None or os.path.realpath(found) != os.path.realpath(path):
        raise ValueError(
            f"data.modules: {given!r} has the name of another module, {found or module!r}: give the file another name"
        )


def unknown_dataset(key: str, names: Sequence[str], kind: str) -> str:
    """What is wrong with the names of data sets, in words; empty if all are registered.

    Args:
        key: The key of the config that holds the names.
        names: The names.
        kind: `image` or `video`.
    """
    known = vars(data.datasets)[f"__{kind}_datasets"]
    unknown = [name for name in names if name not in known]
    if not unknown:
        return ""
    own = ". Images in a folder of your own are the data set folder" if kind == "image" else ""
    return (
        f"{key}: there is no {kind} data set {unknown[0]!r}, only {', '.join(known)}{own}. To add a data set, call "
        f"torchreid.data.register_{kind}_dataset({unknown[0]!r}, ...) in a Python file and name it: "
        "data.modules my_data.py"
    )
