"""Makes the trials and the runs of a comparison that are missing. A row that fails does not keep the others from it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.compare.jobs import Place, print_line, run_side_by_side
from torchreid_snloss.compare.plan import Plan, TunedValues
from torchreid_snloss.compare.runs import STOPPED, Run, RunFailedError
from torchreid_snloss.compare.tuning import Tuning
from torchreid_snloss.config import ConfigError
from torchreid_snloss.run.lock import FolderInUseError, locked

__all__ = ["Execution"]


class Execution:
    """Makes trials and runs, and keeps which rows have failed.

    Args:
        jobs: How many run at a time.
        use_gpu: Whether each gets a GPU rather than a share of the cores.

    Attributes:
        failed: What failed and why, in a line, by the name of the row. Nothing more is made of these rows.
    """

    def __init__(self, jobs: int, use_gpu: bool) -> None:
        self._jobs, self._use_gpu = jobs, use_gpu
        self.failed: dict[str, str] = {}

    def tune(self, plan: Plan, tunings: Sequence[Tuning]) -> int:
        """Makes the trials that are missing, in turn for all rows. Returns the exit code; a failed row is none."""

        def task(tuning: Tuning) -> Callable[[Place], int]:
            return lambda place: self._unless_failed(tuning.variant.name, lambda: tuning.execute(place))

        tasks = [task(tuning) for turn in range(plan.trials) for tuning in tunings if turn < tuning.left]
        try:
            with locked(plan.condition / "tuning"):
                code = run_side_by_side(tasks, self._jobs, self._use_gpu)
        except FolderInUseError as error:
            raise ConfigError(f"{error}: another comparison makes its trials there") from error
        if code:
            _print_interrupted("the tuning")
        return code

    def tuned_values(self, plan: Plan, tunings: Sequence[Tuning]) -> TunedValues:
        """The values that the tunings have found for the rows, each also as a config file beside the trials."""
        found = {}
        for tuning in tunings:
            if tuning.variant.name in self.failed:
                continue
            try:
                best = tuning.best
            except ConfigError as error:  # all trials have failed or were ended early
                self.failed[tuning.variant.name] = str(error)
                continue
            path = plan.tuning_folder(tuning.variant, tuning.split) / f"best-of-{plan.trials}.yaml"
            text = plan.config_of(tuning.variant, tuning.split, best.values)
            atomic_write(path, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
            values = ", ".join(f"{key} {value}" for key, value in best.values.items())
            print(f"=> {tuning.name}: {values} (mAP {best.mean_ap:.1%} on the held-out identities), in {path}")
            found[tuning.variant.name, tuning.split] = best.values
        return {key: values for key, values in found.items() if key[0] not in self.failed}

    def train(self, runs: Sequence[Run]) -> int:
        """Makes the runs that are not finished. Returns the exit code; a failed row is none."""
        began, done = time.monotonic(), {run for run in runs if run.finished()}
        finished_before, is_said = len(done), False

        def execute(number: int, run: Run, place: Place) -> int:
            nonlocal is_said
            name = f"run {number} of {len(runs)}: {run.name}"
            if run in done:
                print_line(f"=> {name}: already finished")
                return 0
            print_line(f"=> {name}, in {run.folder}")
            if code := run.execute(place):
                if code not in STOPPED:
                    raise RunFailedError(run.failure(run.name, code))
                _print_interrupted(name)
                is_said = True
                return code
            done.add(run)
            left = sum(run not in done and run.variant not in self.failed for run in runs)
            made, to_make = (math.ceil(count / self._jobs) for count in (len(done) - finished_before, left))  # in turn
            minutes = (time.monotonic() - began) / made * to_make / 60
            about = f", about {minutes:.0f} min" if left else ""
            print_line(f"   {run.name}: {run.summary()}; {left} to go{about}")
            return 0

        def task(number: int, run: Run) -> Callable[[Place], int]:
            return lambda place: self._unless_failed(run.variant, lambda: execute(number, run, place))

        code = run_side_by_side(
            [task(number, run) for number, run in enumerate(runs, start=1)], self._jobs, self._use_gpu
        )
        if code and not is_said:  # as when all runs that had their turn were finished before
            _print_interrupted("the comparison")
        return code

    def print_failures(self) -> None:
        """Says which rows have failed and why, a line for each."""
        for text in self.failed.values():
            print_line(f"torchreid-snloss-compare: {text}", sys.stderr)

    def _unless_failed(self, variant: str, execute: Callable[[], int]) -> int:
        """Does what a row needs next, unless the row has failed. A failure of its own is no reason to stop the rest."""
        if variant in self.failed:
            return 0
        try:
            return execute()
        except RunFailedError as error:
            self.failed.setdefault(variant, str(error))
            print_line(f"   {error}; any other rows go on")
            return 0


def _print_interrupted(name: str) -> None:
    print_line(f"torchreid-snloss-compare: {name} was interrupted; repeat the command to resume", sys.stderr)
