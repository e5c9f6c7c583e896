"""Test runs need no training images: a data set whose training folder is missing or empty loads all the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

__all__ = ["for_test_run", "is_test_run", "test_run", "with_optional_training_folder"]

_without_training: ContextVar[list[str] | None] = ContextVar("without_training", default=None)


def for_test_run(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a data manager that loads the targets alone.

    Args:
        keywords: Those of a training run.
    """
    changed = {"sources": keywords["targets"], "train_sampler": "RandomSampler", "load_train_targets": False}
    return {**keywords, **{key: value for key, value in changed.items() if key in keywords}}


@contextlib.contextmanager
def test_run(testing: bool) -> Iterator[list[str]]:
    """Within it data sets need no training images if `testing` is set.

    Yields:
        A list that gets the name of each data set which has none.
    """
    found: list[str] = []
    token = _without_training.set(found if testing else None)
    try:
        yield found
    finally:
        _without_training.reset(token)


def is_test_run(name: str = "") -> bool:
    """Whether data sets need no training images now.

    Args:
        name: The name of a data set that has none, to be noted.
    """
    found = _without_training.get()
    if found is not None and name and name not in found:
        found.append(name)
    return found is not None


def with_optional_training_folder(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Makes torchreid's `Dataset.check_before_run` not look for the training folder in a test run.

    Args:
        check: torchreid's method.
    """

    @functools.wraps(check)
    def check_files(self: Any, required_files: Any) -> None:
        files = [required_files] if isinstance(required_files, str) else list(required_files)
        if is_test_run():
            files = [file for file in files if file != getattr(self, "train_dir", None)]
        check(self, files)

    return check_files
