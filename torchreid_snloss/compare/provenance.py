"""Where the results of a report come from: when, with what and on what the runs were made, and their configs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchreid_snloss import environment
from torchreid_snloss.compare.runs import Run, by_variant

__all__ = ["Provenance"]

_OF_EACH_RUN = ("data.save_dir", "train.seed")  # they differ in any comparison


@dataclass(frozen=True)
class Provenance:
    """When, with what and on what the runs were made, and their configs.

    Attributes:
        drawn: The date of the report.
        drawn_with: The versions that drew it.
        began: The first and the last time at which a run began, one if they are the same; empty if none is known.
        versions: The versions that trained, each once.
        hardware: The hardware that trained, each once.
        unknown: The number of runs whose records, of this package before 0.3, do not say.
        shared: The keys and values that all runs have in common, a line for each, as options have them.
        differing: The values of each variant by key, where runs differ; values of several runs are separated by " or ".
    """

    drawn: str
    drawn_with: str
    began: list[str]
    versions: list[str]
    hardware: list[str]
    unknown: int
    shared: str
    differing: dict[str, list[str]]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Provenance:
        """Reads the records and settings of the runs, those of a variant next to each other."""
        of_runs = [run.record().sessions for run in runs]
        sessions = [session for of_run in of_runs for session in of_run]
        dates = sorted(session["began"] for session in sessions)
        values = [run.settings.values for run in runs]
        keys = {key: [_text(of_run[key]) for of_run in values] for key in sorted(values[0])}
        differing = {key: of_key for key, of_key in keys.items() if len({*of_key}) > 1}
        names = [run.variant for run in runs]
        return cls(
            drawn=f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
            drawn_with=environment.versions(),
            began=list(dict.fromkeys([dates[0], dates[-1]])) if dates else [],
            versions=list(dict.fromkeys(session["versions"] for session in sessions)),
            hardware=list(dict.fromkeys(session["hardware"] for session in sessions)),
            unknown=sum(not of_run for of_run in of_runs),
            shared="\n".join(f"{key} {of_key[0]}" for key, of_key in keys.items() if key not in differing),
            differing={
                key: [
                    " or ".join(dict.fromkeys(own for name, own in zip(names, of_key) if name == variant))
                    for variant in by_variant(runs)
                ]
                for key, of_key in differing.items()
                if key not in _OF_EACH_RUN
            },
        )


def _text(value: Any) -> str:
    """A value as an option of the command line has it."""
    return "''" if value == "" else str(value)
