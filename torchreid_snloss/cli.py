"""The command line: torchreid's ``scripts/main.py``, flag for flag, with this package's losses."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TextIO, cast

import torch
from torch import nn
from torchreid import utils as reid_utils
from yacs.config import CfgNode

from torchreid_snloss import distributed
from torchreid_snloss.build import build_criteria, build_datamanager, build_engine, build_model, build_optimizer
from torchreid_snloss.checkpoint import CheckpointError, find_newest, load_weights
from torchreid_snloss.checks import check_config, check_criteria, check_datamanager, check_model
from torchreid_snloss.config import ConfigError, engine_run_kwargs, load_config
from torchreid_snloss.data import UnreadableImageError
from torchreid_snloss.engine import CompileError, NonFiniteError, Stopped, TrainingLoop
from torchreid_snloss.register import register

__all__ = ["add_config_arguments", "config_options", "main"]

_DESCRIPTION = """Train and test a torchreid model. Every torchreid config runs as it is; with `loss.name sn`, `hap2s`
or `fidi` it trains with that loss. The keys are torchreid's and this package's own, all in its documentation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        the exit code: 0; 2 for something in the config that can't be run with, which one line on standard error names;
        1 for what stops a run on its way (a NaN loss, an unreadable image, no compiler); 130 or 143 after Ctrl-C or
        SIGTERM.
    """
    parser = argparse.ArgumentParser(prog="torchreid-snloss", description=_DESCRIPTION)
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, config_options(args))
        try:
            distributed.start(cfg.use_gpu)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        register()
        check_config(cfg)
        with distributed.mute_other_ranks(), distributed.named_failures():
            _run(cfg)
        distributed.stop()
    except (ConfigError, CheckpointError) as error:
        return _end(2, f"error: {error}")
    except Stopped as stopped:
        return _end(128 + stopped.signal, str(stopped))
    except (CompileError, NonFiniteError) as error:
        return _end(1, f"error: {error}")
    except (UnreadableImageError, distributed.PeerError) as error:
        # A data loader's worker puts its traceback before the message.
        return _end(1, f"error: {str(error).strip().splitlines()[-1]}", on_all=True)
    except KeyboardInterrupt:
        return _end(130, "interrupted")
    return 0


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of torchreid's ``scripts/main.py``."""
    parser.add_argument("--config-file", default="", help="path of a YAML config file")
    parser.add_argument("-s", "--sources", nargs="+", default=[], help="source datasets, separated by spaces")
    parser.add_argument("-t", "--targets", nargs="+", default=[], help="target datasets, separated by spaces")
    parser.add_argument("--transforms", nargs="+", default=[], help="data augmentation, separated by spaces")
    parser.add_argument("--root", default="", help="path of the data root")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config options, as in: loss.name sn train.lr 0.001. After -s, -t or --transforms put `--` before them",
    )


def config_options(args: argparse.Namespace) -> list[Any]:
    """Flags and then options, as :func:`load_config` takes them."""
    flags = {f"data.{key}": getattr(args, key) for key in ("sources", "targets", "transforms", "root")}
    options = [item for key, value in flags.items() if value for item in (key, value)]
    return [*options, *(args.opts[1:] if args.opts[:1] == ["--"] else args.opts)]


def _end(code: int, message: str, on_all: bool = False) -> int:
    """Of what all processes say alike the first one's word is enough."""
    if on_all or distributed.rank() == 0:
        print(f"torchreid-snloss: {message}", file=sys.stderr)
    return code


def _run(cfg: CfgNode) -> None:
    reid_utils.set_random_seed(cfg.train.seed)
    if distributed.rank() > 0:
        _train_or_test(cfg)
        return
    log_name = ("test.log" if cfg.test.evaluate else "train.log") + time.strftime("-%Y-%m-%d-%H-%M-%S")
    try:
        os.makedirs(cfg.data.save_dir, exist_ok=True)
        log = open(os.path.join(cfg.data.save_dir, log_name), "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"data.save_dir {cfg.data.save_dir!r} can't be written to: {error}") from error
    # Not torchreid's Logger: it closes standard output in the end.
    with log, contextlib.redirect_stdout(cast(TextIO, _Tee(sys.stdout, log))):
        _train_or_test(cfg)


class _Tee:
    """Writes to the terminal and to the log, line by line, so that both show how far a run is."""

    def __init__(self, *streams: IO[str]) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


def _train_or_test(cfg: CfgNode) -> None:
    print(f"Show configuration\n{cfg}\n")
    print(f"Collecting env info ...\n** System info **\n{reid_utils.collect_env_info()}\n")
    torch.backends.cudnn.benchmark = cfg.use_gpu

    datamanager = distributed.main_process_first(lambda: build_datamanager(cfg))
    check_datamanager(cfg, datamanager)

    print(f"Building model: {cfg.model.name}")
    model = distributed.main_process_first(lambda: build_model(cfg, datamanager.num_train_pids))
    try:
        params, flops = reid_utils.compute_model_complexity(model, (1, 3, cfg.data.height, cfg.data.width))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"data.height {cfg.data.height} and data.width {cfg.data.width}"
        raise ConfigError(f"{cfg.model.name} does not take images of {size}: {error}") from error
    print(f"Model complexity: params={params:,} flops={flops:,}")
    if cfg.model.load_weights:
        distributed.main_process_first(lambda: load_weights(model, cfg.model.load_weights))
    check_model(cfg, model)
    if cfg.use_gpu:
        model = model.cuda()
        if torch.cuda.device_count() > 1 and distributed.world_size() == 1:
            model = nn.DataParallel(model)

    criteria = build_criteria(cfg)
    check_criteria(cfg, criteria, model, datamanager.num_train_pids)
    optimizer, scheduler = build_optimizer(cfg, model, criteria)
    print(f"Building {cfg.loss.name}-engine for {cfg.data.type}-reid")
    engine = build_engine(cfg, datamanager, model, optimizer, scheduler, criteria)
    _resume(cfg, engine)
    kwargs = engine_run_kwargs(cfg)
    if cfg.test.evaluate:
        engine.run(**kwargs)
        return
    engine.run(**{**kwargs, "visrank": False})
    if cfg.test.visrank:
        print("=> Drawing ranked lists, which torchreid does in a test run of its own")
        engine.run(**{**kwargs, "test_only": True})


def _resume(cfg: CfgNode, engine: TrainingLoop) -> None:
    """Goes on from ``model.resume``; after a restart by torchrun, from what this run has written before."""
    folder = Path(cfg.data.save_dir) / "model"
    checkpoint = "" if cfg.model.resume == "auto" else cfg.model.resume
    restarted = distributed.all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0
    if cfg.model.resume == "auto" or restarted:
        newest = None
        if distributed.rank() == 0:
            newest = find_newest(folder, since=0 if cfg.model.resume == "auto" else _start_of_run(folder))
        checkpoint = distributed.broadcast_object(newest) or checkpoint
        if not checkpoint:
            reason = "restarted" if restarted else "model.resume auto"
            print(f"=> {reason}: no checkpoint in {folder}, starting from the beginning")
    elif int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _STARTED).touch()
    if checkpoint:
        cfg.train.start_epoch = distributed.main_process_first(lambda: engine.resume(checkpoint))


_STARTED = ".started"


def _start_of_run(folder: Path) -> int:
    """When torchrun started this run, before its restarts, in nanoseconds; checkpoints before are another run's."""
    mark = folder / _STARTED
    return mark.stat().st_mtime_ns if mark.exists() else time.time_ns()
