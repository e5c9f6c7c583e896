"""torchreid's training loop, extended by checkpoints, resuming, clean stops and distributed tests."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torchreid import engine

from torchreid_snloss import distributed
from torchreid_snloss.data.fingerprint import check_same_on_all_ranks
from torchreid_snloss.data.items import check_labels
from torchreid_snloss.data.readable import test_loaders
from torchreid_snloss.data.shards import shard_training
from torchreid_snloss.engine.checkpointer import Checkpointer
from torchreid_snloss.engine.compiling import compile_in_place, named_compile_errors, to_channels_last
from torchreid_snloss.engine.epoch_log import EpochLog, PrintFrequency
from torchreid_snloss.engine.event_writer import EventWriter, writer_of_run
from torchreid_snloss.engine.monitor import LearningMonitor
from torchreid_snloss.engine.options import NonFiniteError, Stopped, TrainOptions
from torchreid_snloss.engine.resumable_loader import ResumableLoader
from torchreid_snloss.engine.saving import saving_what_is_trained
from torchreid_snloss.engine.stopping import StopSignals, leave_signals_to_the_parent
from torchreid_snloss.engine.term_monitor import TermMonitor
from torchreid_snloss.engine.testing import Testing, selecting_map
from torchreid_snloss.engine.update import non_finite
from torchreid_snloss.progress import above_bars
from torchreid_snloss.run.lock import locked_on_all_ranks

__all__ = ["TrainingLoop"]


class TrainingLoop(engine.Engine):
    """A torchreid engine with checkpoints, resuming, a clean stop, and tests on several processes.

    torchreid's `run`, `train` and `test` do the work. The methods here define what happens before and after it, each
    part in a collaborator: `ResumableLoader`, `EpochLog`, `Checkpointer`, `Testing`, `StopSignals` and `compiling`.

    A run that is killed at any moment and resumed ends with the same weights as an uninterrupted run, bit for bit on a
    CPU. The random states of an epoch depend only on the seed and the number of the epoch. After a kill, the current
    epoch starts again; after Ctrl-C or SIGTERM, it continues with the next batch.

    With several processes (`torchreid_snloss.distributed`), each extracts its share of the features for an evaluation
    and ranks its share of the queries. Rank 0 prints, and writes checkpoints. A run can be resumed with any number of
    processes. If there are several, one that is resumed within an epoch continues with different random numbers.

    The seed is torch's initial seed when the engine is constructed, which torchreid's `set_random_seed` sets.

    Args:
        *args: the arguments of the torchreid engine.
        channels_last: whether to use the channels-last memory format for the model's weights and images.
        compile: whether to compile the model with `torch.compile`, in place. This does not change the checkpoints. The
            last bits of a compiled model's results may depend on the input shapes it has seen before, so they may
            differ after resuming.
        **kwargs: the keyword arguments of the torchreid engine.

    Raises:
        ValueError: for `compile` with `nn.DataParallel` on several GPUs.
        CompileError: if torch can't compile at all.
    """

    train_loader: Any
    writer: Any
    checkpointer: Checkpointer
    trains_on_several_processes: ClassVar[bool] = False
    skips_steps: ClassVar[bool] = False

    def __init__(self, *args: Any, channels_last: bool = False, compile: bool = False, **kwargs: Any) -> None:
        self._channels_last, self._compile = channels_last, compile
        super().__init__(*args, **kwargs)
        self._batch_idx, self._trained = 0, 0
        self.options = TrainOptions()
        self._stop = StopSignals()
        self._log = EpochLog()
        self._terms = TermMonitor({})
        self._testing = Testing(self, self._stop_if_requested)
        if distributed.world_size() > 1 and self.trains_on_several_processes:
            check_same_on_all_ranks(self.train_loader)
            self.train_loader = shard_training(self.train_loader)
        self.train_loader = ResumableLoader(self.train_loader, self._after_step)

    def register_model(self, name: str = "model", model: Any = None, optim: Any = None, sched: Any = None) -> None:
        if others := [other for other in self._models if other != name]:
            raise ValueError(f"{type(self).__name__} trains and saves one model: it has {others[0]!r}, got {name!r}")
        # A checkpoint holds a scheduler's state, even if none was given.
        self.scheduler = sched or torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0, total_iters=0)
        super().register_model(name, model, optim, self.scheduler)
        self.checkpointer = Checkpointer(model, optim, self.scheduler, torch.initial_seed() % (1 << 64))
        self.checkpointer.drawn_from(lambda: self.train_loader)
        self._learning = LearningMonitor(optim)
        if self._channels_last:
            to_channels_last(model)
        if self._compile:
            compile_in_place(model)

    # ---- the run ----

    def run(self, save_dir: str = "log", max_epoch: int = 0, start_epoch: int = 0, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(engine.Engine.run).bind(self, save_dir, max_epoch, start_epoch, *args, **kwargs)
        own = ("self", "save_dir", "max_epoch", "start_epoch")
        kwargs = {name: value for name, value in given.arguments.items() if name not in own}
        testing_only, first = bool(kwargs.get("test_only")), distributed.rank() == 0
        lock = contextlib.nullcontext() if testing_only else locked_on_all_ranks(save_dir)
        self._testing.start_run(max_epoch, **kwargs)
        self._trained = start_epoch
        self.epoch = max(0, start_epoch - 1)  # torchreid uses this number if no epoch is left to train
        self._log.stop_record()
        for loader in (self.train_loader.loader, *test_loaders(self)):
            loader.worker_init_fn = loader.worker_init_fn or leave_signals_to_the_parent
        self.writer = writer_of_run(self.writer, save_dir, len(self.train_loader), testing_only)
        at_once = testing_only and distributed.world_size() == 1  # there is nothing to save, and nobody to agree with
        with (
            lock,
            contextlib.nullcontext() if at_once else self._stop.listening(),
            named_compile_errors(),
            distributed.named_failures(),
            distributed.mute_other_ranks(),
            above_bars(),
        ):
            if testing_only:
                with self._testing.using_file(self.checkpointer.settings):
                    super().run(save_dir=save_dir, **kwargs)
                self._stop_if_requested()
                return
            self.checkpointer.start(save_dir, training=True)
            check_labels(self.datamanager)
            if distributed.world_size() > 1 and not self.trains_on_several_processes:
                raise ValueError(
                    f"{type(self).__name__} trains on one process only; the MetricEngines train on several"
                )
            if self.options.nonfinite == "skip" and not self.skips_steps:
                raise ValueError(f"nonfinite='skip' needs a MetricEngine; {type(self).__name__} can only stop")
            if 0 < max_epoch <= start_epoch:
                print(f"=> max_epoch is {max_epoch}, and {start_epoch} epochs are trained already: this run only tests")
            if self.options.record and first:
                self._log.start_record(Path(save_dir) / "record", start_epoch)
            for monitor in (self._learning, self._terms):
                monitor.start_run(resumed=start_epoch > 0 or self.checkpointer.state.batch > 0)
            save = lambda: self.checkpointer.save(self._trained, self.options.keep)  # noqa: E731
            with self.train_loader.ending_workers(), saving_what_is_trained(self.checkpointer, self._learning, save):
                self._train_and_test(save_dir, start_epoch, max_epoch, **{**kwargs, "visrank": False})
            self._stop_if_requested()
        with above_bars():  # a signal ends the drawing at once, since all that was trained is saved
            self._testing.draw_lists()

    def _train_and_test(self, save_dir: str, start_epoch: int, max_epoch: int, **kwargs: Any) -> None:
        self._run_missed_evaluation(save_dir, start_epoch, max_epoch, **kwargs)
        if self.options.record and start_epoch == 0 and self.checkpointer.state.batch == 0:
            print("=> Before training")
            self.epoch = -1
            self._test_as_in_training(**kwargs)
        super().run(save_dir=save_dir, max_epoch=max_epoch, start_epoch=start_epoch, **kwargs)
        if isinstance(self.writer, EventWriter):  # closed; a test after training writes no events
            self.writer = None

    def _run_missed_evaluation(
        self, save_dir: str, epoch: int, max_epoch: int, eval_freq: int = -1, start_eval: int = 0, **kwargs: Any
    ) -> None:
        """Repeats an evaluation during which the run was killed, so that the best checkpoint is the same too."""
        state = self.checkpointer.state
        if state.evaluated or state.batch:
            return
        if start_eval <= epoch < max_epoch and eval_freq > 0 and epoch % eval_freq == 0:
            self.save_model(epoch - 1, self._test_as_in_training(**kwargs), save_dir)

    def _test_as_in_training(self, **kwargs: Any) -> Any:
        """Evaluates with the arguments that `run` itself passes to its evaluations."""
        keys = ("dist_metric", "normalize_feature", "use_metric_cuhk03", "ranks")
        return self.test(**{key: kwargs[key] for key in keys if key in kwargs})

    # ---- an epoch ----

    def train(self, print_freq: int = 10, *args: Any, **kwargs: Any) -> None:
        state, loader = self.checkpointer.state, self.train_loader
        loader.start_epoch(state.seed, self.epoch, state.batch, self.checkpointer.restore_random_states)
        self._learning.start_epoch()
        self._terms.start_epoch(len(loader) - loader.skipped)
        unit = "tracklet" if getattr(self.datamanager, "data_type", "image") == "video" else "image"
        try:
            with self._log.epoch(self.epoch + 1, self.max_epoch, len(loader), loader.skipped, loader.batch_size, unit):
                super().train(PrintFrequency(print_freq, len(loader)), *args, **kwargs)
        finally:
            if (trained := loader.skipped + self._learning.steps) > state.batch:  # what failed came after a step
                self.checkpointer.step_trained(trained)
            loader.end_epoch()
        done = self.epoch + 1
        self._learning.end_epoch(done, is_last=done == self.max_epoch)
        self._terms.end_epoch(done)
        self.checkpointer.epoch_trained()
        self._trained = done
        distributed.average_buffers(self.model)
        self._log.record_epoch(done)
        if done % self.options.save_freq == 0 or done == self.max_epoch:
            self.checkpointer.save(done, self.options.keep)
        self._stop_if_requested()

    @property
    def batch_idx(self) -> int:
        """The number of the epoch's batch, from 0. torchreid's loop sets it, and counts the batches that it trains."""
        return self._batch_idx

    @batch_idx.setter
    def batch_idx(self, value: int) -> None:
        self._batch_idx = value + self.train_loader.skipped

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Performs one training step and logs it to the progress bar and the record.

        Args:
            data: a batch from torchreid's loader, with `img` (batch, 3, height, width) and `pid` (batch,).

        Returns:
            the values for the progress line.
        """
        summary = self.step(data)
        self._learning.steps += 1
        self._log.add_step(summary)
        return summary

    def step(self, data: dict[str, Any]) -> dict[str, float]:
        """Performs the training step itself; here it is the step of torchreid's engine."""
        summary: Mapping[str, Any] = super().forward_backward(data) or {}
        return {name: float(value) for name, value in summary.items()}

    def _after_step(self, batch: int) -> None:
        """Called when torchreid's loop has trained and logged a batch, counted from 1."""
        self.checkpointer.step_trained(batch)
        if self._stop.requested() and batch < len(self.train_loader):
            distributed.average_buffers(self.model)
            self.checkpointer.save(self.epoch, self.options.keep)
            self._stop_if_requested()

    def check_finite(self, terms: Mapping[str, float]) -> bool:
        """Whether all terms of a step are finite. If not, raises or prints, depending on `options.nonfinite`.

        Raises:
            NonFiniteError: names the terms, the epoch and the step.
        """
        if not (what := non_finite(terms)):
            return True
        what += f" in epoch {self.epoch + 1}, step {self.batch_idx + 1}"
        if self.options.nonfinite == "stop":
            raise NonFiniteError(f"{what}; the last checkpoint: {self.checkpointer.newest or 'none yet'}")
        self._learning.skipped += 1
        print(f"** Skipped: {what}")
        return False

    def _stop_if_requested(self) -> None:
        """Ends the run if any process received a stop signal, after saving an epoch that is not saved yet."""
        if self._stop.requested():
            if self.checkpointer.unsaved:
                self.checkpointer.save(self.epoch + 1, self.options.keep)
            distributed.all_reduce_max(0)  # no process leaves before rank 0 has written the checkpoint
            raise Stopped(self._stop.number, self.checkpointer.newest)

    # ---- checkpoints ----

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """Called by torchreid after an evaluation, with the epoch counted from 0."""
        self.checkpointer.start(save_dir, training=False)
        state = self.checkpointer.state
        state.rank1, state.evaluated = float(rank1), True
        # This must come before the checkpoint that marks the evaluation as done.
        if self._learning.learnt or not self._learning.tried:
            self.checkpointer.save_if_best(epoch + 1, *selecting_map(self.checkpointer.mean_aps))
        self.checkpointer.save(epoch + 1, self.options.keep)

    def resume(self, path: str | Path) -> int:
        """Loads model, optimizer, scheduler and progress from a checkpoint.

        Args:
            path: a checkpoint of this package, or of torchreid, which holds no seed, so that this run's is used.

        Returns:
            the epoch to start from.

        Raises:
            CheckpointError: if the file can't be loaded, or is one of another model or optimizer, or was trained on
                other images or labels.
        """
        own_seed = self.checkpointer.state.seed
        epoch = self.checkpointer.resume(path)
        sampler = self.train_loader.sampler
        if getattr(sampler, "seed", None) == own_seed:  # the run's, not one of its own
            sampler.seed = self.checkpointer.state.seed
        return epoch

    # ---- a test ----

    def _evaluate(self, dataset_name: str = "", **kwargs: Any) -> Any:
        found = self._testing.evaluate(dataset_name, **kwargs)
        if self.writer is not None:  # torchreid adds rank-1 and mAP in test()
            self.writer.add_scalar(f"Test/{dataset_name}/mINP", found.ranking.mean_inp, self.epoch)
        self._log.add_evaluation(self.epoch + 1, dataset_name, found)
        self.checkpointer.mean_aps[dataset_name] = found.ranking.mean_ap
        return float(found.ranking.cmc[0]), found.ranking.mean_ap
