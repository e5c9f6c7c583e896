"""Saving the state of training, keeping the newest and the best checkpoints, and resuming."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchreid_snloss import distributed
from torchreid_snloss.checkpoint import (
    BEST,
    CheckpointError,
    checkpoint_name,
    load_resumable,
    model_folder,
    own_names,
    remove_unfinished,
    restore,
    save_checkpoint,
)
from torchreid_snloss.checkpoint.fitting import check_number_type
from torchreid_snloss.checkpoint.newest import best_mean_ap
from torchreid_snloss.checkpoint.optimizer_state import class_names
from torchreid_snloss.checkpoint.schema import FORMAT_VERSION, TrainingState, read_progress
from torchreid_snloss.engine.differences import RunDifferences, plain
from torchreid_snloss.engine.options import NonFiniteError, WriteError
from torchreid_snloss.engine.random_state import random_states, set_random_states
from torchreid_snloss.engine.schedule import Schedule, steps_of
from torchreid_snloss.errors import printable

__all__ = ["Checkpointer", "TrainingState", "new_run"]


def new_run() -> str:
    """An identifier for a run that starts now; those of later runs sort after it."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}"


_LONGEST_LINE = 1000  # about a value in a checkpoint
_OPTIONS_OF_A_SCALER = ("growth_factor", "backoff_factor", "growth_interval")


class Checkpointer:
    """Writes checkpoints into a run's folder `model`, and reads them back.

    On several processes all call it alike, and the first one writes.

    Args:
        model: the model.
        optimizer: its optimizer.
        scheduler: its learning rate scheduler.
        seed: the run's.

    Attributes:
        state: a `TrainingState`.
        newest: the checkpoint written last, or resumed from; None before there is one.
        unsaved: whether an epoch was trained since.
        run: the identifier of this run, which its checkpoints hold.
        settings: the settings of this run by their keys, which its checkpoints hold; None: it has no config.
        batches: gives what the run's batches are drawn from, as `RunDifferences` takes it.
        num_batches: gives the number of batches of an epoch; None if it is not known.
        criteria: losses, some of which may have parameters of their own (a module); None: there are none.
        optional: parts that a checkpoint may lack, by their key in it: a `GradScaler`, a `Memory`. None for a part that
            this run has not.
        random_states: those after the last step; None: the present ones.
        mean_aps: mAP of the last evaluation by data set, by which the best checkpoint is chosen.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, seed: int) -> None:
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self.state = TrainingState(seed)
        self.newest: Path | None = None
        self.unsaved = False
        self.run = new_run()
        self.settings: Mapping[str, Any] | None = None
        self.batches: Callable[[], dict[str, Any]] = dict
        self.num_batches: Callable[[], int | None] = lambda: None
        self.criteria: nn.Module | None = None
        self._schedule = Schedule(optimizer, scheduler)
        self.optional: dict[str, Any] = {"scaler": None, "memory": None}
        self.mean_aps: dict[str, float] = {}
        self._folder = Path()
        self._resumed = False
        self._random_states: dict[str, Any] | None = None
        self.random_states: dict[str, Any] | None = None

    def drawn_from(self, loader: Callable[[], Any]) -> None:
        """Sets `batches` and `num_batches` to those of a `ResumableLoader`, which a function gives."""
        self.batches, self.num_batches = lambda: loader().description, lambda: len(loader())

    def start(self, save_dir: str | Path, training: bool) -> None:
        """Sets the run's folder, `save_dir/model`, and before training removes unfinished files of killed processes.

        Checkpoints that were written to another folder are no longer tracked, so they are never removed; and the best
        one so far is the best of this folder: none, unless a run resumed from another folder finds the one of its
        checkpoint here.
        """
        folder = model_folder(save_dir)
        if folder.resolve() != self._folder.resolve():
            self.state.written = []
            if not (self._resumed and best_mean_ap(folder) == self.state.best):
                self.state.best = -1.0
            if training:
                self.mean_aps.clear()
        self._folder, self._resumed = folder, False
        if training and distributed.rank() == 0:
            remove_unfinished(self._folder)

    def step_trained(self, batch: int) -> None:
        """Notes that a batch of the epoch, counted from 1, has changed the weights."""
        self.state.batch, self.random_states = batch, random_states()

    def epoch_trained(self) -> None:
        """Marks the current epoch as complete."""
        self.state.batch, self.state.evaluated, self.unsaved = 0, False, True

    def save(self, epoch: int, keep: int) -> None:
        """Writes the checkpoint of an epoch, or of the middle of the epoch after it.

        Args:
            epoch: how many epochs have been trained.
            keep: how many of this run's checkpoints to keep; 0 keeps all.

        Raises:
            NonFiniteError: if a weight is not finite; nothing is written then.
        """
        name = checkpoint_name(epoch, self.state.batch)
        written = [old for old in self.state.written if old != name] + [name]
        dropped = written[:-keep] if keep else []
        self.state.written = written[len(dropped) :]
        self._write(epoch, self._folder / name)
        self.newest, self.unsaved = self._folder / name, False
        print(f'Checkpoint saved to "{self.newest}"')
        for old in dropped if distributed.rank() == 0 else ():
            if (self._folder / old).is_file():
                (self._folder / old).unlink(missing_ok=True)

    def save_if_best(self, epoch: int, mean_ap: float, measured_on: str) -> None:
        """Writes the best checkpoint if an evaluation's mAP is the best so far.

        Args:
            epoch: how many epochs have been trained.
            mean_ap: mAP in [0, 1]; -1 if there was no evaluation.
            measured_on: the name of the data, for the line that is printed.

        Raises:
            NonFiniteError: if a weight is not finite; nothing is written then.
        """
        is_best = mean_ap > self.state.best
        self.state.best = max(mean_ap, self.state.best)
        if is_best:
            best = self._folder / BEST
            self._write(epoch, best)
            print(f'Best so far, by its mAP of {mean_ap:.1%} on {measured_on}: "{best}"')

    def resume(self, path: str | Path) -> int:
        """Loads all parts from a checkpoint of this package, or from one of torchreid's, which has no seed or batch.

        What this run sets is used where it differs from what the checkpoint was trained with, and a printed line names
        it: the options of the optimizer, the schedule, which goes on from where the checkpoint is, and all settings.
        The seed is the checkpoint's if the run has no settings.

        Returns:
            how many epochs it was trained.

        Raises:
            CheckpointError: if the file can't be loaded, or is one of another model, optimizer or criterion, or was
                trained on other images or labels.
        """
        checkpoint = load_resumable(path)
        epoch: int = checkpoint["epoch"]
        now = {"settings": self.settings, "batches": self.batches(), "criterion": self._criterion()}
        differences = RunDifferences(checkpoint, now, path)
        self._check_batch(checkpoint, differences, path)
        self._schedule.before_loading()
        schedule_state = restore(checkpoint, path, self._model, self._optimizer, self._scheduler)
        of_schedule = self._schedule.resume(schedule_state, epoch, path)
        if self.criteria is not None:
            given, own = checkpoint.get("criterion") or {}, self.criteria.state_dict()
            try:
                self.criteria.load_state_dict(given)
                for name, value in own.items():
                    check_number_type(name, value, given[name])
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{str(path)!r} belongs to another criterion: {' '.join(str(error).split())}"
                ) from error
        of_memory: list[str] = []
        for key, part in self.optional.items():
            if part is not None and checkpoint.get(key):
                own = part.state_dict()
                if key == "memory":
                    rows = 0 if checkpoint[key]["features"] is None else len(checkpoint[key]["features"])
                    if rows > part.size:
                        of_memory.append(
                            f"=> memory: {rows} features in the checkpoint, of which the newest {part.size} are used"
                        )
                part.load_state_dict(checkpoint[key])
                of_schedule += [
                    f"{name}: {value} in the checkpoint, which is used, {own[name]} in this run"
                    for name, value in checkpoint[key].items()
                    if name in _OPTIONS_OF_A_SCALER and name in own and own[name] != value
                ]
            elif key == "memory" and part is not None and (checkpoint.get("settings") or {}).get("loss.memory.size"):
                of_memory.append("=> the checkpoint was trained with a memory and holds none, so it fills anew")
        if "progress" in checkpoint:
            own_seed = self.state.seed
            self.state = read_progress(checkpoint["progress"])
            self.state.written = own_names(self.state.written, epoch, self.state.batch)
            self._random_states = self.random_states = checkpoint.get("random_states")
            if self.state.seed != own_seed and self.settings is not None:
                self.state.seed = own_seed
            elif self.state.seed != own_seed:
                of_schedule.append(f"seed: {self.state.seed} in the checkpoint, which is used, {own_seed} in this run")
        self.newest, self._folder, self._resumed = Path(path), Path(path).parent, True
        batches = f" and {self.state.batch} batches of the next" if self.state.batch else ""
        print(f'=> Resuming from "{path}", after {epoch} epochs{batches}')
        for line in [*(f"=> {line}" for line in differences.lines(of_schedule)), *of_memory]:
            print(printable(line, _LONGEST_LINE))
        if self.state.batch and differences.other_order:
            print("=> Those batches are trained again, since this run draws other ones")
            self.state.batch, self._random_states, self.random_states = 0, None, None
        return epoch

    def _check_batch(self, checkpoint: Mapping[str, Any], differences: RunDifferences, path: Any) -> None:
        batch, most = checkpoint.get("progress", {}).get("batch", 0), self.num_batches()
        if most is not None and batch >= most > 0 and not (differences.other_order or differences.silent):
            raise CheckpointError(
                f"{str(path)!r} is not a valid checkpoint: its progress.batch is {batch}, "
                f"but an epoch has {most} batches"
            )

    def _criterion(self) -> Mapping[str, Any] | None:
        return (self.criteria is not None and self.criteria.state_dict()) or None

    def restore_random_states(self) -> bool:
        """Restores the random states of the checkpoint that was resumed from; does nothing on a second call.

        Returns:
            whether there were any. Only a checkpoint from the middle of an epoch stores random states.
        """
        states, self._random_states = self._random_states, None
        if states is not None:
            set_random_states(states)
        return states is not None

    def _counts(self, epoch: int) -> dict[str, int]:
        """What shows that the optimizer and the schedule of a checkpoint are complete and of its epoch."""
        states = self._optimizer.state_dict()["state"]
        return {
            "optimizer_states": len(states),
            "schedule_start": epoch - steps_of(self._scheduler.state_dict(), default=epoch),
        }

    def _write(self, epoch: int, path: Path) -> None:
        weights, criterion = self._model.state_dict(), self._criterion()
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        own = {name: value for name, value in (criterion or {}).items() if isinstance(value, Tensor)}
        broken += [f"the criterion's {name}" for name, value in own.items() if value.isnan().any()]
        if broken:
            raise NonFiniteError(
                f"after {epoch} epochs {len(broken)} weights are not finite, {broken[0]} among them, and not saved; "
                f"the last checkpoint: {self.newest or 'none yet'}"
            )
        if distributed.rank() > 0:
            return
        state: Mapping[str, Any] = {
            "format_version": FORMAT_VERSION,
            "classes": class_names(self._optimizer),
            "state_dict": weights,
            "epoch": epoch,
            "rank1": self.state.rank1,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "progress": dataclasses.asdict(self.state),
            "random_states": (self.random_states or random_states()) if self.state.batch else None,
            "criterion": criterion,
            "counts": self._counts(epoch),
            "run": self.run,
            "settings": self.settings and plain(self.settings),
            "batches": self.batches(),
            **{key: None if part is None else part.state_dict() for key, part in self.optional.items()},
        }
        try:
            save_checkpoint(state, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: what torch makes of it
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise WriteError(
                f"can't write the checkpoint {str(path)!r}: {' '.join(str(reason).split())[:300]}; "
                f"the last checkpoint: {self.newest or 'none yet'}"
            ) from error
