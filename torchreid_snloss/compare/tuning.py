"""Tuning: trials of a variant, chosen by Optuna and judged by mAP on training identities that are held out."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchreid_snloss.compare.jobs import Place, print_line
from torchreid_snloss.compare.journal import mend
from torchreid_snloss.compare.plan import Plan
from torchreid_snloss.compare.runs import STOPPED, Run, RunFailedError, check_folder, neutral_keys
from torchreid_snloss.compare.search import check_values, rounded, search_space
from torchreid_snloss.compare.trial import Trial, mean_aps, summary
from torchreid_snloss.compare.variants import Variant
from torchreid_snloss.config import ConfigError
from torchreid_snloss.errors import text_of
from torchreid_snloss.losses import Interval

_optuna_is_there = importlib.util.find_spec("optuna") is not None
if _optuna_is_there:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

__all__ = ["MOST_TRIALS", "Tuning", "check_available"]

_JOURNAL, _PRUNED, _SEARCH, _IMAGES, _FOLDS = "journal.log", "pruned", "search ", "images", "folds"
MOST_TRIALS = 10_000  # of a split, whose seeds do not meet those of the next
_STARTUP_TRIALS = 4  # the trials at random before TPE has enough to go by


def check_available() -> None:
    """Raises ConfigError if Optuna is not installed."""
    if not _optuna_is_there:
        raise ConfigError("--tune needs Optuna: pip install 'torchreid-snloss[tune]'")


class Tuning:
    """The trials of one variant on one split. They are kept in a journal, from which an interrupted tuning goes on.

    The first trial has the config's own values, the next three are drawn at random, and Optuna's TPE sampler chooses
    the others. Its median pruner ends a trial whose learning curve stays below the median of the earlier trials that
    came to their end (Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019). With
    several folds this is the curve of the first; at the end of each, the mean so far is compared with those trials'
    means over the same folds.

    Which values the trial of a number gets depends only on the trials that have ended by then. So an interruption
    changes nothing, unless trials of this variant run side by side, as they may with `--jobs 2`.

    Args:
        plan: The plan of the comparison.
        variant: The variant.
        split: The number of the split.
        images: A digest of the images of the trials, which those of earlier trials must have too; empty if it is
            unknown.

    Attributes:
        variant: The variant.
        split: The number of the split.
        folds: The number of runs of each trial, which make up its mAP.
        space: The values that are tried, by key.

    Raises:
        ConfigError: If a value of the search space can't be run with, the folder holds trials that were made with other
            settings, or its journal is damaged.
    """

    def __init__(self, plan: Plan, variant: Variant, split: int, images: str = "") -> None:
        self.variant, self.split, self.folds = variant, split, plan.folds
        self._plan, self._images = plan, images
        self._folder = plan.tuning_folder(variant, split)
        check_folder(self._folder)
        self._default = plan.trial(variant, split, 0, {}).settings
        self._neutral = neutral_keys(self._default, split)
        self.space = search_space(variant, self._default)
        if not self.space:
            raise ConfigError(
                f"{variant.name}: --tune has nothing to try, since the row sets train.lr itself: add a search"
            )
        check_values(variant, self.space, self._default, lambda values: plan.trial(variant, split, 0, values))
        self._asking = threading.Lock()
        self._taken: set[int] = set()
        self._study: Any = None
        if (self._folder / _JOURNAL).exists():  # what is there is checked before the first run
            self._open()

    @property
    def name(self) -> str:
        """What the tuning is called in messages."""
        return self.variant.name + (f", split {self.split}" if self.split else "")

    @property
    def trials(self) -> list[Trial]:
        """The trials so far, of those that the plan asks for."""
        found = self._study.get_trials(deepcopy=False) if self._study is not None else []
        return [self._to_trial(trial) for trial in found if trial.number < self._plan.trials and trial.params]

    @property
    def left(self) -> int:
        """The number of trials that are not finished."""
        return self._plan.trials - sum(trial.state != "running" for trial in self.trials)

    @property
    def best(self) -> Trial:
        """The trial with the highest mAP among those that came to their end.

        Raises:
            ConfigError: If there is none.
        """
        finished = [trial for trial in self.trials if trial.state == "finished"]
        if not finished:
            raise ConfigError(f"{self.name}: no trial of the tuning came to its end, look at {self._folder}")
        return max(finished, key=lambda trial: (trial.mean_ap or 0.0, -trial.number))

    def execute(self, place: Place) -> int:
        """Makes the next trial, or goes on with one that was interrupted.

        Returns:
            The exit code: 0 also for a pruned trial, and for one that its values made fail, unless it is the first.

        Raises:
            RunFailedError: If the first trial has failed, or another one for want of room, memory or data.
        """
        with self._asking:
            self._open()
            trial = self._next()
            values = {key: self._suggest(trial, key) for key in self.space}
        name = f"{self.name}, trial {trial.number} ({trial.number + 1} of {self._plan.trials})"
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        print_line(f"=> {name}: {shown}")
        try:
            runs = [
                replace(self._plan.trial(self.variant, self.split, trial.number, values, fold), images=self._images)
                for fold in range(self.folds)
            ]
        except ConfigError as error:  # each value alone is possible, but not together
            self._study.tell(trial, state=TrialState.FAIL)
            print_line(f"   {name}: failed, {error}")
            return 0
        run, code = self._train(trial, runs, place)
        if not self._report(trial, runs):
            self._study.tell(trial, state=TrialState.PRUNED)
            ended = "below the median, ended early"
        elif code == 0:
            self._study.tell(trial, mean_aps(runs)[self._epochs])
            ended = f"{summary(runs)} on the held-out identities"
        elif trial.number > 0 and run.failed_by_its_values(code, values):
            self._study.tell(trial, state=TrialState.FAIL)
            ended = "failed"
        else:
            self._taken.discard(trial.number)
            if code not in STOPPED:
                raise RunFailedError(run.failure(f"{self.name}, trial {trial.number}", code))
            return code
        for run in runs:
            shutil.rmtree(run.folder / "model", ignore_errors=True)  # nobody needs the checkpoints of a trial
        print_line(f"   {name}: {ended}")
        return 0

    def _train(self, trial: Any, runs: Sequence[Run], place: Place) -> tuple[Run, int]:
        """Makes the runs of a trial until it ends. Returns the last of them and its exit code."""
        for run in runs:
            run.check()
        for run in runs:
            code = 0 if run.finished() else run.execute(place, lambda: self._report(trial, runs))
            if code or not self._report(trial, runs):
                break
        return run, code

    def _next(self) -> Any:
        unfinished = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for frozen in unfinished:
            if frozen.number not in self._taken:
                self._taken.add(frozen.number)
                self._study.sampler = _sampler(self.split, frozen.number)  # for values that it had not got yet
                return optuna.trial.Trial(self._study, frozen._trial_id)
        # A new sampler for each trial: what it draws must not depend on how many trials this process has made.
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(self.split, number)
        if number == 0:
            self._study.enqueue_trial({key: self._default.values[key] for key in self.space})
        trial = self._study.ask()
        self._taken.add(trial.number)
        return trial

    def _suggest(self, trial: Any, key: str) -> Any:
        values = self.space[key]
        if isinstance(values, tuple):
            return trial.suggest_categorical(key, values)
        if type(self._default.values[key]) is int:
            return trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
        return self._as_tried(key, trial.suggest_float(key, values.low, values.high, log=values.log))

    def _as_tried(self, key: str, value: Any) -> Any:
        """What a trial has of a value of Optuna's: fewer digits of what was drawn, but all of what the config gives."""
        values = self.space.get(key)
        if not isinstance(values, Interval) or not isinstance(value, float) or value == self._default.values[key]:
            return value
        return min(max(rounded(value), values.low), values.high)

    @property
    def _epochs(self) -> int:
        """The epochs of a whole trial, with all folds."""
        return self.folds * self._default.max_epoch

    def _report(self, trial: Any, runs: Sequence[Run]) -> bool:
        """Tells Optuna the mAP of the epochs that it does not know yet. Returns whether the trial may go on."""
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        if frozen.user_attrs.get(_PRUNED):
            return False
        for epoch, mean_ap in mean_aps(runs).items():
            if epoch in frozen.intermediate_values:
                continue
            trial.report(mean_ap, epoch)
            if epoch < self._epochs and self._is_behind(trial, epoch, mean_ap):
                trial.set_user_attr(_PRUNED, True)  # in the journal before the run is stopped
                return False
        return True

    def _is_behind(self, trial: Any, epoch: int, mean_ap: float) -> bool:
        """Whether the pruner ends the trial."""
        if epoch <= self._default.max_epoch:
            return bool(trial.should_prune())
        # The pruner takes the best value so far, which is right for a learning curve. A mean over folds must not be
        # replaced by that of fewer folds, whose identities may be easier: it is compared with the earlier trials' means
        # over the same folds.
        of_folds = optuna.trial.create_trial(state=TrialState.RUNNING, intermediate_values={epoch: mean_ap})
        return bool(self._study.pruner.prune(self._study, of_folds))

    def _to_trial(self, frozen: Any) -> Trial:
        states: dict[Any, str] = {
            TrialState.COMPLETE: "finished",
            TrialState.PRUNED: "pruned",
            TrialState.FAIL: "failed",
        }
        values = {key: self._as_tried(key, value) for key, value in frozen.params.items()}
        return Trial(frozen.number, values, dict(frozen.intermediate_values), states.get(frozen.state, "running"))

    def _open(self) -> None:
        if self._study is not None:
            return
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder.mkdir(parents=True, exist_ok=True)
        journal = (self._folder / _JOURNAL).absolute()  # Optuna waits without end for a lock on a relative path
        try:
            mend(journal, self._plan.condition / "tuning")
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
                study_name=self.variant.name,
                direction="maximize",
                pruner=optuna.pruners.MedianPruner(2, n_warmup_steps=self._default.max_epoch // 4),
                load_if_exists=True,
            )
            if not study.user_attrs:
                study.set_user_attr("made_with", self._made_with())
            made_with = {_FOLDS: 1, **study.user_attrs["made_with"]}  # earlier versions had no folds
        except OSError as error:
            raise ConfigError(f"can't use the journal of a tuning, {str(journal)!r}: {error}") from error
        except Exception as error:  # a damaged journal raises nearly any class
            raise ConfigError(
                f"the journal of a tuning, {str(journal)!r}, is damaged: {text_of(error)}; remove this file, and the "
                "trials that are finished count again"
            ) from error
        now, neutral = self._made_with(), {_IMAGES, *self._neutral}
        keys = dict.fromkeys([*made_with, *(key for key in now if key.startswith(_SEARCH))])
        other = [
            f"{key} was {made_with.get(key)}, is {now.get(key)}"
            for key in keys
            if key not in neutral and made_with.get(key) != now.get(key)
        ]
        if self._images and made_with.get(_IMAGES, self._images) != self._images:  # earlier versions kept no digest
            other.append(f"the images were others than those of data.root {self._default.root}")
        if other:
            raise ConfigError(
                f"{self._folder} holds trials with other settings ({'; '.join(other)}): set another data.save_dir, or "
                "remove that folder"
            )
        self._study = study

    def _made_with(self) -> dict[str, Any]:
        """The settings, the search space and the number of folds, as JSON keeps them."""
        settings = {key: value for key, value in self._default.values.items() if key not in self._neutral}
        space = {f"{_SEARCH}{key}": str(values) for key, values in self.space.items()}
        images = {_IMAGES: self._images} if self._images else {}
        made_with: dict[str, Any] = json.loads(json.dumps({**settings, **space, **images, _FOLDS: self.folds}))
        return made_with


def _sampler(split: int, number: int) -> Any:
    """What draws the values of a trial: the same for all rows, another for each split."""
    return optuna.samplers.TPESampler(seed=split * MOST_TRIALS + number + 1, n_startup_trials=_STARTUP_TRIALS)
