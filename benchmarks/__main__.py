"""`python -m benchmarks`: prints a table, and writes it as JSON and as a figure."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import evaluator, large, loader, losses, sampler, scaling, step
from benchmarks.figure import draw
from benchmarks.timing import Row

_HERE = Path(__file__).parent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = ["losses", "memory", "sampler", "evaluator", "step", "scaling", "loader"]
    parser.add_argument(
        "suites",
        nargs="*",
        help=f"of {', '.join(suites)}, all if none is named; or large, which takes an hour and 10 GB of memory",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="large: the cases with this in their name, as small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: losses, step and loader only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=_HERE / "results", help="folder for DEVICE.json and DEVICE.png")
    args = parser.parse_args()
    if args.device == "cuda":
        suites = ["losses", "step", "loader"]
    if unknown := set(args.suites) - {*suites, *(["large"] if args.device == "cpu" else [])}:
        parser.error(f"unknown suites {sorted(unknown)}, there are {suites}")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.device == "cuda"  # as the command line does
    run: dict[str, Callable[[], list[Row]]] = {
        "losses": lambda: losses.measure(args.device),
        "memory": losses.measure_memory,
        "sampler": sampler.measure,
        "evaluator": evaluator.measure,
        "step": lambda: step.measure(args.device),
        "scaling": scaling.measure,
        "loader": lambda: loader.measure(args.device),
        "large": lambda: large.measure([case for case in large.CASES if args.only in case.name]),
    }
    print(machine := _machine(args.device, args.threads))
    for suite in args.suites or suites:
        print(f"\n{suite} ...", flush=True)
        new = run[suite]()
        _print(new)
        # These have files of their own, which a measurement on another machine does not take away.
        path = args.output / f"{f'{suite}-' if suite in ('loader', 'large') else ''}{args.device}.json"
        _write(path, _machine("cpu", 1) if path.name == "loader-cpu.json" else machine, new, keep_cases=bool(args.only))


def _write(path: Path, machine: str, new: list[Row], keep_cases: bool) -> None:
    """Adds results to a file; those of other suites, or of all other cases, stay if they are of this machine."""
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = [Row(**row) for row in before["rows"]] if before.get("machine") == machine else []
    measured = {(row.suite, row.case if keep_cases else "") for row in new}
    rows = [row for row in rows if (row.suite, row.case if keep_cases else "") not in measured] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    draw(rows, machine, path.with_suffix(".png"))
    print(f"\nWritten: {path} and {path.with_suffix('.png')}")


def _machine(device: str, threads: int) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return f"{name}, {threads} threads, float32, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _print(rows: list[Row]) -> None:
    heading = None
    for row in rows:
        if (row.suite, row.case) != heading:
            heading = (row.suite, row.case)
            print(f"\n  {row.suite}: {row.case}")
        print(f"    {row.name:36s} {row.value:12,.2f} {row.unit:4s} x {row.ratio:.3f}")


if __name__ == "__main__":
    main()
