"""Kills a real training process at random moments, resumes it, and compares it with one that was left alone.

python tests/kill_and_resume.py --kills 20
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from conftest import process_options, start

from torchreid_snloss.data import make_pedestrians

EPOCHS = 6
OPTIONS = process_options(
    *["loss.name", "sn", "train.max_epoch", EPOCHS, "train.lr_scheduler", "cosine"],
    *["data.transforms", "['random_flip', 'random_crop', 'color_jitter']"],
    *["test.eval_freq", 2, "model.resume", "auto"],
)


def start_run(root: Path, save_dir: Path, workers: int) -> subprocess.Popen[str]:
    options = ["data.root", str(root), "data.save_dir", str(save_dir), "data.workers", str(workers)]
    return start("-u", "-m", "torchreid_snloss", *OPTIONS, *options, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str], save_dir: Path) -> dict[str, Any]:
    """The last and the best checkpoint of a run, and the results it ended with."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    files = {"last": f"model.pth.tar-{EPOCHS}", "best": "model-best.pth.tar"}
    ends = {which: torch.load(save_dir / "model" / name, weights_only=True) for which, name in files.items()}
    return {**ends, "results": re.findall(r"mAP: .*|Rank-1 .*", output)[-2:]}


def wait_for_training(process: subprocess.Popen[str]) -> bool:
    """Whether the process came as far as its training, or its final test."""
    assert process.stdout is not None
    return any("=> Start training" in line for line in process.stdout)


def epochs_done(save_dir: Path) -> int:
    return max((int(path.name.split("-")[-1]) for path in (save_dir / "model").glob("model.pth.tar-?")), default=0)


def kill_and_resume(kills: int, folder: Path, seed: int = 0, workers: int = 1) -> dict[str, int]:
    """Kills runs until there were enough kills; each run is resumed to its end, and must end as one left alone.

    Returns how many kills there were, how many of them while a checkpoint was being written, and how many runs.
    """
    rng = random.Random(seed)
    root = folder / "reid-data"
    make_pedestrians(root / "market1501", num_train_pids=16, num_test_pids=8, seed=5)
    alone = finish(start_run(root, folder / "alone", workers), folder / "alone")
    assert alone["results"]

    count = {"kills": 0, "while a checkpoint was being written": 0, "runs compared": 0}
    while count["kills"] < kills:
        save_dir = folder / f"killed-{count['runs compared']}"
        while count["kills"] < kills and not (save_dir / "model" / f"model.pth.tar-{EPOCHS}").exists():
            process = start_run(root, save_dir, workers)
            if not wait_for_training(process):
                raise AssertionError("the process ended before its training")
            writing, further = rng.random() < 0.5, epochs_done(save_dir) + rng.randint(0, 3)
            until = time.monotonic() + (20.0 if writing else rng.uniform(0.0, 4.0))
            while process.poll() is None and time.monotonic() < until:
                unfinished = next((save_dir / "model").glob(".unfinished-*"), None)
                if writing and unfinished and epochs_done(save_dir) >= further:
                    time.sleep(rng.uniform(0.0, 0.003))
                    break
                time.sleep(0.002)  # a checkpoint takes a hundred times that long
            killed = process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
            count["kills"] += killed
            count["while a checkpoint was being written"] += bool(list((save_dir / "model").glob(".unfinished-*")))
            print(count, file=sys.stderr, flush=True)

        resumed = finish(start_run(root, save_dir, workers), save_dir)
        count["runs compared"] += 1
        assert resumed["results"] == alone["results"]
        for which in ("last", "best"):
            assert resumed[which]["epoch"] == alone[which]["epoch"], which
            for name, value in alone[which]["state_dict"].items():
                assert torch.equal(value, resumed[which]["state_dict"][name]), (which, name)
        assert not list((save_dir / "model").glob(".unfinished-*"))
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        done = kill_and_resume(args.kills, Path(temporary), args.seed, args.workers)
    print(f"same weights to the bit and same results after: {done}")
