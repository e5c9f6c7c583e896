"""The command line `torchreid-snloss-compare`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from torchreid_snloss.cli import add_config_arguments, config_options
from torchreid_snloss.compare.page import write_page
from torchreid_snloss.compare.results import Results, write_csv, write_json
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.config import ConfigError, get_default_config, load_config
from torchreid_snloss.config.ranges import shown
from torchreid_snloss.data import UnreadableImageError
from torchreid_snloss.engine import WriteError
from torchreid_snloss.record import RecordError
from torchreid_snloss.run.entry import run_command
from torchreid_snloss.run.writable import check_replaceable
from torchreid_snloss.settings import resolve

__all__ = ["main"]

_DESCRIPTION = """Train one config with several losses, with the same budget and the same seeds, and compare them: a
table, results.csv, results.json and report.html. Finished runs are not repeated, and a run that was interrupted is
resumed."""

_EVALUATIONS = 5  # the most evaluations during training if the config sets no test.eval_freq
_MOST_SEEDS = 1000
_CHANGES = ("label_noise", "outliers", "train_fraction")  # keys of the section data that have flags of their own


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        the exit code: 0; 2 for something in the config that can't be run with, which one line on standard error names;
        that of a run that failed or was stopped; 1 for a file that can't be read or written; 130, 143 or 129 after
        Ctrl-C, SIGTERM or a closed terminal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["torchreid-snloss-compare", *arguments])
    return run_command(
        "torchreid-snloss-compare",
        lambda: _parser().parse_args(arguments),
        lambda args: _compare(args, command),
        when_stopped="; repeat the command to resume",
        ends_process=argv is None,
    )


def _compare(args: argparse.Namespace, command: str) -> int:
    default = get_default_config().data
    changes = {key: value for key in _CHANGES if (value := getattr(args, key)) != default[key]}
    runs = _plan(args, changes)
    unchanged = _plan(args, {}) if changes else []
    for run in runs:
        if other := run.other_settings():
            raise ConfigError(
                f"{run.folder} holds a run with other settings ({'; '.join(other)}): "
                "set another data.save_dir, or remove that folder"
            )
    for run in runs:  # a damaged record is told before the first run is made
        run.finished()
    folder = runs[0].folder.parent.parent
    try:
        check_replaceable(folder, ("results.csv", "results.json", "report.html"))
    except OSError as error:
        raise ConfigError(f"the results can't be written to {str(folder)!r}: {error}") from error
    for line in _differences(runs):
        print(f"=> {line}")
    done, began = 0, time.monotonic()
    for number, run in enumerate(runs, start=1):
        name = f"run {number} of {len(runs)}: {run.loss}, seed {run.seed}"
        if run.finished():
            print(f"=> {name}: already finished")
            continue
        print(f"=> {name}, in {run.folder}", flush=True)
        code = run.execute()
        if code != 0:
            stopped = code > 128
            ended = "was interrupted; repeat the command to resume" if stopped else f"ended with exit code {code}"
            print(f"torchreid-snloss-compare: {name} {ended}", file=sys.stderr)
            return code
        done += 1
        left = sum(not later.finished() for later in runs[number:])
        minutes = (time.monotonic() - began) / done * left / 60
        print(f"   {run.summary()}; {left} to go" + (f", about {minutes:.0f} min" if left else ""), flush=True)

    results = Results.of(runs, unchanged if _usable(unchanged) else [])
    print(f"\n{results.table()}\n", flush=True)
    try:
        write_csv(results, folder / "results.csv")
        write_json(results, folder / "results.json")
        write_page(results, runs, folder / "report.html", command, args.map)
    except UnreadableImageError:
        raise
    except OSError as error:
        raise WriteError(
            f"can't write the results to {str(folder)!r}: {error}; the runs are kept; repeat the command"
        ) from error
    print(f"=> {folder}: results.csv, results.json, report.html")
    return 0


def _usable(unchanged: Sequence[Run]) -> bool:
    """Whether the runs on the unchanged training set are all there. A printed line names one that can't be read."""
    try:
        return all(run.finished() and not run.other_settings() for run in unchanged)
    except (ConfigError, RecordError) as error:
        print(f"** Left out the runs on the unchanged training set: {error}")
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchreid-snloss-compare", description=_DESCRIPTION)
    default = get_default_config().data
    parser.add_argument(
        "--losses",
        nargs="+",
        default=["softmax", "triplet", "sn", "hap2s", "fidi"],
        help="values of loss.name, separated by spaces; if options follow, put another flag or `--` before them",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per loss, with train.seed 1 to N")
    for flag, what in (("label-noise", "get another identity's label"), ("outliers", "are replaced by a patch")):
        parser.add_argument(
            f"--{flag}", type=_share, nargs="?", default=default[flag.replace("-", "_")], const=0.1, metavar="SHARE",
            help=f"share of the training images that {what}; 0.1 if no number is given",
        )  # fmt: skip
    parser.add_argument(
        "--train-fraction",
        type=_share,
        default=default.train_fraction,
        metavar="SHARE",
        help="share of the training identities to use",
    )
    parser.add_argument("--map", choices=["tsne", "pca"], default="tsne", help="the report's map of features")
    add_config_arguments(parser)
    return parser


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}; before options put `--`") from None


def _plan(args: argparse.Namespace, changes: dict[str, float]) -> list[Run]:
    """Lists the runs, each with checked settings.

    Args:
        args: the parsed command line.
        changes: the changes to the training set: keys in the section `data` and their values.

    Raises:
        ConfigError: if a run could not start.
    """
    if "RANK" in os.environ:
        raise ConfigError("runs are started one after the other, not with torchrun")
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {args.seeds}")
    if args.seeds > _MOST_SEEDS:
        raise ConfigError(f"--seeds must be at most {_MOST_SEEDS:,}, got {shown(args.seeds)}")
    if len(set(args.losses)) < len(args.losses):
        raise ConfigError(f"--losses must name each loss once, got {args.losses}")
    if options := [loss for loss in args.losses if "." in loss]:
        raise ConfigError(f"--losses got {args.losses}: put `--` between the losses and the option {options[0]}")
    given = config_options(args)
    for key, flag in (("loss.name", "--losses"), ("train.seed", "--seeds")):
        if key in given[::2]:
            raise ConfigError(f"{key} is set by {flag}, leave it out of the options")
    base = _load(args.config_file, given)
    for key in _CHANGES:
        if base.data[key] != get_default_config().data[key]:
            raise ConfigError(f"data.{key} is set by --{key.replace('_', '-')}, leave it out of config and options")
    if base.test.evaluate or base.model.resume or base.train.start_epoch:
        raise ConfigError(
            "a comparison trains from the beginning, and resumes by itself: leave test.evaluate, model.resume and "
            "train.start_epoch out"
        )
    condition = "+".join(f"{key.replace('_', '-')}-{value:g}" for key, value in changes.items()) or "plain"
    folder = Path(base.data.save_dir) / "compare" / condition
    common = [*given, *(item for key, value in changes.items() for item in (f"data.{key}", value))]
    common += ["model.resume", "auto", "train.record", True, "train.keep", 1, "test.visrank", False]
    if base.test.eval_freq < 1:
        common += ["test.eval_freq", -(-base.train.max_epoch // _EVALUATIONS)]

    runs = []
    for loss in args.losses:
        for seed in range(1, args.seeds + 1):
            own = ["loss.name", loss, "train.seed", seed, "data.save_dir", str(folder / loss / f"seed-{seed}")]
            settings = resolve(_load(args.config_file, [*common, *own]))
            file = ["--config-file", args.config_file] if args.config_file else []
            runs.append(Run(loss, seed, settings, [*file, *map(str, [*common, *own])]))
    return runs


def _differences(runs: Sequence[Run]) -> list[str]:
    """A line for each setting that the config leaves to the losses and that therefore differs between them."""
    lines = []
    for key in ("sampler.train_sampler", "test.normalize_feature"):
        values = {run.loss: run.settings.values[key] for run in runs}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{value} for {loss}" for loss, value in values.items())
            lines.append(f"{key}: {each}; set the key to use the same value for all")
    return lines


def _load(config_file: str, options: Sequence[Any]) -> CfgNode:
    with contextlib.redirect_stdout(io.StringIO()):  # each run prints the same lines to its own log
        return load_config(config_file, options)
