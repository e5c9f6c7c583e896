"""The command line `torchreid-snloss-compare`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torchreid_snloss.cli import add_config_arguments, command_parser, config_options
from torchreid_snloss.compare.execution import Execution
from torchreid_snloss.compare.export import write_csv, write_json
from torchreid_snloss.compare.images import images_digests
from torchreid_snloss.compare.jobs import check_jobs
from torchreid_snloss.compare.page import write_page
from torchreid_snloss.compare.plan import CHANGES, Plan, check_base
from torchreid_snloss.compare.results import Results
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.compare.tuning import MOST_TRIALS, Tuning, check_available
from torchreid_snloss.compare.variants import BASELINES, CONTROL, Variant, of_loss, read_variants
from torchreid_snloss.config import ConfigError, get_default_config, load_config
from torchreid_snloss.config.keys import MOST_FOLDS, OUR_KEYS
from torchreid_snloss.config.ranges import shown
from torchreid_snloss.data import UnreadableImageError
from torchreid_snloss.engine import WriteError
from torchreid_snloss.record import RecordError
from torchreid_snloss.run.entry import run_command
from torchreid_snloss.run.writable import check_replaceable
from torchreid_snloss.settings import Settings

__all__ = ["main"]

_DESCRIPTION = """Train one config with several losses, with the same budget and the same seeds, and compare them with
softmax: a table with intervals, results.csv, results.json and report.html. Finished runs are not repeated, and runs
that were interrupted are resumed."""

_LOSSES = ["triplet", "sn", "hap2s", "fidi"]
_MOST_SEEDS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        the exit code: 0; 2 for something in the config that can't be run with, which one line on standard error names;
        1 if a row has failed, or for a file that can't be read or written; 130, 143 or 129 after Ctrl-C, SIGTERM or a
        closed terminal; that of a run that a signal ended.
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


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("torchreid-snloss-compare", _DESCRIPTION)
    default = get_default_config().data
    parser.add_argument(
        "--losses",
        nargs="+",
        help="values of loss.name, separated by spaces; if options follow, put another flag or `--` before them. "
        f"Without --losses and --variants: {' '.join(_LOSSES)}",
    )
    parser.add_argument("--variants", metavar="FILE", help="a YAML file of further rows: names with their options")
    parser.add_argument(
        "--baselines",
        choices=["both", *BASELINES, "none"],
        default="both",
        help="the rows that the others are compared with: softmax on the same batches as the metric losses (control), "
        "and on random batches (softmax); default: both",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per row, with train.seed 1 to N")
    parser.add_argument(
        "--roots",
        nargs="+",
        default=[],
        metavar="ROOT",
        help="data roots in place of data.root, each with another split of the same data; all rows run on each",
    )
    parser.add_argument(
        "--tune",
        type=int,
        default=0,
        metavar="N",
        help="first search for the best learning rate, weight and arguments of each row, in N trials that are judged "
        "on the training identities that data.val_fraction holds out",
    )
    parser.add_argument(
        "--folds",
        type=int,
        default=1,
        metavar="F",
        help="judge each trial of --tune by the mean over F runs, each of which holds out other training identities; "
        "data.val_fraction is 1/F or less (default: 1)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="runs side by side, each on a GPU or core")
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
    add_config_arguments(parser, example="train.lr 0.001 train.max_epoch 60")
    return parser


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}; before options put `--`") from None


def _compare(args: argparse.Namespace, command: str) -> int:
    plan = _plan(args)
    use_gpu = bool(plan.base.use_gpu)
    check_jobs(args.jobs, use_gpu)
    runs = plan.runs()  # reports an invalid setting before the first trial, too
    try:
        check_replaceable(plan.folder, ("results.csv", "results.json", "report.html"))
    except OSError as error:
        raise ConfigError(f"the results can't be written to {str(plan.folder)!r}: {error}") from error
    digest = images_digests()
    tunings = [
        Tuning(plan, variant, split, _digest_of_trials(plan, variant, split, digest))
        for variant in plan.variants
        for split in plan.splits
        if plan.trials
    ]
    if not tunings:
        runs = _checked(runs, digest)
    with _write_errors(plan.folder):
        return _carry_out(args, command, plan, tunings, runs, digest)


def _carry_out(
    args: argparse.Namespace,
    command: str,
    plan: Plan,
    tunings: Sequence[Tuning],
    runs: Sequence[Run],
    digest: Callable[[Settings], str],
) -> int:
    """Makes the trials and the runs that are missing, and writes the results. Returns the exit code."""
    execution = Execution(args.jobs, bool(plan.base.use_gpu))
    if tunings:
        if code := execution.tune(plan, tunings):
            return code
        runs = _checked(plan.runs(execution.tuned_values(plan, tunings)), digest)
    if code := execution.train(runs):
        return code
    if runs := [run for run in runs if run.variant not in execution.failed]:
        tunings = [tuning for tuning in tunings if tuning.variant.name not in execution.failed]
        unchanged = _unchanged(plan, runs, digest) if plan.changes and not tunings else []
        results = Results.of(runs, unchanged)
        print("", results.table(), "", *results.findings, "", sep="\n", flush=True)
        write_csv(results, plan.folder / "results.csv")
        write_json(results, plan.folder / "results.json", tunings)
        write_page(results, runs, plan.folder / "report.html", command, args.map, tunings)
        print(f"=> {plan.folder}: results.csv, results.json, report.html", flush=True)
    execution.print_failures()
    return 1 if execution.failed else 0


def _digest_of_trials(plan: Plan, variant: Variant, split: int, digest: Callable[[Settings], str]) -> str:
    """The digest of the images of the trials. All folds are loaded: one that holds nobody out is refused here."""
    digests = [digest(plan.trial(variant, split, 0, {}, fold).settings) for fold in range(plan.folds)]
    return digests[0]


def _checked(runs: Sequence[Run], digest: Callable[[Settings], str]) -> list[Run]:
    """The runs with the digests of their images, if none of their folders holds another run."""
    runs = [dataclasses.replace(run, images=digest(run.settings)) for run in runs]
    for run in runs:
        run.check()
    return runs


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Within it an error of the system, as of a full disk, becomes a `WriteError`."""
    try:
        yield
    except (UnreadableImageError, WriteError):
        raise
    except OSError as error:
        raise WriteError(
            f"can't write the results to {str(folder)!r}: {error}; the runs are kept; repeat the command"
        ) from error


def _plan(args: argparse.Namespace) -> Plan:
    """The plan of the comparison that a command line asks for.

    Raises:
        ConfigError: If a run could not start.
    """
    if "RANK" in os.environ:
        raise ConfigError("the runs are started by this one process, not with torchrun; --jobs runs several at a time")
    for flag, number, least, most in (
        ("seeds", args.seeds, 1, _MOST_SEEDS),
        ("tune", args.tune, 0, MOST_TRIALS),
        ("folds", args.folds, 1, MOST_FOLDS),
    ):
        if number < least:
            raise ConfigError(f"--{flag} must be at least {least}, got {number}")
        if number > most:
            raise ConfigError(f"--{flag} must be at most {most:,}, got {shown(number)}")
    changes = {key: value for key in CHANGES if (value := getattr(args, key)) != get_default_config().data[key]}
    for key, share in changes.items():
        allowed = OUR_KEYS[f"data.{key}"].range
        if not allowed.holds(share):
            raise ConfigError(f"--{key.replace('_', '-')} must be {allowed.expected(share)}, got {share}")
    given = config_options(args)
    base = load_config(args.config_file, given, tell=lambda line: None)  # each run prints to its own log
    variants = _variants(args, base)
    for key, flag in (("loss.name", "--losses"), ("train.seed", "--seeds")):
        if key in given[::2]:
            raise ConfigError(f"{key} is set by {flag}, leave it out of the options")
    roots = [str(Path(root)) for root in args.roots]
    plan = Plan(base, variants, args.seeds, roots, changes, args.tune, args.folds)
    check_base(plan)
    if plan.trials:
        check_available()
    return plan


def _variants(args: argparse.Namespace, base: object) -> list[Variant]:
    losses = args.losses or ([] if args.variants is not None else _LOSSES)
    if options := [loss for loss in losses if "." in loss]:
        raise ConfigError(f"--losses got {losses}: put `--` between the losses and the option {options[0]}")
    if len(set(losses)) < len(losses):
        raise ConfigError(f"--losses must name each loss once, got {losses}")
    if CONTROL in losses:
        raise ConfigError(f"--losses got {CONTROL!r}, which is no loss but a baseline; --baselines adds it")
    names = list(BASELINES) if args.baselines == "both" else [args.baselines] if args.baselines != "none" else []
    variants = [BASELINES[name] for name in names]
    variants += [of_loss(loss, base) for loss in losses if loss not in names]
    variants += read_variants(args.variants) if args.variants is not None else []
    by_folder: dict[str, str] = {}
    for name in (variant.name for variant in variants):
        folder = name.casefold().rstrip(".")  # some systems know no capitals, or no dot at the end
        if folder in by_folder:
            other = by_folder[folder]
            named = f"{name!r}" if other == name else f"{other!r} and {name!r}, the same folder on some systems"
            raise ConfigError(f"two rows are named {named}: losses and variants must have different names")
        by_folder[folder] = name
    return variants


def _unchanged(plan: Plan, runs: Sequence[Run], digest: Callable[[Settings], str]) -> list[Run]:
    """The same runs on the unchanged training set; none unless all are there. A line names one that can't be read."""
    rows = {run.variant for run in runs}
    found = [run for run in dataclasses.replace(plan, changes={}).runs() if run.variant in rows]
    try:
        found = [dataclasses.replace(run, images=digest(run.settings)) for run in found]
        return found if all(run.finished() and not run.other_settings() for run in found) else []
    except (ConfigError, RecordError) as error:
        print(f"** Left out the runs on the unchanged training set: {error}")
        return []
