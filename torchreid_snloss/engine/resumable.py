"""Training that can be stopped at any moment and goes on to the same bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchreid import engine, utils

from torchreid_snloss import distributed
from torchreid_snloss.checkpoint import CheckpointError, remove_unfinished, restore, save_checkpoint
from torchreid_snloss.data.readable import all_loaders
from torchreid_snloss.data.shards import Shards, own_test_batches
from torchreid_snloss.data.validation import VALIDATION
from torchreid_snloss.engine.multi_query import more_queries, pool_queries
from torchreid_snloss.evaluation import capture_rankings
from torchreid_snloss.progress import above_bars, progress, progress_bar
from torchreid_snloss.record import Recorder, to_features

__all__ = ["CompileError", "NonFiniteError", "Resumable", "Stopped", "TrainOptions", "resumable"]


@dataclasses.dataclass
class TrainOptions:
    """What a run does besides training.

    Attributes:
        save_freq: epochs between checkpoints, >= 1; after the last epoch and after evaluations there always is one.
        keep: the newest checkpoints of this run to keep, >= 1; 0: all. The best by mAP is kept beside them.
        nonfinite: at a NaN or infinite loss or gradient ``"stop"`` (the last good checkpoint stays), or ``"skip"`` the
            step; torchreid's own engines can only stop.
        flip: a test's features are the mean of those of an image and of its mirror image.
        rerank: re-rank in every evaluation, those of a training run too.
        multi_query: a query's feature is the mean over the images of ``gt_bbox`` (see :func:`pool_queries`).
        record: evaluate before training too, and leave a :class:`Record` with features in ``save_dir/record``.
    """

    save_freq: int = 1
    keep: int = 3
    nonfinite: Literal["stop", "skip"] = "stop"
    flip: bool = False
    rerank: bool = False
    multi_query: bool = False
    record: bool = False


class NonFiniteError(ArithmeticError):
    """A term of the loss, or its gradient, became NaN or infinite."""


class CompileError(RuntimeError):
    """torch.compile can't compile the model, or finds no compiler."""


class Stopped(Exception):  # noqa: N818 - no error
    """Leaves ``run()`` after Ctrl-C or SIGTERM, once the step is finished and a checkpoint written.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        name = signal.Signals(number).name
        how = f"go on with: model.resume {checkpoint}" if checkpoint else "nothing was trained yet"
        super().__init__(f"stopped by {name}; {how}")
        self.signal = number


@dataclasses.dataclass
class _Progress:
    """What a checkpoint holds beyond torchreid's keys."""

    seed: int
    batch: int = 0  # batches done of the epoch under way
    evaluated: bool = True
    rank1: float = 0.0
    best: float = -1.0  # mAP
    written: list[str] = dataclasses.field(default_factory=list)


class Resumable(engine.Engine):
    """Adds checkpoints, resuming and a clean stop to a torchreid engine.

    A run that was killed at any moment and resumed has the same weights in the end, on a CPU to the bit, as one that
    never was. An epoch's random states follow from the seed and the epoch's number alone. After a kill the epoch under
    way starts again; after Ctrl-C or SIGTERM it goes on with the batch that comes next.

    On several processes (:mod:`torchreid_snloss.distributed`) each extracts its share of the features of an evaluation;
    the first one evaluates them, prints, and writes checkpoints. From the end of an epoch a resume goes on with any
    number of processes; from within one it does so on several with other random numbers.

    The seed is torch's when the engine is made; torchreid's ``set_random_seed`` sets it.

    Args:
        *args: the torchreid engine's.
        channels_last: put the model's weights and its images in channels-last order.
        compile: compile the model with ``torch.compile``, in place; checkpoints do not change by it. What a compiled
            model computes may depend, in the last bits, on the shapes it met before, and so on a resume.
        **kwargs: the torchreid engine's.

    Raises:
        ValueError: for ``compile`` with ``nn.DataParallel`` on several GPUs.
        CompileError: if torch can't compile at all.
    """

    train_loader: Any
    writer: Any
    extract_features: Any
    forward_backward: Any
    scaler: Any = None
    """The loss's ``GradScaler``, for an engine that trains in float16; checkpoints hold its state."""
    memory: Any = None
    """The loss's ``Memory``, where it has one; likewise."""
    criteria: Any = None
    """Losses, of which some may have parameters of their own; likewise."""

    def __init__(self, *args: Any, channels_last: bool = False, compile: bool = False, **kwargs: Any) -> None:
        self._channels_last, self._compile = channels_last, compile
        super().__init__(*args, **kwargs)
        self.options = TrainOptions()
        self._progress = _Progress(seed=torch.initial_seed() % (1 << 64))
        self._random_states: dict[str, Any] | None = None
        self._recorder: Recorder | None = None
        self._map: dict[str, float] = {}
        self._folder = Path()
        self._newest: Path | None = None
        self._unsaved = False
        self._skipped = 0  # batches of the epoch under way that a run before this one did
        self._batch_idx = 0
        self._noted_signal = 0  # that came to this process
        self._signal = 0  # that all processes know of

    def register_model(self, name: str = "model", model: Any = None, optim: Any = None, sched: Any = None) -> None:
        # A checkpoint holds a scheduler's state, also where none was given.
        self.scheduler = sched or torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0, total_iters=0)
        super().register_model(name, model, optim, self.scheduler)
        if self._channels_last:
            model.to(memory_format=torch.channels_last)
            model.register_forward_pre_hook(_in_channels_last)
        if self._compile:
            if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
                raise ValueError("compile does not work with nn.DataParallel on several GPUs")
            try:
                model.compile()  # not torch.compile(model), whose state dict has other names
            except RuntimeError as error:  # for a Python that torch can't compile
                raise CompileError(f"torch.compile: {error}") from error

    @property
    def batch_idx(self) -> int:
        """Counts the epoch's batches from 0; torchreid's loop sets it."""
        return self._batch_idx

    @batch_idx.setter
    def batch_idx(self, value: int) -> None:
        self._batch_idx = value + self._skipped

    def run(self, save_dir: str = "log", max_epoch: int = 0, start_epoch: int = 0, **kwargs: Any) -> None:
        self._folder = Path(save_dir) / "model"
        self._recorder = None
        self.epoch = max(0, start_epoch - 1)  # what torchreid evaluates and saves as where no epoch is left to train
        if self._newest is None or self._newest.parent != self._folder:
            self._progress.written = []  # names in another folder
        for loader in all_loaders(self):
            loader.worker_init_fn = loader.worker_init_fn or _leave_signals_to_the_parent
        first = distributed.rank() == 0
        if not first:
            self.writer = _NoWriter()
        with (
            _noted_signals(self),
            _named_compile_errors(),
            distributed.named_failures(),
            distributed.mute_other_ranks(),
            above_bars(),
        ):
            if kwargs.get("test_only"):
                super().run(save_dir=save_dir, **kwargs)
                return
            if distributed.world_size() > 1 and not isinstance(self.train_loader.batch_sampler, Shards):
                raise ValueError(f"{type(self).__name__} trains on one process, the MetricEngines on several")
            if first:
                remove_unfinished(self._folder)
            if self.options.record and first:
                self._recorder = Recorder(Path(save_dir) / "record", start_epoch)
            if not (self._progress.evaluated or self._progress.batch):
                self._evaluate_where_it_was_due(start_epoch, max_epoch, **kwargs)
            if self.options.record and start_epoch == 0 and self._progress.batch == 0:
                print("=> Before training")
                self.epoch = -1
                self._test(**kwargs)
            super().run(save_dir=save_dir, max_epoch=max_epoch, start_epoch=start_epoch, **kwargs)

    def _evaluate_where_it_was_due(
        self, epoch: int, max_epoch: int, eval_freq: int = -1, start_eval: int = 0, **kwargs: Any
    ) -> None:
        """A run killed during an evaluation makes up for it, so that the best checkpoint is the same too."""
        if start_eval <= epoch < max_epoch and eval_freq > 0 and epoch % eval_freq == 0:
            self.save_model(epoch - 1, self._test(**kwargs), str(self._folder.parent))

    def _test(self, **kwargs: Any) -> Any:
        """An evaluation as those in training, of what ``run`` was given."""
        keys = ("dist_metric", "normalize_feature", "use_metric_cuhk03", "ranks")
        return self.test(**{key: kwargs[key] for key in keys if key in kwargs})

    def train(self, *args: Any, **kwargs: Any) -> None:
        batches = self.train_loader.batch_sampler
        sampler = batches.sampler if isinstance(batches, Shards) else self.train_loader.sampler
        self._set_random_seed(self.epoch)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if isinstance(batches, Shards):
            batches.draw()
            self._set_random_seed(self.epoch, distributed.rank())
        whole, self._skipped = self.train_loader, self._progress.batch
        self.train_loader = _Steps(self, whole)
        began = None if self._skipped else time.perf_counter()
        try:
            with self._shown_steps(whole) as terms:
                super().train(*args, **kwargs)
        finally:
            self.train_loader, self._skipped = whole, 0
        if self._recorder is not None:
            seconds = None if began is None else time.perf_counter() - began
            self._recorder.add_epoch(self.epoch + 1, terms, seconds)
        self._progress.batch, self._progress.evaluated, self._unsaved = 0, False, True
        distributed.average_buffers(self.model)
        if (
            (self.epoch + 1) % self.options.save_freq == 0
            or self.epoch + 1 == self.max_epoch
            or self._all_asked_to_stop()
        ):
            self._write(self.epoch + 1)
        self._stop_if_asked()

    @contextlib.contextmanager
    def _shown_steps(self, loader: Any) -> Iterator[dict[str, float]]:
        """Within it a bar shows the steps of an epoch; after it the dictionary has the means of their summaries."""
        batches = loader.batch_sampler
        batch_size = getattr(batches.batches if isinstance(batches, Shards) else batches, "batch_size", 1)
        unit = "tracklet" if getattr(self.datamanager, "data_type", "image") == "video" else "image"
        title, done = f"epoch {self.epoch + 1}/{self.max_epoch}", self._skipped * batch_size
        before, step = self.__dict__.get("forward_backward"), self.forward_backward
        noted: dict[str, list[float]] = {}
        terms: dict[str, float] = {}
        with progress_bar(title, len(loader) * batch_size, unit, done) as bar:

            def forward_backward(data: Any) -> Any:
                summary = step(data)
                values = {name: float(value) for name, value in (summary or {}).items()}
                for name, value in values.items():
                    noted.setdefault(name, []).append(value)
                shown = {name: value for name, value in values.items() if name.startswith(("loss", "acc"))}
                bar.set_postfix(shown, refresh=False)
                bar.update(batch_size)
                return summary

            self.forward_backward = forward_backward
            try:
                yield terms
            finally:
                del self.forward_backward
                if before is not None:
                    self.forward_backward = before
        terms.update({name: sum(values) / len(values) for name, values in noted.items()})

    def _set_random_seed(self, *of: int) -> None:
        utils.set_random_seed(int(np.random.SeedSequence([self._progress.seed, *of]).generate_state(1)[0]))

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """Called by torchreid after an evaluation."""
        self._folder = Path(save_dir) / "model"
        self._progress.rank1, self._progress.evaluated = float(rank1), True
        # Held-out identities where there are some, else the test set that was evaluated last, as rank-1 is.
        chosen_by = VALIDATION if VALIDATION in self._map else next(reversed(self._map), "")
        mean_ap = self._map.get(chosen_by, -1.0)
        is_best = mean_ap > self._progress.best
        self._progress.best = max(mean_ap, self._progress.best)
        if is_best:  # before the checkpoint that says it is done
            best = self._folder / "model-best.pth.tar"
            self._save(self._state(epoch + 1), best)
            kind = "held-out identities" if chosen_by == VALIDATION else f"the test set {chosen_by}"
            print(f'Best so far, by its mAP of {mean_ap:.1%} on {kind}: "{best}"')
        self._write(epoch + 1)

    def resume(self, path: str | Path) -> int:
        """Loads model, optimizer, scheduler and progress from a checkpoint.

        Args:
            path: a checkpoint of this package, or of torchreid, which holds no seed and goes on with this run's.

        Returns:
            the epoch to start from.

        Raises:
            CheckpointError: if the file can't be loaded, or is one of another model or optimizer.
        """
        checkpoint = restore(path, self.model, self.optimizer, self.scheduler)
        if "progress" in checkpoint:
            self._progress = _Progress(**checkpoint["progress"])
            self._random_states = checkpoint["random_states"]
        if self.criteria is not None:
            try:
                self.criteria.load_state_dict(checkpoint.get("criterion") or {})
            except RuntimeError as error:
                raise CheckpointError(
                    f"{str(path)!r} is of another criterion: {' '.join(str(error).split())}"
                ) from error
        if self.memory is not None and checkpoint.get("memory"):  # one of a run without has none
            self.memory.load_state_dict(checkpoint["memory"])
        if self.scaler is not None and checkpoint.get("scaler"):  # one of another precision has none
            self.scaler.load_state_dict(checkpoint["scaler"])
        self._newest = Path(path)
        epoch: int = checkpoint["epoch"]
        batches = f" and {self._progress.batch} batches of the next" if self._progress.batch else ""
        print(f'=> Going on from "{path}", after {epoch} epochs{batches}')
        return epoch

    def _evaluate(
        self, dataset_name: str = "", query_loader: Any = None, gallery_loader: Any = None, **kwargs: Any
    ) -> Any:
        loaders = {"query_loader": query_loader, "gallery_loader": gallery_loader}
        kwargs["rerank"] = kwargs.get("rerank", False) or self.options.rerank
        before, own = self.__dict__.get("extract_features"), self.extract_features
        self.extract_features = _if_images(_of_both_sides(own) if self.options.flip else own)
        try:
            if self.options.multi_query and dataset_name != VALIDATION:
                more = self._extract(more_queries(query_loader))
                loaders["query_loader"] = pool_queries(self._extract(query_loader), more)
            if distributed.world_size() == 1 and not self.options.record:
                return self._evaluate_here(dataset_name, **loaders, **kwargs)
            return self._evaluate_on_all(dataset_name, loaders, **kwargs)
        finally:
            del self.extract_features
            if before is not None:
                self.extract_features = before

    def _evaluate_on_all(self, dataset_name: str, loaders: dict[str, Any], **kwargs: Any) -> Any:
        loaders = {name: x if isinstance(x, list) else self._extract(x) for name, x in loaders.items()}
        results: Any = None
        if distributed.rank() == 0:
            results = self._evaluate_here(dataset_name, **loaders, **kwargs)
        rank1, mean_ap = distributed.broadcast_object(results)
        self._map[dataset_name] = float(mean_ap)
        return rank1, mean_ap

    def _evaluate_here(self, dataset_name: str, query_loader: Any, gallery_loader: Any, **kwargs: Any) -> Any:
        splits = {"query": query_loader, "gallery": gallery_loader}
        loaders = {
            f"{split}_loader": progress(f"{split} features", loader, "batch", len(loader))
            for split, loader in splits.items()
        }
        with capture_rankings() as rankings:
            rank1, mean_ap = super()._evaluate(dataset_name, **loaders, **kwargs)
        self._map[dataset_name] = float(mean_ap)
        if self._recorder is not None:
            if not rankings:
                raise RuntimeError("the option record needs torchreid_snloss.register() to be called first")
            items = self.datamanager.test_dataset[dataset_name]
            query, gallery = (
                to_features(batches, items[split], kwargs["normalize_feature"]) for split, batches in splits.items()
            )
            self._recorder.add_evaluation(self.epoch + 1, dataset_name, rankings[-1], query, gallery)
        for ranking in rankings:  # one, or none where register() was not called
            print(f"mINP: {ranking.mean_inp:.1%}")
            if self.writer is not None:  # torchreid adds rank-1 and mAP in test()
                self.writer.add_scalar(f"Test/{dataset_name}/mINP", ranking.mean_inp, self.epoch)
        return rank1, mean_ap

    @torch.no_grad()
    def _extract(self, loader: Any) -> list[dict[str, Any]]:
        """On the first process a test loader's batches with features for images, of which each process extracts some.

        A batch stays whole, so that its features are those of one process.
        """
        own = []
        batches = iter(own_test_batches(loader))
        turns = -(-len(loader) // distributed.world_size())  # as many on all
        for _ in progress("features", range(turns), "batch", turns):
            self._stop_if_asked()
            data = next(batches, None)
            if data is None:
                continue
            images, pids, camids = self.parse_data_for_eval(data)
            features = self.extract_features(images.cuda() if self.use_gpu else images)
            own.append({"img": features.cpu(), "pid": pids, "camid": camids})
        parts = distributed.gather_objects(own)
        return [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch is not None]

    def parse_data_for_eval(self, data: Any) -> Any:
        if distributed.world_size() == 1:
            self._stop_if_asked()
        return super().parse_data_for_eval(data)

    def check_finite(self, terms: dict[str, float]) -> bool:
        """Whether all terms of a step are finite; where not, raises or, as the options say, names the step."""
        broken = {name: value for name, value in terms.items() if not math.isfinite(value)}
        if broken:
            what = ", ".join(f"{name} is {value}" for name, value in broken.items())
            what += f" in epoch {self.epoch + 1}, step {self.batch_idx + 1}"
            if self.options.nonfinite == "stop":
                raise NonFiniteError(f"{what}; the last checkpoint: {self._newest or 'none yet'}")
            print(f"** Skipped: {what}")
        return not broken

    def _all_asked_to_stop(self) -> bool:
        """Whether a signal came to any process; all get the same answer."""
        self._signal = distributed.all_reduce_max(self._noted_signal)
        return self._signal != 0

    def _stop_if_asked(self) -> None:
        if self._all_asked_to_stop():
            if self._unsaved:
                self._write(self.epoch + 1)
            distributed.all_reduce_max(0)  # none leaves before the first process has written
            raise Stopped(self._signal, self._newest)

    def _state(self, epoch: int) -> dict[str, Any]:
        weights = self.model.state_dict()
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            raise NonFiniteError(
                f"after {epoch} epochs {len(broken)} weights are not finite, {broken[0]} among them, and not saved; "
                f"the last checkpoint: {self._newest or 'none yet'}"
            )
        return {
            "state_dict": weights,
            "epoch": epoch,
            "rank1": self._progress.rank1,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": dataclasses.asdict(self._progress),
            "random_states": _random_states() if self._progress.batch else None,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "criterion": self._criterion_state(),
            "memory": None if self.memory is None else self.memory.state_dict(),
        }

    def _criterion_state(self) -> dict[str, Any] | None:
        return (self.criteria is not None and self.criteria.state_dict()) or None

    def _write(self, epoch: int) -> None:
        batch = f".{self._progress.batch}" if self._progress.batch else ""
        name = f"model.pth.tar-{epoch}{batch}"
        self._progress.written = [old for old in self._progress.written if old != name] + [name]
        dropped = self._progress.written[: -self.options.keep] if self.options.keep else []
        self._progress.written = self._progress.written[len(dropped) :]
        self._save(self._state(epoch), self._folder / name)
        self._newest, self._unsaved = self._folder / name, False
        print(f'Checkpoint saved to "{self._newest}"')
        for old in dropped if distributed.rank() == 0 else ():
            (self._folder / old).unlink(missing_ok=True)

    @staticmethod
    def _save(state: dict[str, Any], path: Path) -> None:
        if distributed.rank() == 0:
            save_checkpoint(state, path)


class _NoWriter:
    """TensorBoard's writer, for a process that writes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def resumable(cls: type[Any]) -> type[Resumable]:
    """An engine class of torchreid's with :class:`Resumable` in front; one that is resumable already as it is."""
    if issubclass(cls, Resumable):
        return cls

    def compute_loss(self: Any, criterion: Any, outputs: Any, targets: Any) -> Any:
        loss = cls.compute_loss(self, criterion, outputs, targets)
        self.check_finite({type(criterion).__name__: float(loss.detach())})
        return loss

    made: type[Resumable] = type(cls.__name__, (Resumable, cls), {"__doc__": cls.__doc__, "compute_loss": compute_loss})
    return made


class _Steps:
    """The training batches of one epoch, with a look at what was asked for after each step."""

    def __init__(self, training: Resumable, loader: Any) -> None:
        self._training = training
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        training, progress = self._training, self._training._progress
        done_before = progress.batch
        for batch, data in enumerate(self._loader, start=1):
            if batch <= done_before:
                if batch == done_before and training._random_states is not None:
                    if distributed.world_size() == 1:
                        _set_random_states(training._random_states)  # as they were before the next batch was drawn
                    else:
                        training._set_random_seed(training.epoch, distributed.rank(), batch)
                    training._random_states = None
                continue
            yield data
            progress.batch = batch
            if training._all_asked_to_stop() and batch < len(self._loader):
                distributed.average_buffers(training.model)
                training._write(training.epoch)
                training._stop_if_asked()


class _noted_signals:  # noqa: N801 - used like a function
    """Within it SIGINT and SIGTERM are noted for the engine; a second one interrupts at once."""

    def __init__(self, training: Resumable) -> None:
        self._training = training
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> None:
        self._training._noted_signal = 0
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        self._training._noted_signal = 0
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if os.getpid() != self._process:  # a worker that a loader's own worker_init_fn left with this handler
            os._exit(128 + number)
        if self._training._noted_signal:
            raise KeyboardInterrupt
        self._training._noted_signal = number


@contextlib.contextmanager
def _named_compile_errors() -> Iterator[None]:
    """torch compiles a model when it is first called, each time with images of another size, and at the first gradient.

    The class of what it raises then lies here or there, by version; its module tells.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        raise CompileError(f"torch.compile can't compile the model: {reason}") from error


def _of_both_sides(extract: Any) -> Any:
    return lambda images: (extract(images) + extract(images.flip(-1))) / 2


def _if_images(extract: Any) -> Any:
    """Leaves what are features already, (batch, dimension), as they are."""
    return lambda images: images if images.dim() == 2 else extract(images)


def _in_channels_last(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    images, *others = inputs
    return images.contiguous(memory_format=torch.channels_last), *others


def _leave_signals_to_the_parent(_: int) -> None:
    """For a data loader's workers: what is sent to the whole process group must not end them before the step is done.

    They take a group of their own, and do not ignore SIGTERM, by which Python ends them when the process exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
