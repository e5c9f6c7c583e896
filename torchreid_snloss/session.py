"""A run from its config: build, resume, train, test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torchreid import utils as reid_utils

from torchreid_snloss import device, distributed
from torchreid_snloss.build import build_criteria, build_engine, build_optimizer, load_model
from torchreid_snloss.checkpoint import CheckpointError, load_weights, model_folder, newest_checkpoint
from torchreid_snloss.checks import check_datamanager, check_model
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine import TrainingLoop
from torchreid_snloss.engine.checkpointer import new_run
from torchreid_snloss.loading import load_data, share_decoded
from torchreid_snloss.run.lock import FolderInUseError, locked_on_all_ranks
from torchreid_snloss.run.log import log_only, log_path, logged
from torchreid_snloss.run.restarts import identify_run, restarted
from torchreid_snloss.run.screen import data_lines, setting_lines, version_line
from torchreid_snloss.run.writable import check_run_writable, checkpoint_size
from torchreid_snloss.settings import Config, Settings, engine_run_kwargs, resolve, wants_gpu
from torchreid_snloss.tested_model import checkpoint_to_test, load_tested_model

__all__ = ["train"]

_T = TypeVar("_T")


def train(cfg: Config) -> TrainingLoop:
    """Trains and tests according to the config, or only tests, just as the command line does.

    It writes its log and its checkpoints to `data.save_dir`. If `torchrun` started the process, it joins the process
    group first and does not leave it: call `torchreid_snloss.distributed.stop()` at the end of a script.

    Args:
        cfg: a config from `load_config` or `get_default_config`, or its settings.

    Returns:
        the engine, with the trained model.

    Raises:
        ConfigError, CheckpointError: for an error in the config, or in the data or files it names.
        FeaturesError: for a file of features that is of other weights, images or options.
        NonFiniteError, NothingLearntError, CompileError, UnreadableImageError, WriteError, WorkerKilledError: for an
            error during the run.
        PeerError: if another process failed.
        Stopped: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    try:
        distributed.start(wants_gpu(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    settings = _on_all_ranks(lambda: resolve(cfg))
    log_name = "test.log" if settings.evaluate else "train.log"
    with (
        distributed.mute_other_ranks(),
        distributed.named_failures(),
        _locked(settings),
        logged(settings.save_dir, log_name),
    ):
        reid_utils.set_random_seed(settings.seed)
        return _train_or_test(settings)


def _on_all_ranks(check: Callable[[], _T]) -> _T:
    """Calls a check on all processes. If it fails on any of them, all raise the same error, which rank 0 then prints.

    Raises:
        ConfigError: What the check raised; if rank 0 has no such error, with the number of the rank.
    """
    failed: ConfigError | None = None
    try:
        result = check()
    except ConfigError as error:
        failed = error
    texts = distributed.broadcast_object(distributed.gather_objects("" if failed is None else str(failed)))
    if failed is not None and texts[0]:
        raise failed
    for rank, text in enumerate(texts):
        if text:
            raise ConfigError(text if rank == 0 else f"rank {rank}: {text}") from failed
    return result


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """Within it no other run trains in `data.save_dir`."""
    with contextlib.ExitStack() as stack:
        try:
            if not settings.evaluate:
                stack.enter_context(locked_on_all_ranks(settings.save_dir))
        except FolderInUseError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(f"data.save_dir {settings.save_dir!r} can't be written to: {error}") from error
        yield


def _train_or_test(settings: Settings) -> TrainingLoop:
    _print_settings(settings)
    torch.backends.cudnn.benchmark = settings.use_gpu

    folder, restart = model_folder(settings.save_dir), restarted()
    run = new_run() if settings.evaluate else identify_run(folder, restart)
    datamanager = distributed.main_process_first(lambda: load_data(settings))
    _on_all_ranks(lambda: check_datamanager(settings, datamanager))
    print("Data:", *data_lines(settings, datamanager), sep="\n")
    if settings.evaluate:
        checkpoint = checkpoint_to_test(settings)
        model = distributed.main_process_first(lambda: load_tested_model(settings, checkpoint))
    else:
        checkpoint = _checkpoint_to_resume(settings, folder, run, restart)
        pretrained = settings.pretrained and not checkpoint  # all weights are the checkpoint's
        model = distributed.main_process_first(lambda: load_model(settings, datamanager.num_train_pids, pretrained))
    _on_all_ranks(lambda: check_model(settings, model))
    params, flops = reid_utils.compute_model_complexity(model, (1, 3, settings.height, settings.width))
    print(f"Model: {settings.model_name}, {params:,} parameters, {flops:,} flops an image")
    if settings.load_weights and not checkpoint:
        distributed.main_process_first(lambda: load_weights(model, settings.load_weights))
    model = device.to_device(model, settings.use_gpu)
    if settings.use_gpu and device.count() > 1 and distributed.world_size() == 1:
        model = nn.DataParallel(model)

    criteria = _on_all_ranks(lambda: build_criteria(settings))
    optimizer, scheduler = _on_all_ranks(lambda: build_optimizer(settings, model, criteria))
    size = checkpoint_size(model, optimizer)
    _on_all_ranks(lambda: None if distributed.rank() > 0 else check_run_writable(settings, size))
    share_decoded(settings, datamanager)
    engine = build_engine(settings, datamanager, model, optimizer, scheduler, criteria)
    engine.checkpointer.run = run
    kwargs = engine_run_kwargs(settings)
    if checkpoint and not settings.evaluate:
        kwargs["start_epoch"] = distributed.main_process_first(lambda: engine.resume(checkpoint))
    engine.run(**kwargs)
    return engine


def _print_settings(settings: Settings) -> None:
    """Shows the versions and what differs from the defaults; the log also has the whole config and the environment."""
    print(version_line(settings))
    if path := log_path():
        print(f'Log: "{path}", with the whole config and the environment')
    print("Config, where it differs from the defaults:", *setting_lines(settings), sep="\n")
    log_only(f"Show configuration\n{settings}\n")
    log_only(f"Collecting env info ...\n** System info **\n{_environment()}\n")


def _checkpoint_to_resume(settings: Settings, folder: Path, run: str, restarted: bool) -> Path | str:
    """The checkpoint of `model.resume`, or after a restart by torchrun the newest one of this run; empty for none.

    It prints a line if there is none yet, and for what the checkpoint replaces. All processes must call it.

    Raises:
        CheckpointError: if the newest one can't be loaded.
    """
    checkpoint: Path | str = "" if settings.resume == "auto" else settings.resume
    if settings.resume == "auto" or restarted:
        try:
            checkpoint = newest_checkpoint(folder, None if settings.resume == "auto" else run) or checkpoint
        except CheckpointError as error:
            raise CheckpointError(
                f"can't resume: {error}; set another data.save_dir, or move the checkpoints away, since the run would "
                "overwrite them"
            ) from error
        if not checkpoint:
            reason = "restarted" if restarted else "model.resume auto"
            print(f"=> {reason}: no checkpoint in {folder}, starting from the beginning")
    for key in ("model.load_weights", "train.start_epoch"):
        if checkpoint and (given := settings.values[key]):
            print(f"=> {key} {given} is not used, since the run is resumed")
    return checkpoint


def _environment() -> str:
    """What torch tells of its version and the machine."""
    try:
        return str(reid_utils.collect_env_info())
    except AttributeError:  # torch 2.2 fails in an environment without pip, as uv makes them
        return f"PyTorch version: {torch.__version__} (install pip to have more here)"
