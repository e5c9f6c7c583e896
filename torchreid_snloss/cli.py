"""The command line: the flags and options of torchreid's `scripts/main.py`, with this package's losses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from torchreid_snloss import distributed
from torchreid_snloss.config import load_config
from torchreid_snloss.config.file import own_configs, own_configs_folder
from torchreid_snloss.losses import LOSSES
from torchreid_snloss.run.entry import run_command
from torchreid_snloss.session import train

__all__ = ["add_config_arguments", "command_parser", "config_options", "main"]

_DESCRIPTION = """Train and test a torchreid model. Every torchreid config runs as it is; with `loss.name sn`, `hap2s`
or `fidi` it trains with that loss. The keys are torchreid's and this package's own, all in its documentation."""
_ASIDE = re.compile(r" \([^)]*\)")
_SENTENCE_END = re.compile(r"[,;:.](?: |$)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        the exit code: 0; 2 for something in the config that can't be run with, which one line on standard error names;
        1 for what stops a run on its way (a NaN loss, an unreadable image, a full disk); 130, 143 or 129 after Ctrl-C,
        SIGTERM or a closed terminal.
    """
    return run_command("torchreid-snloss", lambda: _parser().parse_args(argv), _train, ends_process=argv is None)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("torchreid-snloss", _DESCRIPTION)
    add_config_arguments(parser)
    return parser


def _train(args: argparse.Namespace) -> int:
    train(load_config(args.config_file, config_options(args)))
    distributed.stop()
    return 0


def command_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--version`, and with the losses and the configs that come with the package in its `--help`.

    Args:
        program: the name of the command line.
        description: what it does.
    """
    from torchreid_snloss import __version__

    parser = argparse.ArgumentParser(
        prog=program, description=description, epilog=_epilog(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"torchreid-snloss {__version__}")
    return parser


def _epilog() -> str:
    names = ["softmax", "triplet", *LOSSES, "custom"]
    lines = [f"losses (loss.name, several joined by +): {', '.join(names)}", ""]
    configs = own_configs()
    width = max(map(len, configs), default=0)
    for title, variants in (("configs (--config-file)", False), ("variants of torchreid-snloss-compare", True)):
        lines += [f"{title} that come with the package, found by these names in any folder:"]
        lines += [
            f"  {name:{width}}  {_SENTENCE_END.split(_ASIDE.sub('', text))[0]}"
            for name, text in configs.items()
            if ("/variants/" in name) == variants
        ]
        lines += [""]
    return "\n".join([*lines, f"They are in {own_configs_folder()}."])


def add_config_arguments(parser: argparse.ArgumentParser, example: str = "loss.name sn train.lr 0.001") -> None:
    """Adds the arguments of torchreid's `scripts/main.py`.

    Args:
        parser: the parser.
        example: options that the command accepts, for its `--help`.
    """
    parser.add_argument("--config-file", default="", help="path of a YAML config file")
    parser.add_argument("-s", "--sources", nargs="+", default=[], help="source datasets, separated by spaces")
    parser.add_argument("-t", "--targets", nargs="+", default=[], help="target datasets, separated by spaces")
    parser.add_argument("--transforms", nargs="+", default=[], help="data augmentation, separated by spaces")
    parser.add_argument("--root", default="", help="path of the data root")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help=f"config options, as in: {example}. After -s, -t or --transforms put `--` before them",
    )


def config_options(args: argparse.Namespace) -> list[Any]:
    """Converts flags and options to the list of options that `load_config` takes, flags first."""
    flags = {f"data.{key}": getattr(args, key) for key in ("sources", "targets", "transforms", "root")}
    options = [item for key, value in flags.items() if value for item in (key, value)]
    return [*options, *(args.opts[1:] if args.opts[:1] == ["--"] else args.opts)]
