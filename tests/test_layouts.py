"""PyPI's layout of torchreid and upstream's; and that importing this package changes neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, run


def test_engines_under_upstreams_layout(upstream_layout: Path) -> None:
    done = run(
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_engines.py"),
        path=upstream_layout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = run("-c", "import torchreid.engine, torchreid_snloss; print(torchreid.__file__)", path=upstream_layout)
    assert where.stdout.startswith(str(upstream_layout))


def test_command_line_under_upstreams_layout(upstream_layout: Path, reid_data: Path, tmp_path: Path) -> None:
    done = run(
        *["-m", "torchreid_snloss", "-s", "market1501", "-t", "market1501", "--root", str(reid_data)],
        *["model.name", "osnet_x0_25", "model.pretrained", "False", "data.height", "64", "data.width", "32"],
        *["loss.name", "fidi", "train.max_epoch", "1", "train.batch_size", "32", "test.ranks", "[1, 5]"],
        *["data.workers", "0"],
        cwd=tmp_path,
        path=upstream_layout,
    )
    assert done.returncode == 0, done.stderr
    assert "mAP:" in done.stdout


PROBE = """
import torchreid
from torchreid import data, engine, losses, models
def state():
    return [dir(losses), dir(engine), models.build_model, list(data.sampler.AVAI_SAMPLERS),
            data.sampler.build_train_sampler, data.datamanager.build_train_sampler]
before = state()
import torchreid_snloss
assert state() == before, "importing changed torchreid"
torchreid_snloss.register()
assert state() != before
"""


def test_importing_changes_nothing() -> None:
    done = run("-c", PROBE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ("from torchreid import losses; losses.SNLoss = 1", "has a SNLoss already"),
        ("from torchreid import data; data.sampler.AVAI_SAMPLERS.append('IdentitySampler')", "a sampler named"),
        ("from torchreid import data; data.register_image_dataset('synthetic', 1)", "a data set named 'synthetic'"),
    ],
)
def test_register_refuses_what_it_would_overwrite(theirs: str, words: str) -> None:
    again = "try: t.register()\nexcept RuntimeError: t.register()"  # raises the second time too
    done = run("-c", f"{theirs}\nimport torchreid_snloss as t\n{again}")
    assert "RuntimeError" in done.stderr
    assert words in done.stderr
